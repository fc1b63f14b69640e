"""The serialised tree: fixed-size records behind a header, read in place from a mapping.

A worker of any later version loads the file it finds and never recomputes it, because the kernel keeps inode
numbers and open handles across workers. Opening costs one hash over the file; a lookup is a binary search; a
million entries cost a million records of page cache and no Python objects.

    header   magic "MMTREE", version u16, counts, section offsets, sha256 of everything after the header
    records  one per inode (inode = position + 1), 64 bytes
    blobs    one per blob: size, digest algorithm, digest, 80 bytes
    names    the bytes of all names, one after another

All numbers little endian. A change of the layout is a new version; old versions stay readable while mounts that
were made with them may live.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from collections.abc import Iterator

from csi.errors import ContentError
from csi.oci.digest import Digest
from csi.tree.model import BlobSpec, Entry, EntryKind, TreeContent, check

VERSION = 1
_MAGIC = b"MMTREE"
_HEADER = struct.Struct("<6sHQQQQ32s8x")  # magic version entries blobs names_offset size sha256
_RECORD = struct.Struct("<IIIHBBqQiIQIIQ")
# parent name_offset_low name_offset_high name_len kind executable mtime size blob pad blob_offset first n_children pad
_BLOB = struct.Struct("<QB7x64s")
_ALGORITHMS = {1: "sha256", 2: "sha512"}
_ALGORITHM_CODES = {name: code for code, name in _ALGORITHMS.items()}


def dump(content: TreeContent) -> bytes:
    """The bytes of a tree file. Same content, same bytes."""
    check(content)
    names = bytearray()
    records = bytearray()
    for entry in content.entries:
        records += _RECORD.pack(
            entry.parent,
            len(names) & 0xFFFFFFFF,
            len(names) >> 32,
            len(entry.name),
            entry.kind,
            entry.executable,
            entry.mtime_s,
            entry.size_bytes,
            entry.blob,
            0,
            entry.blob_offset,
            entry.first_child,
            entry.child_count,
            0,
        )
        names += entry.name
    blobs = b"".join(
        _BLOB.pack(blob.size_bytes, _ALGORITHM_CODES[blob.digest.algorithm], bytes.fromhex(blob.digest.hex))
        for blob in content.blobs
    )
    body = bytes(records) + blobs + bytes(names)
    names_offset = _HEADER.size + len(records) + len(blobs)
    header = _HEADER.pack(
        _MAGIC,
        VERSION,
        len(content.entries),
        len(content.blobs),
        names_offset,
        _HEADER.size + len(body),
        hashlib.sha256(body).digest(),
    )
    return header + body


class Tree:
    """A tree file in use. Inodes are ints from 1 (the root) to `len(tree)`; all methods are pure look-ups."""

    def __init__(self, data: bytes | mmap.mmap) -> None:
        """Raises: ContentError for another version, a damaged or a foreign file."""
        view = memoryview(data)
        if len(view) < _HEADER.size:
            raise ContentError(f"tree file has {len(view)} bytes, fewer than its header; publish the model again")
        magic, version, entries, blobs, names_offset, size, digest = _HEADER.unpack_from(view)
        if magic != _MAGIC or version != VERSION:
            raise ContentError(f"not a tree file of version {VERSION} (magic {magic!r}, version {version})")
        expected_names = _HEADER.size + entries * _RECORD.size + blobs * _BLOB.size
        if (
            size != len(view)
            or names_offset != expected_names
            or hashlib.sha256(view[_HEADER.size :]).digest() != digest
        ):
            raise ContentError("the tree file is damaged (its checksum differs); publish the model again")
        self._view = view
        self._count = int(entries)
        self._names_offset = int(names_offset)
        self.blobs = tuple(self._blob(position) for position in range(blobs))

    @classmethod
    def from_fd(cls, fd: int) -> Tree:
        """Map the file behind `fd`, which may be closed afterwards."""
        return cls(mmap.mmap(fd, os.fstat(fd).st_size, prot=mmap.PROT_READ))

    def __len__(self) -> int:
        return self._count

    def __contains__(self, inode: int) -> bool:
        return 1 <= inode <= self._count

    def entry(self, inode: int) -> Entry:
        """Raises: KeyError for an inode the tree does not have."""
        if inode not in self:
            raise KeyError(inode)
        (parent, low, high, name_length, kind, executable, mtime, size, blob, _, blob_offset, first, children, _) = (
            _RECORD.unpack_from(self._view, _HEADER.size + (inode - 1) * _RECORD.size)
        )
        start = self._names_offset + (high << 32 | low)
        name = bytes(self._view[start : start + name_length])
        return Entry(
            inode, parent, EntryKind(kind), name, bool(executable), mtime, size, blob, blob_offset, first, children
        )

    def lookup(self, parent: int, name: bytes) -> Entry | None:
        """The child of that name, None if there is none or `parent` is not a directory."""
        directory = self.entry(parent)
        low, high = directory.first_child, directory.first_child + directory.child_count
        while low < high:
            middle = (low + high) // 2
            candidate = self.entry(middle)
            if candidate.name == name:
                return candidate
            if candidate.name < name:
                low = middle + 1
            else:
                high = middle
        return None

    def children(self, inode: int, start: int = 0) -> Iterator[Entry]:
        """The children of a directory in name order, from the `start`-th on."""
        directory = self.entry(inode)
        for child in range(directory.first_child + start, directory.first_child + directory.child_count):
            yield self.entry(child)

    def files(self) -> Iterator[tuple[str, Entry]]:
        """Every file with its path, in inode order."""
        for inode in range(1, self._count + 1):
            entry = self.entry(inode)
            if entry.kind is EntryKind.FILE:
                yield self.path(inode), entry

    def path(self, inode: int) -> str:
        """The path of an inode, relative to the root; empty for the root."""
        parts = []
        while inode != 1:
            entry = self.entry(inode)
            parts.append(entry.name)
            inode = entry.parent
        return b"/".join(reversed(parts)).decode()

    @property
    def total_bytes(self) -> int:
        """The sizes of all files."""
        return sum(entry.size_bytes for _, entry in self.files())

    def _blob(self, position: int) -> BlobSpec:
        offset = _HEADER.size + self._count * _RECORD.size + position * _BLOB.size
        size, code, digest = _BLOB.unpack_from(self._view, offset)
        algorithm = _ALGORITHMS[code]
        length = 32 if algorithm == "sha256" else 64
        return BlobSpec(Digest(algorithm, digest[:length].hex()), size)
