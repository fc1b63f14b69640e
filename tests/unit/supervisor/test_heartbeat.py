"""What is done with a child that does not answer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from support.hang import hung

from csi.supervisor.heartbeat import Look, Remedy, look, remedy

ASLEEP, STOPPED, TRACED, AT_THE_DISK, BUSY = (Look(state, 5) for state in "STtDR")


def remedies(looks: Callable[[int], Look | None]) -> list[Remedy]:
    """Until the child is killed; `looks(missed)`."""
    found: list[Remedy] = []
    while not found or found[-1] is not Remedy.KILL:
        missed = len(found) + 1
        found.append(remedy(looks(missed - 1) if missed > 1 else None, looks(missed), missed))
        assert missed < 100
    return found


@pytest.mark.parametrize("stuck", [ASLEEP, TRACED, None])
def test_one_that_is_stuck_or_out_of_sight_is_killed_at_the_second_beat_that_it_misses(stuck: Look | None) -> None:
    assert remedies(lambda missed: stuck) == [Remedy.WAIT, Remedy.KILL]


def test_one_that_is_stopped_is_continued_at_once_but_not_for_ever() -> None:
    assert remedies(lambda missed: STOPPED) == [Remedy.CONTINUE] * 3 + [Remedy.KILL]


def test_one_that_works_or_waits_for_its_turn_has_more_time_and_one_that_waits_for_the_disk_most() -> None:
    working = remedies(lambda missed: Look("S", missed))
    assert working == remedies(lambda missed: BUSY)
    assert 2 < len(working) < len(remedies(lambda missed: AT_THE_DISK))
    assert set(working[:-1]) == {Remedy.WAIT}


def test_what_it_does_now_counts_and_not_what_it_did_before() -> None:
    assert remedy(BUSY, STOPPED, 5) is Remedy.KILL
    assert remedy(STOPPED, BUSY, 5) is Remedy.WAIT
    assert remedy(AT_THE_DISK, ASLEEP, 5) is Remedy.KILL


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def comes(pid: int, *states: str) -> None:
    deadline = time.monotonic() + 10
    while (seen := look(pid)) is None or seen.state not in states:
        assert time.monotonic() < deadline, seen
        time.sleep(0.01)


def test_a_look_at_a_process_tells_whether_it_sleeps_is_stopped_or_hangs(sleeper: subprocess.Popen[bytes]) -> None:
    comes(sleeper.pid, "S")
    os.kill(sleeper.pid, signal.SIGSTOP)
    comes(sleeper.pid, "T")
    os.kill(sleeper.pid, signal.SIGCONT)
    comes(sleeper.pid, "S")
    with hung(sleeper.pid):
        comes(sleeper.pid, "t")
        os.kill(sleeper.pid, signal.SIGCONT)
        time.sleep(0.1)
        comes(sleeper.pid, "t")
    comes(sleeper.pid, "S")


def test_a_look_at_a_busy_process_sees_its_ticks_move_and_at_none_nothing() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        comes(process.pid, "R")
        before = look(process.pid)
        deadline = time.monotonic() + 20
        while before is not None and (now := look(process.pid)) is not None and now.ticks == before.ticks:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.kill()
    assert look(process.pid) is None
    assert look(0) is None
