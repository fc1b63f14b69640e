"""The serialised tree: fixed-size records behind a header, read in place from a mapping.

A worker of any later version loads the file it finds and never recomputes it, because the kernel keeps inode
numbers and open handles across workers. Opening costs one hash over the file; a lookup is a binary search; a
million entries cost a million records of page cache and no Python objects.

    header   magic "MMTREE", version u16, counts, sum of file sizes, section offsets, sha256 of everything else, 88 bytes
    records  one per inode (inode = position + 1), 64 bytes
    blobs    one per blob: sizes, digest, encoding, origin, 96 bytes
    names    the bytes of all names, targets of symlinks and origins of blobs, one after another

All numbers little endian. A change of the layout is a new version; old versions stay readable while mounts that
were made with them may live. Version 1 had no symlinks, only IDENTITY blobs (80 bytes) and no sums in its header.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from collections.abc import Iterator

from csi.errors import ContentError
from csi.oci.digest import Digest
from csi.tree.model import BlobSpec, Encoding, Entry, EntryKind, TreeContent, checked

VERSION = 2
_MAGIC = b"MMTREE"
_SHA256_BYTES = 32
_HEADER = struct.Struct("<6sHQQQQQQ32s")  # magic version entries blobs files total_bytes names_offset size sha256
_HEADER_V1 = struct.Struct("<6sHQQQQ32s8x")  # magic version entries blobs names_offset size sha256
_RECORD = struct.Struct("<IIIHBBqQiIQIIQ")
# parent name_offset_low name_offset_high name_len kind executable mtime size blob pad offset first n_children pad
# offset: of a file, in its decoded blob; of a symlink, of its target in the names
_BLOB = struct.Struct("<QQQHBB4x64s")  # size decoded_size origin_offset origin_len digest_algorithm encoding digest
_BLOB_V1 = struct.Struct("<QB7x64s")  # size digest_algorithm digest
_ALGORITHMS = {1: "sha256", 2: "sha512"}
_ALGORITHM_CODES = {name: code for code, name in _ALGORITHMS.items()}


def dump(content: TreeContent) -> bytes:
    """The bytes of a tree file. Same content, same bytes."""
    names = bytearray()
    records = bytearray()
    files = total_bytes = 0
    for entry in checked(content):
        offset = entry.blob_offset
        if entry.kind is EntryKind.FILE:
            files += 1
            total_bytes += entry.size_bytes
        elif entry.kind is EntryKind.SYMLINK:
            offset = len(names)
            names += entry.target
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
            offset,
            entry.first_child,
            entry.child_count,
            0,
        )
        names += entry.name
    blobs = bytearray()
    for blob in content.blobs:
        origin = blob.origin.encode()
        blobs += _BLOB.pack(
            blob.size_bytes,
            blob.content_bytes,
            len(names),
            len(origin),
            _ALGORITHM_CODES[blob.digest.algorithm],
            blob.encoding,
            bytes.fromhex(blob.digest.hex),
        )
        names += origin
    names_offset = _HEADER.size + len(records) + len(blobs)
    header = _HEADER.pack(
        _MAGIC,
        VERSION,
        len(content),
        len(content.blobs),
        files,
        total_bytes,
        names_offset,
        names_offset + len(names),
        bytes(_SHA256_BYTES),
    )[:-_SHA256_BYTES]
    digest = hashlib.sha256(header)
    for part in (records, blobs, names):
        digest.update(part)
    return b"".join((header, digest.digest(), records, blobs, names))


class Tree:
    """A tree file in use. Inodes are ints from 1 (the root) to `len(tree)`; all methods are pure look-ups.

    `files` is how many files there are, `total_bytes` the sum of their sizes.
    """

    def __init__(self, data: bytes | mmap.mmap) -> None:
        """Raises: ContentError for a version this one does not know, a damaged or a foreign file."""
        self._view = view = memoryview(data)
        if len(view) < _HEADER.size:
            raise ContentError(f"tree file has {len(view)} bytes, fewer than its header; publish the model again")
        magic, version = struct.unpack_from("<6sH", view)
        if magic != _MAGIC or version not in (1, VERSION):
            raise ContentError(f"not a tree file of version {VERSION} or 1 (magic {magic!r}, version {version})")
        blob_size = _BLOB.size
        if version == VERSION:
            self._records_offset = _HEADER.size
            _, _, entries, blobs, self.files, self.total_bytes, names_offset, size, digest = _HEADER.unpack_from(view)
            actual = hashlib.sha256(view[: _HEADER.size - _SHA256_BYTES])
        else:
            self._records_offset = _HEADER_V1.size
            _, _, entries, blobs, names_offset, size, digest = _HEADER_V1.unpack_from(view)
            actual = hashlib.sha256()
            blob_size = _BLOB_V1.size
        actual.update(view[self._records_offset :])
        expected_names = self._records_offset + entries * _RECORD.size + blobs * blob_size
        if size != len(view) or names_offset != expected_names or actual.digest() != digest:
            raise ContentError("the tree file is damaged (its checksum differs); publish the model again")
        self._count = int(entries)
        self._names_offset = int(names_offset)
        blob_at = self._blob if version == VERSION else self._blob_v1
        blobs_offset = names_offset - blobs * blob_size
        self.blobs = tuple(blob_at(offset) for offset in range(blobs_offset, names_offset, blob_size))
        if version == 1:
            sizes = [entry.size_bytes for _, entry in self.walk_files()]
            self.files, self.total_bytes = len(sizes), sum(sizes)

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
        (parent, low, high, name_length, kind, executable, mtime, size, blob, _, offset, first, children, _) = (
            _RECORD.unpack_from(self._view, self._records_offset + (inode - 1) * _RECORD.size)
        )
        name = self._text(high << 32 | low, name_length)
        target = b""
        if kind == EntryKind.SYMLINK:
            target, offset = self._text(offset, size), 0
        return Entry(
            inode, parent, EntryKind(kind), name, bool(executable), mtime, size, blob, offset, first, children, target
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

    def walk_files(self) -> Iterator[tuple[str, Entry]]:
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

    def _text(self, offset: int, length: int) -> bytes:
        """Of the names section."""
        start = self._names_offset + offset
        return bytes(self._view[start : start + length])

    def _blob(self, offset: int) -> BlobSpec:
        size, decoded, origin_offset, origin_length, algorithm, encoding, digest = _BLOB.unpack_from(self._view, offset)
        return BlobSpec(
            _digest(algorithm, digest),
            size,
            Encoding(encoding),
            decoded if encoding else None,
            self._text(origin_offset, origin_length).decode(),
        )

    def _blob_v1(self, offset: int) -> BlobSpec:
        size, algorithm, digest = _BLOB_V1.unpack_from(self._view, offset)
        return BlobSpec(_digest(algorithm, digest), size)


def _digest(code: int, value: bytes) -> Digest:
    algorithm = _ALGORITHMS[code]
    return Digest(algorithm, value[: 32 if algorithm == "sha256" else 64].hex())
