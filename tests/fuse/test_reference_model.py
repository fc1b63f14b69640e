"""Random plans against a plain file: many processes read, in every way a program can, while the node's processes are killed,
its cache is damaged, evicted and shared, and its registries fail and lie. Every byte and errno is compared.

    MODELMOUNT_MODEL_SEEDS=1-40     which plans (default: two, other ones each day would hide what broke)
    MODELMOUNT_MODEL_STEPS=60       how long each is
    MODELMOUNT_MODEL_SHRINK=600     cut a plan that fails down, for at most so many seconds
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from support import model_plan
from support.model_plan import Plan
from support.model_run import Run, WrongError

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(7200)]

_FIRST, _, _LAST = os.environ.get("MODELMOUNT_MODEL_SEEDS", "1-2").partition("-")
STEPS = int(os.environ.get("MODELMOUNT_MODEL_STEPS", "22"))
SHRINK_S = float(os.environ.get("MODELMOUNT_MODEL_SHRINK", "0"))
_TRIES = 3  # a smaller plan that fails once in so many runs still fails


@pytest.mark.parametrize("seed", range(int(_FIRST), int(_LAST or _FIRST) + 1))
def test_a_mount_reads_as_the_plain_file_whatever_happens(seed: int, tmp_path: Path) -> None:
    plan = model_plan.make(seed, STEPS)
    try:
        reads = Run(plan, tmp_path / "0").run()
    except WrongError as exc:
        if SHRINK_S:
            plan = _shrunk(plan, tmp_path)
        print(f"{exc}\n{plan}")  # at once: other plans may follow for an hour
        pytest.fail(f"{exc}\n{plan}", pytrace=False)
    print(f"seed {seed}, {len(plan.steps)} steps: {reads} reads compared")
    assert reads > 0


def _shrunk(plan: Plan, tmp_path: Path) -> Plan:
    end = time.monotonic() + SHRINK_S
    number = 0

    def fails(smaller: Plan) -> bool:
        nonlocal number
        for _ in range(_TRIES):
            if time.monotonic() > end:
                return False
            number += 1
            try:
                Run(smaller, tmp_path / str(number)).run()
            except WrongError:
                return True
        return False

    return model_plan.shrunk(plan, fails)
