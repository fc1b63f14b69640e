"""A new release of the supervisor comes beside the old one, takes over mount by mount, and the old one goes; or it is bad."""

from __future__ import annotations

import os
import threading
import time

import pytest
from fakes.registry import Fault
from survival.conftest import Stage
from survival.containers import Container
from survival.releases import whose_worker_crashes

pytestmark = [pytest.mark.fuse, pytest.mark.survival, pytest.mark.timeout(600)]


@pytest.mark.old_kernel
@pytest.mark.old_pyfuse3
def test_a_rolling_upgrade_of_the_supervisor(stage: Stage) -> None:
    with stage.event("upgrade of the supervisor"):
        roll(stage)
    target, here = stage.node.target(f"after-upgrade-{time.monotonic_ns()}")
    stage.node.publish(stage.small_model, target, "vol-after-upgrade")
    assert (here / "small.bin").read_bytes() == stage.small_content
    stage.node.unpublish(target)


@pytest.mark.old_pyfuse3
def test_upgrades_one_after_the_other(stage: Stage) -> None:
    with stage.event("three upgrades of the supervisor in a row"):
        for _ in range(3):
            roll(stage)


def test_a_read_that_waits_for_the_registry_meanwhile(stage: Stage) -> None:
    """No other request comes that could wake anybody."""
    with stage.cold_model("upgrade") as cold:
        for reader in cold.readers.all:
            reader.stop()
        content = (stage.directory / "readers-upgrade" / "expected.bin").read_bytes()
        offset = len(content) - 4096
        slow = Fault(match=f"upgrade-{stage.backend}/blobs", times=1 << 30, stall_s=4.0)
        stage.registry.faults.insert(0, slow)
        found: list[bytes] = []

        def read() -> None:
            fd = os.open(cold.here / "cold.bin", os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
                found.append(os.pread(fd, 4096, offset))
            finally:
                os.close(fd)

        reading = threading.Thread(target=read)
        try:
            with stage.event("upgrade while one read waits for the registry"):
                reading.start()
                time.sleep(0.5)
                roll(stage)
                reading.join(60)
        finally:
            stage.registry.faults.remove(slow)
        assert found == [content[offset:]]


def test_a_bad_release_is_rolled_out_and_back(stage: Stage) -> None:
    """It never gets ready, so the old one stays until somebody takes the bad one back."""
    bad = whose_worker_crashes(stage.directory)
    good = stage.node.container("supervisor")
    with stage.event("a release whose worker crashes at start, rolled out and back"):
        new = stage.node.start_beside("supervisor", checkout=bad)
        time.sleep(3)
        assert not is_ready(new)
        new.stop(30)
        stage.node.use("supervisor", good)
        stage.node.wait_until("the old one to have its mounts again", lambda: serves(stage))


def test_a_bad_release_alone(stage: Stage) -> None:
    """The old one is gone before the bad one is there, as after a reboot of its pod; the next good one heals."""
    bad = stage.directory / "releases" / "bad-worker"
    with stage.event("a release whose worker crashes at start, alone for 3 s"):
        stage.node.kill("supervisor")
        alone = stage.node.start_beside("supervisor", checkout=bad)
        time.sleep(3)
        alone.kill()
        stage.node.start("supervisor")
        stage.node.republish()


def roll(stage: Stage) -> None:
    """As a DaemonSet with maxSurge 1: the old one ends when the new one is ready."""
    old = stage.node.container("supervisor")
    new = stage.node.start_beside("supervisor")
    stage.node.wait_until("the new supervisor to be ready", lambda: is_ready(new))
    old.stop(30)


def is_ready(container: Container) -> bool:
    """What the readiness probe looks at."""
    (argument,) = [one for one in container.arguments if one.startswith("--ready-file=")]
    return container.has_file(argument.partition("=")[2])


def serves(stage: Stage) -> bool:
    try:
        mount = stage.node.status(stage.target)
        return bool(mount["worker_alive"] or mount["worker_resting"])
    except Exception:
        return False
