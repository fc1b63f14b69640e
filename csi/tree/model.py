"""A tree in the making, and made: directories, files and links, in an order that never changes.

The order decides the inode numbers: breadth first, names in byte order within a directory, so that the children
of a directory are neighbours. Same files in, same tree out, on every node and version.

Nodes are numbers and their properties columns, because a model may have a million of them: a node costs about 50 bytes
beside its name.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

from csi.errors import UnsupportedModelError
from csi.oci.digest import Digest

ROOT_INODE = 1
MAX_TARGET_BYTES = 4096
"""PATH_MAX of Linux, which counts the terminating NUL."""


class EntryKind(IntEnum):
    """What an inode is."""

    DIRECTORY = 1
    FILE = 2
    SYMLINK = 3


class Encoding(IntEnum):
    """How the bytes that files are made of are stored in a blob."""

    IDENTITY = 0
    GZIP = 1
    ZSTD = 2


@dataclass(frozen=True, slots=True)
class BlobSpec:
    """A blob that files lie in. `digest` and `size_bytes` are of what the registry stores.

    Files lie in the *decoded* blob, which has `decoded_bytes` (None with IDENTITY: nothing is decoded). `origin` is the
    `registry/repository` that has the blob; empty for the one the model itself comes from.
    """

    digest: Digest
    size_bytes: int
    encoding: Encoding = Encoding.IDENTITY
    decoded_bytes: int | None = None
    origin: str = ""

    def __post_init__(self) -> None:
        if (self.encoding is Encoding.IDENTITY) != (self.decoded_bytes is None):
            raise ValueError(f"blob {self.digest.short()}: {self.encoding.name} with decoded size {self.decoded_bytes}")

    @property
    def content_bytes(self) -> int:
        """The size of the space that files lie in."""
        return self.size_bytes if self.decoded_bytes is None else self.decoded_bytes


@dataclass(frozen=True, slots=True)
class TreeFile:
    """A file to be: `length` bytes from `offset` of what `blob` decodes to. `path` is relative, checked by
    `csi.oci.paths`.
    """

    path: str
    blob: BlobSpec
    offset: int
    length: int
    mtime_s: int = 0
    executable: bool = False


@dataclass(frozen=True, slots=True)
class TreeSymlink:
    """A symbolic link to be. `target` is what readlink(2) gives; `csi.tree.assemble` decides which may exist."""

    path: str
    target: str
    mtime_s: int = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """One inode. `blob` is an index into the tree's blobs, -1 but for files; children are a range of inodes; `target`
    is a symlink's, and `size_bytes` its length.
    """

    inode: int
    parent: int
    kind: EntryKind
    name: bytes
    executable: bool = False
    mtime_s: int = 0
    size_bytes: int = 0
    blob: int = -1
    blob_offset: int = 0
    first_child: int = 0
    child_count: int = 0
    target: bytes = b""


class TreeContent:
    """Everything a tree file holds: iterating gives the entries in inode order, from 1, made as they are asked for."""

    def __init__(self, builder: TreeBuilder, order: Sequence[int], parents: Sequence[int]) -> None:
        """`order[i]` is the node of inode i + 1, `parents[i]` its parent's inode."""
        self._builder = builder
        self._order = order
        self._parents = parents
        self._blob_numbers, self.blobs = builder.blobs_of(order)

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Entry]:
        builder = self._builder
        names, kinds, targets, children = builder.names, builder.kinds, builder.targets, builder.children
        next_child = 2
        for position, node in enumerate(self._order):
            inode, parent, kind = position + 1, self._parents[position], kinds[node]
            if kind == EntryKind.FILE:
                yield Entry(
                    inode,
                    parent,
                    EntryKind.FILE,
                    names[node],
                    bool(builder.executable[node]),
                    builder.mtimes[node],
                    builder.lengths[node],
                    self._blob_numbers[builder.blob[node]],
                    builder.offsets[node],
                )
            elif kind == EntryKind.DIRECTORY:
                count = len(children[node])
                name = names[node] if position else b""
                yield Entry(
                    inode,
                    parent,
                    EntryKind.DIRECTORY,
                    name,
                    mtime_s=builder.mtimes[node],
                    first_child=next_child,
                    child_count=count,
                )
                next_child += count
            else:
                target = targets[node]
                yield Entry(
                    inode,
                    parent,
                    EntryKind.SYMLINK,
                    names[node],
                    mtime_s=builder.mtimes[node],
                    size_bytes=len(target),
                    target=target,
                )


