"""What cannot go on goes with a clean end: nothing hangs, nothing spins, and kubelet's next publish heals it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes.registry import FakeRegistry, Fault
from survival.conftest import READ_DEADLINE_S, Stage, supervisor_flags
from survival.node import ContainerNode
from survival.readers import Seen
from survival.table import Table

pytestmark = [pytest.mark.fuse, pytest.mark.survival, pytest.mark.timeout(600)]
_FUSE_CONNECTIONS = Path("/sys/fs/fuse/connections")


@pytest.fixture(scope="session")
def spare_node(backend: str, place: Path) -> Iterator[ContainerNode]:
    """A node of its own, for what ends its mounts."""
    directory = place / f"spare-{backend}"
    directory.mkdir()
    flags = {
        "supervisor": supervisor_flags(backend),
        "node": ["--metrics-address=127.0.0.1:9809"],
    }
    with ContainerNode(directory, flags) as node:
        yield node


@pytest.fixture
def small(registry: FakeRegistry) -> tuple[str, bytes]:
    """A model of one block."""
    content = bytes(range(256)) * 4096
    digest = registry.add_model("team/losses", "v1", {"small.bin": content}, indexed=True)
    return f"{registry.host}/team/losses@{digest}", content


def test_keeper_and_supervisor_die_together(
    spare_node: ContainerNode, small: tuple[str, bytes], backend: str, table: Table
) -> None:
    """Nobody holds the connection any more. The one case in which readers see an error, and it is a clear one."""
    reference, content = small
    (gone, gone_here), (target, here) = spare_node.target("gone"), spare_node.target("healed")
    spare_node.publish(reference, gone, "vol-gone")
    spare_node.publish(reference, target, "vol-healed")
    with open(here / "small.bin", "rb", buffering=0) as file:
        assert file.read(10) == content[:10]
        spare_node.kill("supervisor")
        spare_node.kill("keeper")
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with pytest.raises(OSError, match="not connected") as caught:
            os.listdir(here)
        assert caught.value.errno == errno.ENOTCONN
        with pytest.raises(OSError, match=r"not connected|Input/output|aborted"):
            os.pread(file.fileno(), 4096, 512 * 1024)
    spare_node.start("keeper")
    spare_node.start("supervisor")
    spare_node.unpublish(gone)
    assert not gone_here.exists()
    spare_node.republish()
    assert (here / "small.bin").read_bytes() == content
    spare_node.unpublish(target)
    assert spare_node.mounted() == []
    table.add(
        "SIGKILL keeper's and supervisor's containers at once",
        backend,
        Seen(operations=2, errors=2),
        "ENOTCONN, as promised; unpublish is clean, the republish heals",
    )


def test_a_connection_that_is_aborted_from_outside(
    spare_node: ContainerNode, small: tuple[str, bytes], backend: str, table: Table
) -> None:
    reference, content = small
    target, here = spare_node.target("aborted")
    spare_node.publish(reference, target, "vol-aborted")
    assert (here / "small.bin").read_bytes() == content
    if not any(_FUSE_CONNECTIONS.iterdir()):
        mounted = subprocess.run(["mount", "-t", "fusectl", "none", str(_FUSE_CONNECTIONS)], capture_output=True)
        if mounted.returncode:
            pytest.skip("fusectl cannot be mounted here")
    minor = spare_node.status(target)["device"].partition(":")[2]
    (_FUSE_CONNECTIONS / minor / "abort").write_text("1")
    with pytest.raises(OSError, match=r"not connected|aborted"):
        os.listdir(here)
    spare_node.wait_until("the mount to be known as dead", lambda: spare_node.status(target)["dead"])
    restarts = spare_node.status(target)["worker_restarts"]
    time.sleep(1.5)
    assert spare_node.status(target)["worker_restarts"] == restarts, "no worker is started for a dead connection"
    spare_node.republish()
    assert (here / "small.bin").read_bytes() == content
    spare_node.unpublish(target)
    table.add(
        "connection aborted from outside",
        backend,
        Seen(operations=1, errors=1),
        "an error, as it must; no worker is started again and again, the republish heals",
    )


def test_a_volume_of_a_hung_worker_is_taken_away(stage: Stage) -> None:
    """Its worker never goes on, a reader waits for it: the unpublish does not, and the reader is let go."""
    target, here = stage.node.target("hung")
    stage.node.publish(stage.small_model, target, "vol-hung")
    worker = stage.node.process("worker", target)
    with stage.event("unpublish of a volume whose worker is stopped for good") as seen:
        os.kill(worker, signal.SIGSTOP)
        reader = subprocess.Popen(
            ["cat", str(here / "small.bin")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(0.2)
        assert stage.node.stats(target).usage
        stage.node.unpublish(target)
        assert not here.exists()
        assert reader.wait(20) is not None
    assert seen.errors == 0
    assert not Path(f"/proc/{worker}").exists(), "a worker of no mount is ended, stopped or not"


def test_a_registry_that_is_down(stage: Stage) -> None:
    """Cached bytes are read on, others fail in bounded time, and the volume can be taken away."""
    with stage.cold_model("outage") as cold:
        for reader in cold.readers.all:
            reader.stop()
        content = (stage.directory / "readers-outage" / "expected.bin").read_bytes()
        with open(cold.here / "cold.bin", "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead: most stays at the registry
            assert os.pread(file.fileno(), 4096, 0) == content[:4096]
            outage = Fault(match=f"outage-{stage.backend}/blobs", times=1 << 30, status=503)
            stage.registry.faults.insert(0, outage)
            absent = absent_offset(stage, cold.target)
            try:
                with stage.event("registry down for another model"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    assert os.pread(file.fileno(), 4096, 4096) == content[4096:8192]
                    began = time.monotonic()
                    with pytest.raises(OSError, match="Input/output"):
                        os.pread(file.fileno(), 4096, absent)
                    assert time.monotonic() - began < 10 * READ_DEADLINE_S, "the read's deadline, not for ever"
            finally:
                stage.registry.faults.remove(outage)
            # A moment long the kernel's second question after a failed read-ahead is answered as the first was.
            stage.node.wait_until("reads to succeed again", lambda: is_readable(file.fileno(), absent))
            assert os.pread(file.fileno(), 4096, absent) == content[absent : absent + 4096], "and it is over"


def test_a_private_model_after_a_restart_of_node_and_supervisor(stage: Stage) -> None:
    """Credentials were in the memory of processes that are gone; kubelet's next publish brings them again."""
    content = os.urandom(24 << 20)
    with FakeRegistry("user", "secret") as private:
        digest = private.add_model("team/private", "v1", {"private.bin": content}, indexed=True)
        target, here = stage.node.target("private")
        stage.node.publish(
            f"{private.host}/team/private@{digest}",
            target,
            "vol-private",
            secrets={"username": "user", "password": "secret"},
            attributes={"prefetch": "ondemand"},
        )
        try:
            with open(here / "private.bin", "rb", buffering=0) as file:
                assert file.read(4096) == content[:4096]
                with stage.event("SIGKILL supervisor and node; a private model reads on"):
                    stage.node.kill("supervisor")
                    stage.node.kill("node")
                    stage.node.start("supervisor")
                    stage.node.start("node")
                    private.seen.clear()
                    stage.node.republish()
                    assert file.read() == content[4096:]
            assert [seen for seen in private.requests("/blobs/") if seen.authorization], "fetched with credentials"
        finally:
            stage.node.unpublish(target)


def is_readable(fd: int, offset: int) -> bool:
    """Whether a read there answers with bytes now."""
    try:
        return bool(os.pread(fd, 4096, offset))
    except OSError:
        return False


def absent_offset(stage: Stage, target: str) -> int:
    """Where the model's last block begins, which must not be here yet."""
    (blob,) = [one for one in stage.node.status(target)["progress"]["blobs"] if one["size_bytes"] > 1 << 20]
    assert blob["present_blocks"] < blob["blocks"], "nothing is left to fetch"
    return int((blob["blocks"] - 1) * (4 << 20))
