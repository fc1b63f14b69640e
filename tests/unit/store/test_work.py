"""What the store does first."""

from __future__ import annotations

from csi.store.work import Urgency, WorkQueue


def test_the_most_urgent_comes_first_and_equals_in_turn() -> None:
    done: list[str] = []
    work = WorkQueue()

    def verify(left: int) -> None:
        done.append(f"verify {left}")
        if left == 2:
            work.put(Urgency.PROMOTE, lambda: done.append("promote late"))
        if left:
            work.put(Urgency.VERIFY, lambda: verify(left - 1))

    work.put(Urgency.CLEAN_UP, lambda: done.append("clean"))
    work.put(Urgency.VERIFY, lambda: verify(3))
    work.put(Urgency.PROMOTE, lambda: done.append("promote 1"))
    work.put(Urgency.PROMOTE, lambda: done.append("promote 2"))
    work.put(Urgency.PROVE_AGAIN, lambda: done.append("again"))
    for _ in range(9):
        work.get()()
    assert done == [
        "again",
        "promote 1",
        "promote 2",
        "verify 3",
        "verify 2",
        "promote late",
        "verify 1",
        "verify 0",
        "clean",
    ]
