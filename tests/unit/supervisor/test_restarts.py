"""When the next process starts."""

from __future__ import annotations

import itertools

from csi.supervisor.restarts import Restarts


def test_one_that_is_killed_now_and_then_is_replaced_at_once() -> None:
    restarts = Restarts(soon_s=1.0, first_s=0.2, longest_s=5.0)
    for lived_s in [0.1, 0.1, 0.1, 2.0] * 20:
        restarts.note_death(lived_s)
        assert restarts.delay_s == 0


def test_those_that_end_of_their_start_come_more_and_more_seldom_until_one_lives() -> None:
    restarts = Restarts(soon_s=1.0, first_s=0.5, longest_s=30.0)
    delays = []
    for _ in range(50):
        restarts.note_death(0.2)
        delays.append(restarts.delay_s)
    assert delays[:10] == [0, 0, 0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0]
    assert all(later >= earlier for earlier, later in itertools.pairwise(delays))
    assert max(delays) == 30.0
    restarts.note_death(60.0)
    assert restarts.delay_s == 0
