"""One budget for all mounts of a node."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from csi.supervisor.memory import LEAST, MOST, MemoryBudget, share_within

MIB = 1024 * 1024


def test_the_first_mounts_have_all_they_can_use_and_later_ones_share_the_rest() -> None:
    budget = MemoryBudget(1024 * MIB)
    shares = [budget.share_of(f"mount {number}") for number in range(20)]
    assert shares[:4] == [MOST] * 4
    assert shares[-1] == LEAST
    assert all(one.size_bytes >= other.size_bytes for one, other in itertools.pairwise(shares))


def test_a_mount_keeps_its_share_until_it_gives_it_back() -> None:
    budget = MemoryBudget(2 * MOST.size_bytes)
    first = budget.share_of("a")
    budget.share_of("b")
    assert budget.share_of("a") is first
    given_bytes = budget.given_bytes
    budget.give_back("a")
    budget.give_back("a")
    assert budget.given_bytes == given_bytes - first.size_bytes
    assert budget.share_of("c") == share_within((budget.size_bytes - given_bytes + first.size_bytes) // 2)


@given(st.integers(0, 4096 * MIB), st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=60))
def test_the_budget_is_passed_by_no_more_than_the_least_that_mounts_need(
    size_bytes: int, steps: list[tuple[int, bool]]
) -> None:
    budget = MemoryBudget(size_bytes)
    live: set[int] = set()
    for mount, comes in steps:
        if comes:
            share = budget.share_of(str(mount))
            assert LEAST.size_bytes <= share.size_bytes <= MOST.size_bytes
            live.add(mount)
        else:
            budget.give_back(str(mount))
            live.discard(mount)
        assert budget.given_bytes <= size_bytes + len(live) * LEAST.size_bytes
