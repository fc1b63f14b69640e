"""Whether a child still answers, and what is done when it does not: it goes on when somebody has stopped it, it is waited for
while it works or waits for a disk, and one that is stuck is killed, for another to take its place.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from enum import Enum, auto
from pathlib import Path
from typing import NamedTuple

from csi.control import wire
from csi.errors import ControlError
from csi.supervisor.child import Child

log = logging.getLogger(__name__)

_BEAT_S = 2.0
_PATIENCE_S = 1.0
_NEXT_BEAT_S = 0.5
"""After a beat that was missed. So one is missed every 1.5 s."""

_MOST_CONTINUED = 3
_STUCK_BEATS = 2
_BUSY_BEATS = 8
_DISK_BEATS = 20


class Look(NamedTuple):
    """A process's main thread: `state` as in proc_pid_stat(5), and the CPU it has had, in clock ticks."""

    state: str
    ticks: int


class Remedy(Enum):
    """For a child that has missed a beat."""

    WAIT = auto()
    CONTINUE = auto()
    KILL = auto()


def remedy(before: Look | None, now: Look | None, missed: int) -> Remedy:
    """`missed` beats in a row, the last one just now; `before` is how the child looked at the one before. None: out of sight."""
    patience = _STUCK_BEATS
    if now is not None:
        if now.state == "T":  # and if it is stopped again and again, it is of no use
            return Remedy.CONTINUE if missed <= _MOST_CONTINUED else Remedy.KILL
        if now.state == "D":  # a new one would wait for the same disk, and this one cannot die before it has answered
            patience = _DISK_BEATS
        elif now.state == "R" or (before is not None and now.ticks != before.ticks):
            patience = _BUSY_BEATS
    return Remedy.KILL if missed >= patience else Remedy.WAIT


def look(pid: int) -> Look | None:
    """None when there is no such process."""
    with contextlib.suppress(OSError, IndexError):
        stat = Path(f"/proc/{pid}/task/{pid}/stat").read_text(encoding="ascii", errors="replace")
        after_name = stat.rpartition(")")[2].split()
        return Look(after_name[0], int(after_name[11]) + int(after_name[12]))
    return None


async def end_of(
    child: Child, on_hung: Callable[[str], None], on_beat: Callable[[wire.Message], Awaitable[None]] | None = None
) -> int:
    """Until it ends: its exit status. `on_hung` says what was done to one that did not answer, `on_beat` gets each answer to
    `ping`.
    """
    missed, seen = 0, None
    while True:
        done, _ = await asyncio.wait([child.exited], timeout=_NEXT_BEAT_S if missed else _BEAT_S)
        if done:
            return child.exited.result()
        try:
            answer, _ = await child.call("ping", _PATIENCE_S)
        except ControlError:
            missed += 1
            before, seen = seen, look(child.visible_pid)
            _help(child, remedy(before, seen, missed), missed, on_hung)
        else:
            missed, seen = 0, None
            if on_beat is not None:
                await on_beat(answer)


def _help(child: Child, what: Remedy, missed: int, on_hung: Callable[[str], None]) -> None:
    if what is Remedy.WAIT or not child.alive:
        return
    named = f"{child.name} {child.pid}"
    if what is Remedy.CONTINUE:
        log.warning("%s was stopped from outside; it is continued", named)
        child.resume()
        on_hung(f"{named} was stopped from outside (SIGSTOP), and is continued")
    else:
        log.error("%s does not answer; it is killed", named)
        child.kill()
        on_hung(f"{named} answered {missed} times in a row nothing, and is killed")
