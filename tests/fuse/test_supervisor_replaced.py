"""The supervisor is killed, replaced and rolled back under readers that compare every byte."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes.registry import FakeRegistry, model_manifest
from support.hang import hung
from support.node_process import NodeProcess, alive, process_of
from support.pause_reader import CheckingReader
from support.separate_processes import SeparateProcesses, mount_of, skip_without_resend, wait_for

from csi.control import wire
from csi.control.keeper import KeeperClient
from csi.control.supervisor import SupervisorClient
from csi.errors import ControlError
from csi.supervisor.heartbeat import look

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(200)]


@pytest.fixture(params=["raw", "pyfuse3"])
def backend(request: pytest.FixtureRequest) -> str:
    return f"--fuse-backend={request.param}"


@pytest.fixture
def node(tmp_path: Path, backend: str) -> Iterator[SeparateProcesses]:
    with SeparateProcesses(tmp_path / "n", backend) as node:
        yield node


@pytest.fixture
def model(fake_registry: FakeRegistry, tmp_path: Path) -> tuple[str, Path]:
    """A reference and its content."""
    content = random.Random(7).randbytes(24 << 20)
    (tmp_path / "expected").write_bytes(content)
    digest = fake_registry.add_model("team/model", "v1", {"model.bin": content})
    return f"{fake_registry.host}/team/model@{digest}", tmp_path / "expected"


def served_mount_of(node: NodeProcess) -> dict[str, Any]:
    """The same once a worker and a fetcher are there: they are started after the supervisor answers."""
    while None in ((mount := mount_of(node))["worker_pid"], mount["fetcher_pid"]):
        time.sleep(0.02)  # pytest's own time limit ends it
    return mount


def test_sigkill_of_the_supervisor_alone_leaves_its_worker_serving(
    node: SeparateProcesses, model: tuple[str, Path]
) -> None:
    reference, expected = model
    target = node.target()
    node.publish(reference, target)
    before = mount_of(node)
    with CheckingReader(target / "model.bin", expected):
        node.supervisors[-1].kill()
        node.supervisors[-1].wait()
        time.sleep(1)
        assert alive(before["worker_pid"])
        assert alive(before["fetcher_pid"])
        node.start_supervisor()
        after = mount_of(node)
        assert (after["mount_id"], after["targets"], after["device"]) == (
            before["mount_id"],
            before["targets"],
            before["device"],
        )
        assert not alive(before["worker_pid"]), "it was replaced by one of the new supervisor's"
        assert after["worker_alive"]
        assert after["fetcher_alive"]
    node.publish(reference, target)
    other = node.target("other")
    node.publish(reference, other, "vol-2")
    assert (other / "model.bin").read_bytes() == expected.read_bytes()
    node.unpublish(target)
    assert len(node.status()) == 1
    node.unpublish(other, "vol-2")
    assert node.status() == []
    assert KeeperClient(str(node.state_dir)).mounts() == []


def test_supervisor_worker_and_fetcher_die_together_and_the_next_supervisor_starts_new_ones(
    node: SeparateProcesses, model: tuple[str, Path]
) -> None:
    """What the death of their container is."""
    reference, expected = model
    target = node.target()
    node.publish(reference, target)
    skip_without_resend(node)
    with CheckingReader(target / "model.bin", expected):
        for _ in range(3):
            mount = served_mount_of(node)
            for pid in (node.supervisors[-1].pid, mount["worker_pid"], mount["fetcher_pid"]):
                os.kill(pid, signal.SIGKILL)
            node.supervisors[-1].wait()
            node.start_supervisor()
    assert mount_of(node)["reads"]["failed_reads"] == 0


def test_a_supervisor_of_a_process_tree_is_killed_many_times(
    tmp_path: Path, model: tuple[str, Path], backend: str
) -> None:
    reference, expected = model
    with NodeProcess(tmp_path / "n", backend) as node:
        target = node.target()
        node.publish(reference, target)
        with CheckingReader(target / "model.bin", expected):
            for _ in range(4):
                os.kill(process_of(node.pid, "supervisor"), signal.SIGKILL)
                time.sleep(0.3)
                assert mount_of(node)["targets"] == [str(target)]
        node.unpublish_all()


def test_a_supervisor_takes_over_from_one_that_runs(node: SeparateProcesses, model: tuple[str, Path]) -> None:
    reference, expected = model
    target = node.target()
    node.publish(reference, target)
    with CheckingReader(target / "model.bin", expected):
        for _ in range(3):
            before = mount_of(node)
            node.start_supervisor()
            after = mount_of(node)
            assert node.supervisor_pid() == node.supervisors[-1].pid
            assert after["targets"] == before["targets"]
            assert after["worker_pid"] != before["worker_pid"]
            assert after["fetcher_pid"] != before["fetcher_pid"]
            print(f"pause {after['longest_pause_s']} s")
            node.supervisors[-2].terminate()
            node.supervisors[-2].wait(10)
            assert not alive(before["worker_pid"])
            assert not alive(before["fetcher_pid"])
    assert mount_of(node)["reads"]["failed_reads"] == 0
    node.unpublish(target)
    assert node.status() == []


def test_a_read_that_waits_for_the_registry_during_the_hand_over_completes(
    node: SeparateProcesses, fake_registry: FakeRegistry
) -> None:
    release = threading.Event()
    content = random.Random(3).randbytes(1 << 20)
    digest = "sha256:" + hashlib.sha256(content).hexdigest()

    def slow(offset: int, length: int) -> bytes:
        release.wait(60)
        return content[offset : offset + length]

    fake_registry.blob_readers[digest] = (len(content), slow)
    layer = {
        "mediaType": "application/vnd.cncf.model.weight.v1.raw",
        "digest": digest,
        "size": len(content),
        "annotations": {"org.cncf.model.filepath": "slow.bin"},
    }
    fake_registry.add_manifest("team/slow", "v1", model_manifest([layer], fake_registry.add_blob(b"{}")))
    target = node.target()
    node.publish(f"{fake_registry.host}/team/slow:v1", target)
    skip_without_resend(node)
    seen: list[bytes | OSError] = []

    def read() -> None:
        try:
            seen.append((target / "slow.bin").read_bytes())
        except OSError as exc:
            seen.append(exc)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        wait_for(node, "the read to wait", lambda: mount_of(node)["reads"].get("waited_reads", 0) > 0)
        node.start_supervisor()
        node.supervisors[-2].terminate()
        node.supervisors[-2].wait(10)
        assert seen == []
    finally:
        release.set()
        reader.join(100)
    assert seen == [content]


def test_credentials_are_handed_over(tmp_path: Path, backend: str) -> None:
    content = random.Random(5).randbytes(30 << 20)
    with FakeRegistry("user", "secret") as registry, SeparateProcesses(tmp_path / "n", backend) as node:
        digest = registry.add_model("team/private", "v1", {"model.bin": content}, indexed=True)
        target = node.target()
        node.publish(
            f"{registry.host}/team/private@{digest}",
            target,
            secrets={"username": "user", "password": "secret"},
            attributes={"prefetch": "ondemand"},
        )
        with open(target / "model.bin", "rb", buffering=0) as file:
            assert file.read(1000) == content[:1000]
            node.start_supervisor()
            node.supervisors[-2].terminate()
            node.supervisors[-2].wait(10)
            assert os.pread(file.fileno(), 5000, 25 << 20) == content[25 << 20 :][:5000], "never read before"
            assert "secret" not in "".join(path.read_text() for path in (node.state_dir / "mounted").iterdir())


def test_without_credentials_what_is_cached_is_read_and_the_rest_waits_for_the_republish(
    tmp_path: Path, backend: str
) -> None:
    content = random.Random(5).randbytes(30 << 20)
    with FakeRegistry("user", "secret") as registry, SeparateProcesses(tmp_path / "n", backend) as node:
        digest = registry.add_model("team/private", "v1", {"model.bin": content}, indexed=True)
        target = node.target()
        reference = f"{registry.host}/team/private@{digest}"
        given = {"username": "user", "password": "secret"}
        node.publish(reference, target, secrets=given, attributes={"prefetch": "ondemand"})
        skip_without_resend(node)
        with open(target / "model.bin", "rb", buffering=0) as file:
            assert file.read(1000) == content[:1000]
            wait_for(node, "the block to be cached", lambda: present_blocks(mount_of(node)) > 0)
            mount = mount_of(node)
            for pid in (node.supervisors[-1].pid, mount["worker_pid"], mount["fetcher_pid"]):
                os.kill(pid, signal.SIGKILL)
            node.supervisors[-1].wait()
            node.start_supervisor()
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(file.fileno(), 1000, 100_000) == content[100_000:][:1000]
            seen: list[bytes | OSError] = []

            def read() -> None:
                try:
                    seen.append(os.pread(file.fileno(), 5000, 25 << 20))
                except OSError as exc:
                    seen.append(exc)

            reader = threading.Thread(target=read)
            reader.start()
            time.sleep(1)
            assert seen == []
            node.publish(reference, target, secrets=given, attributes={"prefetch": "ondemand"})
            reader.join(60)
            assert seen == [content[25 << 20 :][:5000]]


def test_a_worker_whose_channel_was_half_handed_over_gets_another(
    node: SeparateProcesses, fake_registry: FakeRegistry
) -> None:
    """The fetcher has a channel whose other end is gone, as when a supervisor dies between its two halves. Both live on."""
    content = random.Random(11).randbytes(30 << 20)
    digest = fake_registry.add_model("team/linked", "v1", {"model.bin": content}, indexed=True)
    target = node.target()
    node.publish(f"{fake_registry.host}/team/linked@{digest}", target, attributes={"prefetch": "ondemand"})
    before = served_mount_of(node)
    with open(target / "model.bin", "rb", buffering=0) as file:
        for offset in (0, 25 << 20):
            assert os.pread(file.fileno(), 5000, offset) == content[offset:][:5000]
            take_the_channel(node, before["mount_id"])
        assert os.pread(file.fileno(), 5000, 13 << 20) == content[13 << 20 :][:5000], "never read before"
    after = mount_of(node)
    assert (after["worker_pid"], after["fetcher_pid"]) == (before["worker_pid"], before["fetcher_pid"])
    assert after["reads"]["failed_reads"] == 0


def take_the_channel(node: NodeProcess, mount_id: str) -> None:
    """The fetcher lets go of its worker for another one, which is gone already."""
    collected = KeeperClient(str(node.state_dir)).collect(mount_id)
    try:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs, socket.socket(fileno=os.dup(collected.slots["fetcher"].fds[0])) as control:
            wire.send(control, {"id": 0, "op": "worker"}, [theirs.fileno()])
    finally:
        collected.close()


def test_a_successor_that_dies_gives_the_mounts_back(node: SeparateProcesses, model: tuple[str, Path]) -> None:
    reference, expected = model
    target = node.target()
    node.publish(reference, target)
    first = node.supervisors[0]
    with CheckingReader(target / "model.bin", expected):
        second = node.start_supervisor()
        assert node.supervisor_pid() == second.pid
        second.kill()
        second.wait()
        wait_for(node, "the first to serve again", lambda: answering(node) == first.pid)
        assert mount_of(node)["targets"] == [str(target)]
        wait_for(node, "a worker of the first", lambda: mount_of(node)["worker_alive"])
    node.unpublish(target)
    assert node.status() == []


def present_blocks(mount: dict[str, Any]) -> int:
    return max((blob["present_blocks"] for blob in mount["progress"].get("blobs", ())), default=0)


def answering(node: SeparateProcesses) -> int | None:
    try:
        return SupervisorClient(str(node.state_dir)).ping()
    except ControlError:
        return None


def test_a_release_whose_workers_cannot_start_displaces_none_that_serves(
    node: SeparateProcesses, model: tuple[str, Path]
) -> None:
    """Rolled out, and rolled back: it never gets ready, and its predecessor takes the mounts again."""
    reference, expected = model
    target = node.target()
    node.publish(reference, target)
    before = mount_of(node)
    with CheckingReader(target / "model.bin", expected):
        bad = node.start_supervisor_unready("--child-memory-mib=1")
        wait_for(node, "the bad release to take over", lambda: answering(node) == bad.pid)
        time.sleep(3)
        assert mount_of(node)["worker_pid"] == before["worker_pid"]
        assert not node.ready_file(bad).exists()
        bad.terminate()
        bad.wait(20)
        wait_for(node, "the good release to serve again", lambda: answering(node) == node.supervisors[0].pid)
        wait_for(node, "its workers", lambda: mount_of(node)["worker_pid"] != before["worker_pid"])
    assert mount_of(node)["reads"]["failed_reads"] == 0
    node.unpublish(target)


def test_a_stopped_supervisor_that_ends_leaves_its_mounts_to_the_next(
    node: SeparateProcesses, model: tuple[str, Path]
) -> None:
    """SIGTERM without a successor, as when a pod is deleted by hand."""
    reference, expected = model
    target = node.target()
    node.publish(reference, target)
    with CheckingReader(target / "model.bin", expected):
        node.supervisors[-1].terminate()
        began = time.monotonic()
        assert node.supervisors[-1].wait(20) == 0
        print(f"ended after {time.monotonic() - began:.2f} s")
        node.start_supervisor()
        assert mount_of(node)["targets"] == [str(target)]


@pytest.mark.parametrize("role", ["worker", "fetcher"])
def test_one_that_is_stopped_is_continued(node: SeparateProcesses, model: tuple[str, Path], role: str) -> None:
    reference, expected = model
    target = node.target()
    node.publish(reference, target)
    stopped = mount_of(node)[f"{role}_pid"]
    with CheckingReader(target / "model.bin", expected):
        os.kill(stopped, signal.SIGSTOP)
        wait_for(node, "its supervisor to see it", lambda: f"{role.title()}Hung" in reasons_of(node))
        wait_for(node, f"the {role} to run", lambda: look(stopped) is not None and look(stopped).state != "T")  # type: ignore[union-attr]
    assert mount_of(node)[f"{role}_pid"] == stopped


@pytest.mark.parametrize("role", ["worker", "fetcher"])
def test_one_that_hangs_is_replaced(node: SeparateProcesses, model: tuple[str, Path], role: str) -> None:
    reference, expected = model
    target = node.target()
    node.publish(reference, target)
    skip_without_resend(node)
    stuck = mount_of(node)[f"{role}_pid"]
    with CheckingReader(target / "model.bin", expected), hung(stuck):
        wait_for(node, "another one", lambda: mount_of(node)[f"{role}_pid"] not in (stuck, None))
    assert f"{role.title()}Hung" in reasons_of(node)


def reasons_of(node: SeparateProcesses) -> list[str]:
    return [event["reason"] for event in mount_of(node)["events"]]


def test_an_unpublish_does_not_wait_for_a_stopped_supervisor(node: SeparateProcesses, model: tuple[str, Path]) -> None:
    """It gives the lease back when the supervisor answers again."""
    reference, _ = model
    target = node.target()
    node.publish(reference, target)
    os.kill(node.supervisors[-1].pid, signal.SIGSTOP)
    try:
        node.unpublish(target)
        assert not target.exists()
    finally:
        os.kill(node.supervisors[-1].pid, signal.SIGCONT)
    wait_for(node, "the mount to end", lambda: node.status() == [])
    wait_for(node, "it to be unmounted", lambda: KeeperClient(str(node.state_dir)).mounts() == [])
