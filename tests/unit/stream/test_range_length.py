"""How long a range is on connections of different speeds."""

from __future__ import annotations

import pytest

from csi.stream.blocks import BLOCK_BYTES
from csi.stream.range_length import LONGEST, SHORTEST, RangeLength


@pytest.mark.parametrize(
    ("bytes_per_s", "blocks"),
    [(10e3, SHORTEST), (10e6, SHORTEST), (45e6, SHORTEST), (70e6, 3), (100e6, 4), (200e6, LONGEST), (5e9, LONGEST)],
)
def test_a_range_is_what_a_connection_brings_in_a_fifth_of_a_second(bytes_per_s: float, blocks: int) -> None:
    length = RangeLength()
    for _ in range(60):
        length.observe(BLOCK_BYTES, BLOCK_BYTES / bytes_per_s)
    assert length.now == blocks


def test_the_first_ranges_are_the_shortest_and_short_blocks_say_nothing() -> None:
    length = RangeLength()
    for _ in range(60):
        length.observe(100, 0.0)
    assert length.now == SHORTEST


def test_a_connection_that_becomes_slow_is_asked_for_less() -> None:
    length = RangeLength()
    for seconds in [0.01] * 30 + [1.0] * 30:
        length.observe(BLOCK_BYTES, seconds)
    assert length.now == SHORTEST
