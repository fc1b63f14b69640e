"""From the files of a model to a tree: directories made up, order fixed, conflicts refused.

The order decides the inode numbers: breadth first, names in byte order within a directory, so that the children
of a directory are neighbours. Same files in, same tree out, on every node and version.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import pairwise

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


@dataclass(frozen=True, slots=True)
class TreeContent:
    """Everything a tree file holds: `entries[i].inode == i + 1`."""

    entries: tuple[Entry, ...]
    blobs: tuple[BlobSpec, ...]


@dataclass(slots=True)
class _Directory:
    parent: int = ROOT_INODE
    children: dict[bytes, _Directory | TreeFile | TreeSymlink] = field(default_factory=dict)


def build(files: Iterable[TreeFile | TreeSymlink]) -> TreeContent:
    """Raises: UnsupportedModelError when a path is both file and directory, or named twice."""
    root = _Directory()
    blobs: dict[BlobSpec, int] = {}
    for file in files:
        _insert(root, file)
        if isinstance(file, TreeFile):
            blobs.setdefault(file.blob, len(blobs))
    entries: list[Entry] = []
    queue: list[tuple[bytes, int, _Directory | TreeFile | TreeSymlink]] = [(b"", ROOT_INODE, root)]
    # `queue` grows while it is walked: an entry's place in it is its inode.
    for position, (name, parent, node) in enumerate(queue):
        inode = position + 1
        if isinstance(node, TreeFile):
            entries.append(
                Entry(
                    inode,
                    parent,
                    EntryKind.FILE,
                    name,
                    node.executable,
                    node.mtime_s,
                    node.length,
                    blobs[node.blob],
                    node.offset,
                )
            )
            continue
        if isinstance(node, TreeSymlink):
            target = node.target.encode()
            entries.append(
                Entry(
                    inode,
                    parent,
                    EntryKind.SYMLINK,
                    name,
                    mtime_s=node.mtime_s,
                    size_bytes=len(target),
                    target=target,
                )
            )
            continue
        entries.append(
            Entry(
                inode,
                parent,
                EntryKind.DIRECTORY,
                name,
                first_child=len(queue) + 1,
                child_count=len(node.children),
            )
        )
        queue.extend((child, inode, node.children[child]) for child in sorted(node.children))
    return TreeContent(tuple(entries), tuple(blobs))


def _insert(root: _Directory, file: TreeFile | TreeSymlink) -> None:
    if isinstance(file, TreeFile) and (
        file.offset < 0 or file.length < 0 or file.offset + file.length > file.blob.content_bytes
    ):
        raise UnsupportedModelError(
            f"file {file.path!r} lies outside its blob {file.blob.digest.short()}: bytes {file.offset} to "
            f"{file.offset + file.length} of {file.blob.content_bytes}",
            path=file.path,
        )
    directory = root
    *parents, name = file.path.encode().split(b"/")
    for parent in parents:
        below = directory.children.setdefault(parent, _Directory())
        if not isinstance(below, _Directory):
            raise UnsupportedModelError(
                f"the model has {below.path!r} as a file, and {file.path!r} below it; it must be packed again",
                path=file.path,
            )
        directory = below
    if name in directory.children:
        raise UnsupportedModelError(f"the model has two entries named {file.path!r}; pack it again", path=file.path)
    directory.children[name] = file


def check(content: TreeContent) -> None:
    """The invariants every reader of a tree relies on. Raises: ValueError naming the first broken one."""
    count = len(content.entries)
    if not count or content.entries[0].kind is not EntryKind.DIRECTORY:
        raise ValueError("the first entry must be the root directory")
    for position, entry in enumerate(content.entries):
        if entry.inode != position + 1:
            raise ValueError(f"entry {position} has inode {entry.inode}")
        if not 1 <= entry.parent <= max(1, position):
            raise ValueError(f"inode {entry.inode}: parent {entry.parent} does not come before it")
        if entry.kind is EntryKind.FILE:
            if not 0 <= entry.blob < len(content.blobs):
                raise ValueError(f"inode {entry.inode}: no blob {entry.blob}")
            if entry.blob_offset + entry.size_bytes > content.blobs[entry.blob].content_bytes:
                raise ValueError(f"inode {entry.inode}: lies outside its blob")
            continue
        if entry.kind is EntryKind.SYMLINK:
            if not 0 < len(entry.target) == entry.size_bytes < MAX_TARGET_BYTES or b"\0" in entry.target:
                raise ValueError(f"inode {entry.inode}: {entry.size_bytes} bytes cannot be the target of a link")
            continue
        last_child = entry.first_child + entry.child_count - 1
        if entry.child_count and not entry.inode < entry.first_child <= last_child <= count:
            raise ValueError(f"inode {entry.inode}: children outside the tree")
        children = content.entries[entry.first_child - 1 : last_child]
        if any(a.name >= b.name for a, b in pairwise(children)):
            raise ValueError(f"inode {entry.inode}: children not in order")
