"""Any process is killed at any moment, again and again. `--kills 1000` is the long form; `--seed` repeats a run."""

from __future__ import annotations

import random
import time

import pytest
from survival.conftest import Stage
from survival.events import at_random

pytestmark = [pytest.mark.fuse, pytest.mark.survival, pytest.mark.timeout(7200)]


@pytest.mark.old_kernel
def test_random_kills(stage: Stage, pytestconfig: pytest.Config) -> None:
    """A third of them in each case; as many again without RESEND."""
    kills, seed = pytestconfig.getoption("--kills") // 3, pytestconfig.getoption("--seed")
    chosen = random.Random(f"{seed} {stage.backend}")
    events = at_random(stage)
    done = []
    with stage.event(f"random kills ({kills})", f"seed {seed}"):
        for _ in range(kills):
            time.sleep(chosen.random() * 0.3)
            name = chosen.choice(sorted(events))
            done.append(name)
            events[name]()
            late = stage.readers.advance(60)
            assert not late, f"after {done[-5:]} nothing came any more to {late}\n{stage.node.logs()}"
    stage.node.wait_until("every process to be back", lambda: everybody_is_there(stage))


def everybody_is_there(stage: Stage) -> bool:
    mount = stage.node.status(stage.target)
    return bool(mount["worker_alive"] and mount["fetcher_alive"] and not mount["dead"])