class TreeBuilder:
    """Nodes by number; 0 is the root directory. What may stand where is for the caller to decide.

    `kinds`, `names`, `parents`, `mtimes` are columns of every node; `blob` (a number `add_blob` gave), `offsets`,
    `lengths`, `executable` of files; `children` of directories by name; `targets` of symlinks. A node that no directory
    lists is not part of the tree, and costs memory only.
    """

    ROOT = 0

    def __init__(self) -> None:
        self.kinds = bytearray([EntryKind.DIRECTORY])
        self.names: list[bytes] = [b""]
        self.parents = array("i", [0])
        self.mtimes = array("q", [0])
        self.blob = array("i", [-1])
        self.offsets = array("Q", [0])
        self.lengths = array("Q", [0])
        self.executable = bytearray(1)
        self.children: dict[int, dict[bytes, int]] = {self.ROOT: {}}
        self.targets: dict[int, bytes] = {}
        self._blobs: dict[BlobSpec, int] = {}

    def __len__(self) -> int:
        return len(self.kinds)

    def add_blob(self, spec: BlobSpec) -> int:
        """Its number; the same for an equal one."""
        return self._blobs.setdefault(spec, len(self._blobs))

    def add_directory(self, parent: int, name: bytes, mtime_s: int = 0) -> int:
        """An empty directory, in the place of whatever had the name."""
        node = self._add(EntryKind.DIRECTORY, parent, name, mtime_s)
        self.children[node] = {}
        return node

    def add_file(
        self, parent: int, name: bytes, blob: int, offset: int, length: int, mtime_s: int = 0, executable: bool = False
    ) -> int:
        """A file, in the place of whatever had the name."""
        return self._add(EntryKind.FILE, parent, name, mtime_s, blob, offset, length, executable)

    def add_symlink(self, parent: int, name: bytes, target: bytes, mtime_s: int = 0) -> int:
        """A symlink, in the place of whatever had the name."""
        node = self._add(EntryKind.SYMLINK, parent, name, mtime_s)
        self.targets[node] = target
        return node

    def add_alias(self, parent: int, name: bytes, node: int) -> int:
        """The same file or symlink under another name, as a hard link gives."""
        if self.kinds[node] == EntryKind.SYMLINK:
            return self.add_symlink(parent, name, self.targets[node], self.mtimes[node])
        return self.add_file(
            parent,
            name,
            self.blob[node],
            self.offsets[node],
            self.lengths[node],
            self.mtimes[node],
            bool(self.executable[node]),
        )

    def path(self, node: int) -> str:
        """Relative to the root; empty for the root."""
        parts = []
        while node != self.ROOT:
            parts.append(self.names[node])
            node = self.parents[node]
        return b"/".join(reversed(parts)).decode()

    def finish(self, root: int = ROOT) -> TreeContent:
        """The tree below directory `root`. The builder must not change any more."""
        order = array("I", [root])
        parents = array("I", [ROOT_INODE])
        # `order` grows while it is walked: an entry's place in it is its inode.
        for position, node in enumerate(order):
            if below := self.children.get(node):
                order.extend(below[name] for name in sorted(below))
                parents.extend([position + 1] * len(below))
        return TreeContent(self, order, parents)

    def blobs_of(self, nodes: Sequence[int]) -> tuple[dict[int, int], tuple[BlobSpec, ...]]:
        """The blobs that these nodes lie in, in the order they were added, and the place of each by its number."""
        used = {self.blob[node] for node in nodes if self.kinds[node] == EntryKind.FILE}
        kept = [(number, spec) for spec, number in self._blobs.items() if number in used]
        places = {number: place for place, (number, _) in enumerate(kept)}
        return places, tuple(spec for _, spec in kept)

    def _add(
        self,
        kind: EntryKind,
        parent: int,
        name: bytes,
        mtime_s: int,
        blob: int = -1,
        offset: int = 0,
        length: int = 0,
        executable: bool = False,
    ) -> int:
        node = len(self.kinds)
        self.kinds.append(kind)
        self.names.append(name)
        self.parents.append(parent)
        self.mtimes.append(mtime_s)
        self.blob.append(blob)
        self.offsets.append(offset)
        self.lengths.append(length)
        self.executable.append(executable)
        self.children[parent][name] = node
        return node


