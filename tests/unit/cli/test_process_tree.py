"""When children of the process tree are started again."""

from __future__ import annotations

import itertools

from csi.cli.process_tree import restart_delay


def test_what_ran_for_a_while_is_started_again_at_once() -> None:
    assert restart_delay(60.0, 30.0) == 0.0


def test_what_ends_at_once_waits_longer_each_time_and_never_longer_than_half_a_minute() -> None:
    delays = list(itertools.accumulate(range(8), lambda last, _: restart_delay(0.2, last), initial=0.0))[1:]
    assert delays == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
