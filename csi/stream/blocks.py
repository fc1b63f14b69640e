"""Block arithmetic. A blob is cut into blocks of 4 MiB (the last one short); a block is the unit that is fetched,
checked, marked present and waited for.

Source of the size: one digest per 4 MiB keeps an index of 1 TB below 10 MB, and a cold 4 MiB costs a few
milliseconds more than a cold 128 KiB on any link worth streaming over.
"""

from __future__ import annotations

BLOCK_BYTES = 4 * 1024 * 1024
PIECE_BYTES = 512 * 1024
"""What a block passes through memory in where it is hashed. Measured: in whole blocks everything costs half as much again, in
pieces of 256 KiB BLAKE3 costs twice as much.
"""
SEGMENT_BLOCKS = 16
SEGMENT_BYTES = SEGMENT_BLOCKS * BLOCK_BYTES
"""64 MiB: what is allocated at once, so that reading 8 bytes of a huge model does not allocate all of it."""


def block_count(size_bytes: int) -> int:
    """Blocks of a blob; 0 for an empty one."""
    return -(-size_bytes // BLOCK_BYTES)


def block_length(size_bytes: int, block: int) -> int:
    """Bytes in that block (only the last may be short)."""
    return min(BLOCK_BYTES, size_bytes - block * BLOCK_BYTES)


def blocks_of(offset: int, length: int) -> range:
    """The blocks that bytes `offset` to `offset + length` touch; empty for length 0."""
    if length <= 0:
        return range(0)
    return range(offset // BLOCK_BYTES, (offset + length - 1) // BLOCK_BYTES + 1)


def segment_of(block: int) -> tuple[int, int]:
    """The segment a block lies in, and its byte offset there."""
    return block // SEGMENT_BLOCKS, block % SEGMENT_BLOCKS * BLOCK_BYTES


def segment_length(size_bytes: int, segment: int) -> int:
    """Bytes of that segment (only the last may be short)."""
    return min(SEGMENT_BYTES, size_bytes - segment * SEGMENT_BYTES)
