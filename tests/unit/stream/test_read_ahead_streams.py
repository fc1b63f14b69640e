"""What is fetched ahead of readers, and what is not."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from csi.stream.readahead import FIRST_WINDOW_BYTES, MAX_WINDOW_BYTES, ReadAhead

MIB = 1024 * 1024
GIB = 1024 * MIB


def test_a_sequential_reader_gets_the_file_ahead_once_each_byte() -> None:
    size = 600 * MIB
    read_ahead = ReadAhead(size)
    asked: list[range] = []
    for offset in range(0, size, MIB):
        if (wanted := read_ahead.observe(offset, MIB, missed=offset % (32 * MIB) == 0)) is not None:
            assert wanted.start >= offset + MIB
            asked.append(wanted)
    assert all(a.stop <= b.start for a, b in pairwise(asked))
    assert asked[-1].stop == size
    assert len(asked) < 60, "a message per window, not per read"


def test_a_starving_reader_gets_a_larger_window() -> None:
    read_ahead = ReadAhead(10 * GIB)
    windows = []
    for number in range(8):
        wanted = read_ahead.observe(number * MIB, MIB, missed=True)
        if wanted is not None:
            windows.append(wanted.stop - (number + 1) * MIB)
    assert windows[0] >= FIRST_WINDOW_BYTES
    assert windows[-1] == MAX_WINDOW_BYTES


def test_a_random_reader_gets_nothing() -> None:
    read_ahead = ReadAhead(100 * GIB)
    for number in range(1, 60):
        assert read_ahead.observe(number * 977 * MIB, 4096, missed=True) is None


def test_sixteen_readers_at_sixteen_offsets_are_sixteen_streams() -> None:
    read_ahead = ReadAhead(64 * GIB)
    asked: set[int] = set()
    for step in range(6):
        for reader in range(16):
            base = reader * 4 * GIB + GIB
            if (wanted := read_ahead.observe(base + step * MIB, MIB, missed=True)) is not None:
                assert base < wanted.start < base + GIB
                asked.add(reader)
    assert asked == set(range(16))


@given(
    st.integers(1, 1 << 40),
    st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(1, MIB), st.booleans()), max_size=50),
)
def test_what_is_asked_for_lies_in_the_file(size: int, reads: list[tuple[int, int, bool]]) -> None:
    read_ahead = ReadAhead(size)
    for offset, length, missed in reads:
        offset %= size
        wanted = read_ahead.observe(offset, min(length, size - offset), missed=missed)
        assert wanted is None or 0 <= wanted.start < wanted.stop <= size
