"""How many ranges are fetched at once."""

from __future__ import annotations

import pytest

from csi.stream.width import Width


def settle(width: Width, rate_of: object, windows: int = 20) -> int:
    assert callable(rate_of)
    for _ in range(windows):
        width.observe(rate_of(width.now))
    return width.now


def test_it_grows_as_long_as_that_brings_something() -> None:
    assert settle(Width(4, 16), lambda width: width * 10.0) == 16
    assert settle(Width(4, 16), lambda width: min(width, 9) * 10.0) == 9


def test_what_brings_nothing_is_taken_back_and_left_for_a_while() -> None:
    width = Width(4, 16)
    seen = []
    for _ in range(20):
        seen.append(width.now)
        width.observe(100.0)
    assert seen == [4, 6] + [4] * 18


def test_it_is_tried_again_after_a_while() -> None:
    width = Width(4, 16)
    settle(width, lambda now: 100.0, 3)
    assert settle(width, lambda now: now * 100.0, 60) == 16


def test_a_try_that_was_interrupted_says_nothing() -> None:
    width = Width(4, 16)
    assert width.observe(100.0) == 6
    width.interrupted()
    assert width.now == 4
    assert width.observe(100.0) == 6, "the next window tries again"


@pytest.mark.parametrize(("first", "least"), [(1, 1), (4, 2)])
def test_a_registry_that_refuses_gets_less_and_never_nothing(first: int, least: int) -> None:
    width = Width(first, 16)
    settle(width, lambda now: now * 10.0)
    for _ in range(6):
        width.refused()
    assert width.now == least
    seen = [width.observe(now * 10.0) for now in range(10)]
    assert seen[-1] == first, "what it was at first comes back by and by, more only after a while"
    assert max(seen) == first


def test_ranges_that_wait_for_their_first_byte_do_not_count() -> None:
    width = Width(4, 16)
    for _ in range(30):
        width.waited(0.002)
        width.transferred(0.1)
    assert width.ranges == width.now == 4, "next to nothing is waited for"
    for _ in range(30):
        width.waited(0.1)
    assert width.ranges == 8, "at any moment half of them wait"
    width.transferred(0.0)
    assert width.ranges <= 16
    for _ in range(30):
        width.waited(10.0)
    assert width.ranges == 16, "never more than there may be"
    width.refused()
    assert width.now == 2