def build(files: Iterable[TreeFile | TreeSymlink]) -> TreeContent:
    """A tree of exactly these. Raises: UnsupportedModelError when a path is both file and directory, or named twice."""
    builder = TreeBuilder()
    for file in files:
        directory = builder.ROOT
        *parents, name = file.path.encode().split(b"/")
        for parent in parents:
            below = builder.children[directory].get(parent)
            directory = builder.add_directory(directory, parent) if below is None else below
            if builder.kinds[directory] != EntryKind.DIRECTORY:
                raise UnsupportedModelError(
                    f"the model has {builder.path(directory)!r} as a file, and {file.path!r} below it", path=file.path
                )
        if name in builder.children[directory]:
            raise UnsupportedModelError(f"the model has two entries named {file.path!r}", path=file.path)
        if isinstance(file, TreeSymlink):
            builder.add_symlink(directory, name, file.target.encode(), file.mtime_s)
            continue
        check_extent(file.path, file.blob, file.offset, file.length)
        blob = builder.add_blob(file.blob)
        builder.add_file(directory, name, blob, file.offset, file.length, file.mtime_s, file.executable)
    return builder.finish()


def check_extent(path: str, blob: BlobSpec, offset: int, length: int) -> None:
    """Raises: UnsupportedModelError for a file that does not lie in its blob."""
    if offset < 0 or length < 0 or offset + length > blob.content_bytes:
        raise UnsupportedModelError(
            f"file {path!r} lies outside its blob {blob.digest.short()}: bytes {offset} to {offset + length} of "
            f"{blob.content_bytes}",
            path=path,
        )


def checked(content: TreeContent) -> Iterator[Entry]:
    """The entries of `content`, while the invariants are checked that every reader of a tree relies on.

    Raises: ValueError naming the first broken one.
    """
    pending: deque[tuple[int, int]] = deque()  # directories with children to come: inode, how many
    expected_first, previous = 2, b""
    for position, entry in enumerate(content):
        inode = position + 1
        if entry.inode != inode or (inode == ROOT_INODE and entry.kind is not EntryKind.DIRECTORY):
            raise ValueError(f"entry {position} has inode {entry.inode} and is a {entry.kind.name}")
        if inode > ROOT_INODE:
            if not pending or entry.parent != pending[0][0]:
                raise ValueError(f"inode {inode}: not the child of {entry.parent}")
            parent, left = pending.popleft()
            if entry.name <= previous:
                raise ValueError(f"inode {inode}: not in order after {previous!r}")
            previous = entry.name if left > 1 else b""
            if left > 1:
                pending.appendleft((parent, left - 1))
        _check_entry(entry, content.blobs)
        if entry.kind is EntryKind.DIRECTORY and entry.child_count:
            if entry.first_child != expected_first:
                raise ValueError(f"inode {inode}: children begin at {entry.first_child}, expected {expected_first}")
            expected_first += entry.child_count
            pending.append((inode, entry.child_count))
        yield entry
    if pending or not len(content):
        raise ValueError("entries are missing")


def _check_entry(entry: Entry, blobs: Sequence[BlobSpec]) -> None:
    if entry.kind is EntryKind.FILE:
        if not 0 <= entry.blob < len(blobs):
            raise ValueError(f"inode {entry.inode}: no blob {entry.blob}")
        if entry.blob_offset + entry.size_bytes > blobs[entry.blob].content_bytes:
            raise ValueError(f"inode {entry.inode}: lies outside its blob")
    elif entry.kind is EntryKind.SYMLINK and (
        not 0 < len(entry.target) == entry.size_bytes < MAX_TARGET_BYTES or b"\0" in entry.target
    ):
        raise ValueError(f"inode {entry.inode}: {entry.size_bytes} bytes cannot be the target of a link")
