"""What the suite does to a node."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from survival.conftest import Stage

CHILDREN = ("worker", "fetcher", "store")


def kill(stage: Stage, role: str) -> None:
    """SIGKILL to a worker, fetcher or store; returns when its successor is there."""
    killed = shoot(stage, role)
    if killed:
        stage.node.wait_until(f"another {role}", lambda: another(stage, role, killed))


def shoot(stage: Stage, role: str) -> int:
    """The same without waiting: the pid, 0 when there is none at the moment."""
    with contextlib.suppress(ProcessLookupError, IndexError):
        pid = stage.node.process(role)
        os.kill(pid, signal.SIGKILL)
        return pid
    return 0


def shoot_nursery(stage: Stage) -> None:
    """SIGKILL to the process that workers, fetchers and the store are forked from."""
    for pid, command in stage.node.container("supervisor").processes().items():
        if "nursery" in command:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def another(stage: Stage, role: str, before: int) -> bool:
    """Whether a process other than that one has the role now."""
    try:
        return stage.node.process(role) != before
    except (ProcessLookupError, IndexError):
        return False


@contextlib.contextmanager
def stopped(pids: Sequence[int], for_s: float) -> Iterator[None]:
    """SIGSTOP, the block, and SIGCONT when that much time has passed, whether the block is done or not."""

    def go_on() -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    timer = threading.Timer(for_s, go_on)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    timer.start()
    try:
        yield
    finally:
        timer.join()


def replace(stage: Stage, component: str, grace_s: float = 30.0) -> None:
    """SIGTERM, and a new container when the old one is gone."""
    stage.node.container(component).stop(grace_s)
    stage.node.start(component)


def restart_supervisor(stage: Stage) -> None:
    """SIGKILL of its whole container, with every worker in it; kubelet starts another, and publishes again in a minute:
    here at once.
    """
    stage.node.restart("supervisor")
    stage.node.republish()


def at_random(stage: Stage) -> dict[str, Callable[[], object]]:
    """Everything that may happen at any time, by name."""
    events: dict[str, Callable[[], object]] = {f"SIGKILL {role}": partial(shoot, stage, role) for role in CHILDREN}
    events["SIGKILL nursery"] = partial(shoot_nursery, stage)
    for component in ("keeper", "node"):
        events[f"SIGKILL {component}"] = partial(stage.node.restart, component)
    events["SIGKILL supervisor"] = partial(restart_supervisor, stage)
    return events
