"""Each process is killed while every kind of reader reads."""

from __future__ import annotations

import os
import signal

import pytest
from survival.conftest import Stage

pytestmark = [pytest.mark.fuse, pytest.mark.survival, pytest.mark.timeout(600)]


def test_nothing_happens(stage: Stage) -> None:
    """What readers see of a quiet node: what the other pauses are to be compared with."""
    with stage.event("nothing"):
        for _ in range(20):
            stage.readers.advance(60)
    for reason in stage.readers.skipped:
        stage.table.skip("idmapped reader", stage.backend, reason)


def test_the_worker_is_killed(stage: Stage) -> None:
    with stage.event("SIGKILL worker"):
        killed = stage.node.process("worker")
        os.kill(killed, signal.SIGKILL)
        stage.node.wait_until("another worker", lambda: is_replaced(stage, "worker", killed))


def test_the_fetcher_is_killed(stage: Stage) -> None:
    with stage.event("SIGKILL fetcher, all cached"):
        killed = stage.node.process("fetcher")
        os.kill(killed, signal.SIGKILL)
        stage.node.wait_until("another fetcher", lambda: is_replaced(stage, "fetcher", killed))


def test_the_store_is_killed(stage: Stage) -> None:
    with stage.event("SIGKILL store"):
        killed = stage.node.process("store")
        os.kill(killed, signal.SIGKILL)
        stage.node.wait_until("another store", lambda: is_replaced(stage, "store", killed))


def test_the_keeper_is_killed(stage: Stage) -> None:
    with stage.event("SIGKILL keeper"):
        stage.node.restart("keeper")
    target, here = stage.node.target("after-keeper")
    stage.node.publish(stage.reference, target, "vol-after-keeper")
    assert os.stat(here / "weights.bin").st_dev == os.stat(stage.here / "weights.bin").st_dev, "the same superblock"
    stage.node.unpublish(target)


def test_the_node_is_killed(stage: Stage) -> None:
    with stage.event("SIGKILL node"):
        stage.node.restart("node")
        stage.node.republish()


def is_replaced(stage: Stage, role: str, killed: int) -> bool:
    try:
        return stage.node.process(role) != killed
    except (ProcessLookupError, IndexError):
        return False
