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


class EntryKind(IntEnum):
    """What an inode is."""

    DIRECTORY = 1
    FILE = 2


@dataclass(frozen=True, slots=True)
class BlobSpec:
    """A blob that files lie in."""

    digest: Digest
    size_bytes: int


@dataclass(frozen=True, slots=True)
class TreeFile:
    """A file to be: `length` bytes from `offset` of `blob`. `path` is relative, checked by `csi.oci.paths`."""

    path: str
    blob: BlobSpec
    offset: int
    length: int
    mtime_s: int = 0
    executable: bool = False


@dataclass(frozen=True, slots=True)
class Entry:
    """One inode. `blob` is an index into the tree's blobs, -1 for a directory; children are a range of inodes."""

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


@dataclass(frozen=True, slots=True)
class TreeContent:
    """Everything a tree file holds: `entries[i].inode == i + 1`."""

    entries: tuple[Entry, ...]
    blobs: tuple[BlobSpec, ...]


@dataclass(slots=True)
class _Directory:
    parent: int = ROOT_INODE
    children: dict[bytes, _Directory | TreeFile] = field(default_factory=dict)


def build(files: Iterable[TreeFile]) -> TreeContent:
    """Raises: UnsupportedModelError when a path is both file and directory, or named twice."""
    root = _Directory()
    blobs: dict[BlobSpec, int] = {}
    for file in files:
        _insert(root, file)
        blobs.setdefault(file.blob, len(blobs))
    entries: list[Entry] = []
    queue: list[tuple[bytes, int, _Directory | TreeFile]] = [(b"", ROOT_INODE, root)]
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


def _insert(root: _Directory, file: TreeFile) -> None:
    if file.offset < 0 or file.length < 0 or file.offset + file.length > file.blob.size_bytes:
        raise UnsupportedModelError(
            f"file {file.path!r} lies outside its blob {file.blob.digest.short()}: bytes {file.offset} to "
            f"{file.offset + file.length} of {file.blob.size_bytes}",
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
            if entry.blob_offset + entry.size_bytes > content.blobs[entry.blob].size_bytes:
                raise ValueError(f"inode {entry.inode}: lies outside its blob")
            continue
        last_child = entry.first_child + entry.child_count - 1
        if entry.child_count and not entry.inode < entry.first_child <= last_child <= count:
            raise ValueError(f"inode {entry.inode}: children outside the tree")
        children = content.entries[entry.first_child - 1 : last_child]
        if any(a.name >= b.name for a, b in pairwise(children)):
            raise ValueError(f"inode {entry.inode}: children not in order")
