"""What lies on disk for one blob, in a directory named after its digest:

    map         header (64 bytes) and one byte per 4 MiB block, a `Mark`
    seg-00000   bytes of the blocks 0 to 15, allocated as a whole (posix_fallocate: writing into a hole costs four
    seg-00001   times the CPU), and so on
    data        the whole blob in one file: a link to what the store has proven, which nobody can write. It has the bytes of
                every segment that is not there
    index       of an archive layer: what is in it, see `csi.oci.archive.layer_index`
    decoded     of a layer that can only be decoded from its start: the result, complete when there is an index
    hashes      BLAKE3 of every block of `data`, 32 bytes each, and sha256 of all of them; made known to the mount after `data`.
                Every block is checked before it is read
    checked     the same of the mount's own segments, once the sha256 of all of them was right

The map is shared memory between the one writer and any number of readers. A block is marked after its bytes are
in the segment, so a process that dies at any instant loses at most unmarked blocks. A machine that dies may lose
page cache behind a mark, and between two mounts anything may happen to a file. So a writer that has the hashes of the
blocks takes every mark it finds for `KEPT` only, and checks the block before it is read; a writer that has none takes
only marks of this boot, and only while the blob is `FILLING`: the sha256 over the whole blob is still to come. That of a
`VERIFIED` blob is not, so without `checked` nothing of it counts.

All numbers little endian; a change of the layout is a new `VERSION` and another directory (see `csi.cache.paths`).
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from enum import IntEnum

from csi.cache.paths import VERSION
from csi.errors import CacheError
from csi.oci.digest import Digest

MAP_NAME = "map"
# The group is the store's, which links and removes; workers are others. Nobody but these reaches the directories above.
FILE_MODE = 0o644
SHARED_FROM_BYTES = 8 * 1024 * 1024
"""Blobs of so many bytes are shared between mounts. Of smaller ones each has its own: fetching costs no more than sharing."""
DATA_NAME = "data"
HASHES_NAME = "hashes"
CHECKED_NAME = "checked"
_HASH_BYTES = 32
_SEGMENT_PREFIX = "seg-"
_MAGIC = b"MMBLKMAP"
_HEADER = struct.Struct("<8sHHIQQBB14x16s")  # magic version pad block_bytes size blocks state generation boot_id
HEADER_BYTES = _HEADER.size
STATE_OFFSET = 32
GENERATION_OFFSET = 33
"""Moves on when the bytes of a segment are in another file than before: then readers open their files again."""


class BlobState(IntEnum):
    """How far a blob's verification is."""

    FILLING = 0
    VERIFIED = 1
    """Complete, and its sha256 is the descriptor's digest."""
    POISONED = 2
    """Complete, and its sha256 is not: no byte of it may be served."""


class Mark(IntEnum):
    """What is known of one block."""

    ABSENT = 0
    PRESENT = 1
    """Its bytes may be read."""
    KEPT = 2
    """Its bytes were there when the writer started, and are to be checked before anybody reads them."""


@dataclass(frozen=True, slots=True)
class MapHeader:
    """The fixed part of a block map."""

    size_bytes: int
    block_bytes: int
    blocks: int
    state: BlobState
    boot_id: bytes


def pack_header(header: MapHeader) -> bytes:
    """64 bytes."""
    return _HEADER.pack(
        _MAGIC, VERSION, 0, header.block_bytes, header.size_bytes, header.blocks, header.state, 0, header.boot_id
    )


def unpack_header(data: bytes | memoryview) -> MapHeader:
    """Raises: CacheError for a file that is not a block map of this version."""
    try:
        magic, version, _, block_bytes, size_bytes, blocks, state, _, boot_id = _HEADER.unpack_from(data)
        known_state = BlobState(state)
    except (struct.error, ValueError) as exc:
        raise CacheError("damaged block map") from exc
    if magic != _MAGIC or version != VERSION:
        raise CacheError(f"not a block map of version {VERSION}")
    return MapHeader(size_bytes, block_bytes, blocks, known_state, boot_id)


def pack_hashes(hashes: bytes) -> bytes:
    """The content of `hashes` and `checked`: damage of the file itself shows too."""
    return hashes + hashlib.sha256(hashes).digest()


def unpack_hashes(data: bytes, blocks: int) -> bytes | None:
    """None for anything but the hashes of so many blocks, whole."""
    hashes, own = data[: blocks * _HASH_BYTES], data[blocks * _HASH_BYTES :]
    return hashes if len(hashes) == blocks * _HASH_BYTES and own == hashlib.sha256(hashes).digest() else None


def segment_name(segment: int) -> str:
    """`seg-00012`."""
    return f"{_SEGMENT_PREFIX}{segment:05d}"


def is_segment(name: str) -> bool:
    """Whether a file of that name is one of a mount's own segments, or was."""
    return name.startswith(_SEGMENT_PREFIX)


def layer_index_path(digest: Digest) -> str:
    """The layer index of a blob, relative to the mount's area."""
    return f"{digest.path_name}/index"


def spool_path(digest: Digest, *, partial: bool = False) -> str:
    """The decoded form of a blob, relative to the mount's area; `partial` while it is being written."""
    return f"{digest.path_name}/decoded{'.part' if partial else ''}"
