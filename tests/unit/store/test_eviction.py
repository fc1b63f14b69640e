"""What leaves the cache."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from csi.store.eviction import Disk, Entry, Kind, Limits, evict_for, room, to_evict

ROOMY = Disk(total_bytes=1_000_000, free_bytes=900_000)


def entry(name: str, size: int = 10, last_used: float = 0, *, in_use: bool = False, pinned: bool = False) -> Entry:
    return Entry(Kind.BLOB, name, size, last_used, in_use, pinned)


def test_the_least_recently_used_leaves_first_and_only_as_much_as_needed() -> None:
    entries = [entry("new", last_used=3), entry("old", last_used=1), entry("middle", last_used=2)]
    assert [chosen.name for chosen in to_evict(entries, 15)] == ["old", "middle"]
    assert to_evict(entries, 0) == []


def test_what_is_in_use_or_pinned_never_leaves() -> None:
    entries = [
        entry("used", last_used=1, in_use=True),
        entry("pinned", last_used=2, pinned=True),
        entry("other", 10, 3),
    ]
    assert [chosen.name for chosen in to_evict(entries, 1000)] == ["other"]


def test_nothing_leaves_while_there_is_room_and_then_down_to_the_low_watermark() -> None:
    limits = Limits(max_bytes=100, min_free=0.1, low=0.8)
    entries = [entry(str(number), 10, number) for number in range(9)]
    assert evict_for(limits, ROOMY, 90, 10, entries) == []
    assert len(evict_for(limits, ROOMY, 90, 20, entries)) == 3, "10 too many, and 20 to the watermark"


def test_the_floor_counts_even_without_a_limit() -> None:
    disk = Disk(total_bytes=1000, free_bytes=170)
    assert room(Limits(min_free=0.16), disk, 500) == 10
    assert room(Limits(min_free=0.16, max_bytes=505), disk, 500) == 5
    assert room(Limits(min_free=0.18), disk, 0) == -10


_entries = st.lists(
    st.builds(
        Entry,
        st.sampled_from(Kind),
        st.text("abc", min_size=1, max_size=3),
        st.integers(0, 100),
        st.floats(0, 100),
        st.booleans(),
        st.booleans(),
    ),
    max_size=20,
)


@given(_entries, st.integers(0, 500))
def test_enough_leaves_or_all_that_may(entries: list[Entry], needed: int) -> None:
    chosen = to_evict(entries, needed)
    assert not any(one.in_use or one.pinned for one in chosen)
    freed = sum(one.size_bytes for one in chosen)
    may_leave = [one for one in entries if not (one.in_use or one.pinned)]
    assert freed >= needed or len(chosen) == len(may_leave)
    if chosen:
        assert freed - chosen[-1].size_bytes < needed, "the last one was needed too"
