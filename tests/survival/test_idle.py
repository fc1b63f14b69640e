"""Nobody reads, so that no mount has a worker: what happens meanwhile, readers must not see when they go on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from survival.conftest import Stage
from survival.events import restart_supervisor
from survival.test_upgrades import roll

pytestmark = [pytest.mark.fuse, pytest.mark.survival, pytest.mark.timeout(600)]

EVENTS: dict[str, Callable[[Stage], object]] = {
    "nothing": lambda stage: None,
    "SIGKILL keeper": lambda stage: stage.node.restart("keeper"),
    "SIGKILL supervisor": restart_supervisor,
    "upgrade of the supervisor": roll,
}


@pytest.mark.old_kernel
@pytest.mark.parametrize("event", EVENTS)
def test_something_happens_while_all_workers_idle(stage: Stage, event: str) -> None:
    with stage.event(f"all workers idle, {event}"), stage.readers.paused():
        stage.node.wait_until("every worker to end", lambda: all_idle(stage))
        EVENTS[event](stage)
        assert all_idle(stage), "nobody has asked for anything"


def all_idle(stage: Stage) -> bool:
    mounts = stage.node.supervisor.status(None)
    return all(mount["worker_resting"] for mount in mounts)
