"""What mounts may still allocate, as the store keeps it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from csi.cache.allowance import LARGEST_GRANT_BYTES, Allowance
from csi.errors import CacheError
from csi.store.eviction import Entry, Kind
from csi.store.reserves import Reserves, share_of
from csi.stream.blocks import SEGMENT_BYTES


def area(name: str, size: int, *, in_use: bool = True) -> Entry:
    return Entry(Kind.AREA, name, size, 0.0, in_use)


def test_what_a_mount_allocates_comes_off_its_reserve() -> None:
    reserves = Reserves()
    reserves.tell("a", 10, [area("a", 100)])
    reserves.give("a", 90)
    assert reserves.total([area("a", 130), area("b", 7)]) == 70


def test_what_becomes_a_proven_blob_is_not_counted_again() -> None:
    reserves = Reserves()
    reserves.tell("a", 100, [area("a", 0)])
    assert reserves.total([area("a", 100)]) == 0
    assert reserves.total([area("a", 0)]) == 0
    assert reserves.total([area("a", 30)]) == 0


def test_a_new_fetcher_has_only_what_it_is_given() -> None:
    reserves = Reserves()
    reserves.tell("a", 100, [area("a", 0)])
    reserves.tell("a", 0, [area("a", 20)])
    reserves.give("a", 5)
    assert reserves.total([area("a", 20)]) == 5


def test_a_mount_that_has_ended_reserves_nothing() -> None:
    reserves = Reserves()
    for name in "ab":
        reserves.tell(name, 10, [])
    assert reserves.total([area("a", 0, in_use=False)]) == 0
    reserves.give("a", 10)
    assert reserves.total([area("a", 0), area("b", 0)]) == 0


def test_one_mount_gets_no_more_than_half_of_much_room_and_all_of_little() -> None:
    assert share_of(100 * SEGMENT_BYTES, 80 * SEGMENT_BYTES) == min(50 * SEGMENT_BYTES, LARGEST_GRANT_BYTES)
    assert share_of(100 * SEGMENT_BYTES, 3) == 3
    assert share_of(SEGMENT_BYTES, SEGMENT_BYTES) == SEGMENT_BYTES
    assert share_of(5, SEGMENT_BYTES) == 5
    assert share_of(-5, SEGMENT_BYTES) == 0


def test_an_allowance_gives_back_what_the_model_does_not_need_and_wants_the_rest_of_it() -> None:
    told: list[tuple[int, int]] = []
    needed: list[int | None] = [None]
    allowance = Allowance(lambda: told.append(allowance.settle(needed[0])))
    allowance.tell()
    allowance.add(1000)
    needed[0] = 300
    allowance.tell()
    allowance.take(200)
    allowance.landed(200)
    needed[0] = 150
    allowance.take(100)  # it is on its way to the disk
    try:
        allowance.take(1)
    except CacheError:
        allowance.tell()
    else:
        raise AssertionError("what was given back was taken")
    allowance.landed(100)
    needed[0] = 50
    allowance.tell()
    assert told == [(0, LARGEST_GRANT_BYTES), (300, 0), (300, 0), (100, 50), (0, 50)]


@given(st.lists(st.tuples(st.integers(0, 5000), st.booleans()), max_size=30), st.integers(1, 10_000))
def test_the_limit_is_never_passed_and_a_mount_that_asks_again_gets_all_there_is(
    steps: list[tuple[int, bool]], limit: int
) -> None:
    """Two mounts take turns in asking for what they need and allocating all they may."""
    reserves, sizes, left = Reserves(), {"a": 0, "b": 0}, {"a": 0, "b": 0}

    def entries() -> list[Entry]:
        return [area(name, size) for name, size in sizes.items()]

    for wanted, of_a in steps:
        name = "a" if of_a else "b"
        reserves.tell(name, left[name], entries())
        room = limit - sum(sizes.values()) - reserves.total(entries())
        given_ = share_of(room, wanted)
        reserves.give(name, given_)
        left[name] += given_
        assert sum(sizes.values()) + sum(left.values()) <= limit
        assert reserves.total(entries()) == sum(left.values())
        sizes[name] += left[name] // 2
        left[name] -= left[name] // 2
        assert reserves.total(entries()) == sum(left.values())
