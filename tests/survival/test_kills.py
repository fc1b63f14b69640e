"""Each process is killed, alone and with others, while every kind of reader reads."""

from __future__ import annotations

import os
import signal
import threading
import time
from functools import partial

import grpc
import pytest
from survival.conftest import Stage
from survival.events import another, kill, replace, restart_supervisor, shoot, shoot_nursery

pytestmark = [pytest.mark.fuse, pytest.mark.survival, pytest.mark.timeout(600)]


def test_nothing_happens(stage: Stage) -> None:
    """What readers see of a quiet node: what the other pauses are to be compared with."""
    with stage.event("nothing"):
        for _ in range(20):
            stage.readers.advance(60)
    for reason in stage.readers.skipped:
        stage.table.skip("idmapped reader", stage.backend, reason)
    status = stage.node.status(stage.target)
    if stage.backend == "passthrough":
        assert status["passthrough"]["blobs"], status["passthrough"]
    else:
        assert status["reads"]["reads"] > 100, "readers that the page cache answers show nothing"


@pytest.mark.parametrize("role", ["worker", "fetcher", "store"])
def test_a_child_is_killed(stage: Stage, role: str) -> None:
    with stage.event(f"SIGKILL {role}"):
        kill(stage, role)


@pytest.mark.old_kernel
def test_the_worker_is_killed_again_and_again(stage: Stage) -> None:
    """Faster than spares are made ready."""
    with stage.event("SIGKILL worker, three in a row"):
        for _ in range(3):
            kill(stage, "worker")


def test_the_fetcher_is_killed_while_it_is_needed(stage: Stage) -> None:
    """Nothing of the model is here yet, and the registry is slow."""
    with stage.cold_model("cold-fetcher") as cold, stage.event("SIGKILL fetcher, nothing cached", readers=cold.readers):
        for _ in range(3):
            kill_of(stage, "fetcher", cold.target)


@pytest.mark.old_kernel
def test_the_worker_is_killed_while_reads_wait_for_the_registry(stage: Stage) -> None:
    with stage.cold_model("cold-worker") as cold, stage.event("SIGKILL worker, nothing cached", readers=cold.readers):
        for _ in range(3):
            kill_of(stage, "worker", cold.target)


def test_the_keeper_is_killed(stage: Stage) -> None:
    with stage.event("SIGKILL keeper"):
        stage.node.restart("keeper")
    shows_the_same_superblock_elsewhere(stage, "after-keeper")


@pytest.mark.old_pyfuse3
def test_the_keeper_is_replaced(stage: Stage) -> None:
    with stage.event("upgrade of the keeper"):
        replace(stage, "keeper")
    shows_the_same_superblock_elsewhere(stage, "after-keeper-upgrade")


def test_the_node_is_killed(stage: Stage) -> None:
    with stage.event("SIGKILL node"):
        stage.node.restart("node")
        stage.node.republish()


@pytest.mark.old_pyfuse3
def test_the_node_is_replaced(stage: Stage) -> None:
    with stage.event("upgrade of the node"):
        replace(stage, "node")
        stage.node.republish()


def test_the_node_is_killed_inside_a_publish(stage: Stage) -> None:
    """kubelet asks again, and then everything is as if nothing had happened."""
    with stage.event("SIGKILL node inside a publish, 4 times"):
        for number, delay_s in enumerate((0.0, 0.01, 0.05, 0.2)):
            target, here = stage.node.target(f"inside-{number}")
            call = threading.Thread(target=publish_and_lose, args=(stage, target, f"vol-inside-{number}"))
            call.start()
            time.sleep(delay_s)
            stage.node.restart("node")
            call.join(60)
            stage.node.republish()
            assert (here / "small.bin").read_bytes() == stage.small_content
            stage.node.unpublish(target)
            assert not here.exists()


def test_the_nursery_is_killed_with_the_worker(stage: Stage) -> None:
    """What workers are forked from is gone, too."""
    with stage.event("SIGKILL nursery and worker at once"):
        shoot_nursery(stage)
        kill(stage, "worker")


@pytest.mark.parametrize(
    "roles",
    [("worker", "fetcher"), ("worker", "fetcher", "store")],
    ids=" and ".join,
)
def test_children_are_killed_together(stage: Stage, roles: tuple[str, ...]) -> None:
    with stage.event(f"SIGKILL {', '.join(roles)} at once"):
        killed = {role: shoot(stage, role) for role in roles}
        for role, pid in killed.items():
            stage.node.wait_until(f"another {role}", partial(another, stage, role, pid))


@pytest.mark.parametrize("roles", [("worker",), ("worker", "fetcher")], ids=" and ".join)
def test_the_keeper_and_children_are_killed_together(stage: Stage, roles: tuple[str, ...]) -> None:
    with stage.event(f"SIGKILL keeper, {', '.join(roles)} at once"):
        stage.node.kill("keeper")
        for role in roles:
            shoot(stage, role)
        stage.node.start("keeper")
    shows_the_same_superblock_elsewhere(stage, f"after-keeper-and-{len(roles)}")


def test_the_supervisor_is_killed_and_kubelet_publishes_again(stage: Stage) -> None:
    with stage.event("SIGKILL supervisor's container"):
        restart_supervisor(stage)


def test_the_supervisor_and_the_node_are_killed_together(stage: Stage) -> None:
    with stage.event("SIGKILL supervisor's and node's containers at once"):
        stage.node.kill("supervisor")
        stage.node.kill("node")
        stage.node.start("supervisor")
        stage.node.start("node")
        stage.node.republish()


def test_the_keeper_and_the_node_are_killed_together(stage: Stage) -> None:
    with stage.event("SIGKILL keeper's and node's containers at once"):
        stage.node.kill("keeper")
        stage.node.kill("node")
        stage.node.start("keeper")
        stage.node.start("node")
        stage.node.republish()


def kill_of(stage: Stage, role: str, target: str) -> None:
    killed = stage.node.process(role, target)
    os.kill(killed, signal.SIGKILL)

    def is_replaced() -> bool:
        try:
            return stage.node.process(role, target) != killed
        except ProcessLookupError:
            return False

    stage.node.wait_until(f"another {role}", is_replaced)


def publish_and_lose(stage: Stage, target: str, volume_id: str) -> None:
    try:
        stage.node.publish(stage.small_model, target, volume_id)
    except grpc.RpcError:
        return  # `republish` asks again


def shows_the_same_superblock_elsewhere(stage: Stage, name: str) -> None:
    """What a keeper can do only that got the connections back."""
    target, here = stage.node.target(name)
    stage.node.publish(stage.reference, target, f"vol-{name}")
    assert os.stat(here / "weights.bin").st_dev == os.stat(stage.here / "weights.bin").st_dev
    stage.node.unpublish(target)
