"""A mount that nobody reads has no processes of its own, and is read right again by whoever comes."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes.registry import FakeRegistry, Fault
from support.node_process import NodeProcess, alive
from support.pause_reader import CheckingReader
from support.separate_processes import TIMEOUT_S, SeparateProcesses, mount_of, skip_without_resend, wait_for

from csi.control.keeper import KeeperClient

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(200)]

SIZE = 24 << 20


@pytest.fixture(params=["raw", "pyfuse3"])
def node(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[SeparateProcesses]:
    flags = (f"--fuse-backend={request.param}", "--idle-exit=0.5", "--passthrough=off", "--seal=never")
    with SeparateProcesses(tmp_path / "n", *flags) as node:
        yield node


@pytest.fixture
def content() -> bytes:
    return random.Random(70).randbytes(SIZE)


@pytest.fixture
def reference(fake_registry: FakeRegistry, content: bytes) -> str:
    digest = fake_registry.add_model("team/idle", "v1", {"model.bin": content})
    return f"{fake_registry.host}/team/idle@{digest}"


def publish(node: SeparateProcesses, reference: str) -> Path:
    target = node.target()
    node.publish(reference, target)
    skip_without_resend(node)
    return target


def wait_idle(node: NodeProcess) -> None:
    def idle() -> bool:
        mount = mount_of(node)
        return bool(mount["worker_resting"] and mount["fetcher_resting"])

    wait_for(node, "worker and fetcher to end", idle)
    mount = mount_of(node)
    wait_for(node, "both to be gone", lambda: not alive(mount["worker_pid"]) and not alive(mount["fetcher_pid"]))


def read_anew(path: Path) -> bytes:
    """Through a worker, not from the kernel's pages."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return b"".join(iter(lambda: os.read(fd, 1 << 20), b""))
    finally:
        os.close(fd)


def test_a_mount_that_nobody_reads_has_no_processes_until_somebody_does(
    node: SeparateProcesses, reference: str, content: bytes
) -> None:
    target = publish(node, reference)
    assert (target / "model.bin").read_bytes() == content
    for _ in range(3):
        wait_idle(node)
        mount = mount_of(node)
        assert (mount["worker_restarts"], mount["fetcher_restarts"], mount["dead"]) == (0, 0, False)
        assert mount["progress"]["blobs"][0]["state"] == "verified", "what is known of the model stays known"
        assert mount["reads"]["reads"] > 0
        began = time.monotonic()
        assert os.listdir(target) == ["model.bin"]
        print(f"first answer after {time.monotonic() - began:.3f} s")
        assert read_anew(target / "model.bin") == content


def test_many_readers_wake_it_at_once(node: SeparateProcesses, reference: str, content: bytes) -> None:
    target = publish(node, reference)
    assert (target / "model.bin").read_bytes() == content
    fds = [os.open(target / "model.bin", os.O_RDONLY) for _ in range(8)]
    try:
        wait_idle(node)
        os.posix_fadvise(fds[0], 0, 0, os.POSIX_FADV_DONTNEED)
        found: dict[int, bytes] = {}

        def read(number: int) -> None:
            found[number] = os.pread(fds[number], 1 << 20, number * (3 << 20))

        readers = [threading.Thread(target=read, args=(number,)) for number in range(8)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(TIMEOUT_S)
        assert found == {number: content[number * (3 << 20) :][: 1 << 20] for number in range(8)}
    finally:
        for fd in fds:
            os.close(fd)


def test_what_is_open_stays_open_and_mapped(node: SeparateProcesses, reference: str, content: bytes) -> None:
    target = publish(node, reference)
    with CheckingReader(target / "model.bin", write(node, content)):
        time.sleep(0.5)
        assert not mount_of(node)["worker_resting"], "somebody reads"
    wait_idle(node)
    assert read_anew(target / "model.bin") == content


def write(node: SeparateProcesses, content: bytes) -> Path:
    path = node.directory / "expected"
    path.write_bytes(content)
    return path


def test_an_idle_mount_is_handed_over_and_then_still_idle(
    node: SeparateProcesses, reference: str, content: bytes
) -> None:
    target = publish(node, reference)
    assert (target / "model.bin").read_bytes() == content
    wait_idle(node)
    old = node.supervisors[-1]
    node.start_supervisor()  # returns when it is ready
    old.terminate()
    assert old.wait(20) == 0
    assert mount_of(node)["worker_resting"]
    assert read_anew(target / "model.bin") == content
    wait_idle(node)
    assert read_anew(target / "model.bin") == content


def test_the_supervisor_of_an_idle_mount_is_killed_and_readers_come_before_the_next(
    node: SeparateProcesses, reference: str, content: bytes
) -> None:
    target = publish(node, reference)
    assert (target / "model.bin").read_bytes() == content
    wait_idle(node)
    node.supervisors[-1].kill()
    node.supervisors[-1].wait()
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(read_anew(target / "model.bin")))
    reader.start()
    time.sleep(0.5)
    assert found == [], "nobody is there who could answer"
    node.start_supervisor()
    reader.join(TIMEOUT_S)
    assert found == [content]
    wait_idle(node)
    node.supervisors[-1].kill()
    node.supervisors[-1].wait()
    node.start_supervisor()
    wait_for(node, "it to be found idle", lambda: mount_of(node)["worker_resting"])
    assert read_anew(target / "model.bin") == content


def test_an_idle_mount_is_unpublished(node: SeparateProcesses, reference: str, content: bytes) -> None:
    target = publish(node, reference)
    assert (target / "model.bin").read_bytes() == content
    wait_idle(node)
    node.unpublish(target)
    assert not target.exists()
    wait_for(node, "the mount to end", lambda: node.status() == [])
    assert KeeperClient(str(node.state_dir)).mounts() == []


def test_another_volume_of_an_idle_mount_is_published(node: SeparateProcesses, reference: str, content: bytes) -> None:
    """Its registry is asked whether it may have it."""
    target = publish(node, reference)
    assert (target / "model.bin").read_bytes() == content
    wait_idle(node)
    other = node.target("other")
    node.publish(reference, other, "vol-2")
    assert read_anew(other / "model.bin") == content


def test_a_fetcher_that_has_not_brought_everything_stays(
    node: SeparateProcesses, reference: str, content: bytes, fake_registry: FakeRegistry
) -> None:
    fault = Fault(match="/blobs/", status=503, times=1 << 30)
    target = publish(node, reference)
    assert (target / "model.bin").read_bytes() == content
    wait_idle(node)
    digest = fake_registry.add_model("team/other", "v1", {"model.bin": content + b"more"})
    fake_registry.faults.append(fault)
    other = node.target("other")
    node.publish(f"{fake_registry.host}/team/other@{digest}", other, "vol-2")

    def mount() -> dict[str, Any]:
        (found,) = [one for one in node.status() if one["digest"] == str(digest)]
        return dict(found)

    wait_for(node, "its worker to end", lambda: mount()["worker_resting"])
    time.sleep(3)
    assert not mount()["fetcher_resting"]
    assert alive(mount()["fetcher_pid"])
    fake_registry.faults.remove(fault)
    assert read_anew(other / "model.bin") == content + b"more"
