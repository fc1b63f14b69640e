"""Blocks and segments cover a blob exactly."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from csi.stream import blocks

sizes = st.integers(0, 5 * blocks.SEGMENT_BYTES)


@given(sizes)
def test_blocks_add_up_to_the_blob(size: int) -> None:
    count = blocks.block_count(size)
    assert sum(blocks.block_length(size, block) for block in range(count)) == size
    segments = -(-size // blocks.SEGMENT_BYTES)
    assert sum(blocks.segment_length(size, segment) for segment in range(segments)) == size


@given(st.integers(0, 1 << 45), st.integers(0, 1 << 27))
def test_the_blocks_of_a_range_cover_it_and_no_more(offset: int, length: int) -> None:
    covered = blocks.blocks_of(offset, length)
    if length == 0:
        assert not covered
        return
    assert covered.start * blocks.BLOCK_BYTES <= offset < (covered.start + 1) * blocks.BLOCK_BYTES
    assert (covered.stop - 1) * blocks.BLOCK_BYTES < offset + length <= covered.stop * blocks.BLOCK_BYTES


@given(st.integers(0, 1 << 20))
def test_a_block_lies_in_its_segment(block: int) -> None:
    segment, offset = blocks.segment_of(block)
    assert segment * blocks.SEGMENT_BYTES + offset == block * blocks.BLOCK_BYTES
    assert offset + blocks.BLOCK_BYTES <= blocks.SEGMENT_BYTES
