"""Mounts outlive their worker and their fetcher: real mounts, real kills, every byte compared."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import pytest
from fakes.registry import FakeRegistry, Fault
from support.node_process import COMMAND, NodeProcess, process_of
from support.separate_processes import mount_of, skip_without_resend, wait_for

from csi.control.keeper import KeeperClient
from csi.control.supervisor import SupervisorClient
from csi.errors import ControlError

pytestmark = pytest.mark.fuse

GIB = 1 << 30


@pytest.fixture
def small_model(fake_registry: FakeRegistry) -> tuple[str, bytes]:
    content = random.Random(7).randbytes(48 << 20)
    digest = fake_registry.add_model("team/model", "v1", {"model.bin": content})
    return f"{fake_registry.host}/team/model@{digest}", content


@pytest.fixture(scope="module")
def gib_model(docker_registry: object, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A model of 1 GiB in a real registry: its reference and the sha256 of its file."""
    source = tmp_path_factory.mktemp("gib")
    path = source / "model.safetensors"
    generator = random.Random(1)
    with open(path, "wb") as file:
        for _ in range(64):
            file.write(generator.randbytes(1 << 20) * 16)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    push = [*COMMAND, "push", str(source), f"{docker_registry.host}/team/gib:v1"]  # type: ignore[attr-defined]
    reference = subprocess.run(push, check=True, capture_output=True, text=True).stdout.strip()
    path.unlink()
    return reference, digest


@pytest.mark.registry
def test_sigkill_of_the_worker_in_the_middle_of_a_sha256sum_of_1_gib(
    modelmount_node: NodeProcess, gib_model: tuple[str, str]
) -> None:
    reference, expected = gib_model
    target = modelmount_node.target()
    modelmount_node.publish(reference, target)
    skip_without_resend(modelmount_node)
    reader = subprocess.Popen(["sha256sum", str(target / "model.safetensors")], stdout=subprocess.PIPE, text=True)
    killed = []
    for _ in range(3):
        time.sleep(0.3)
        if reader.poll() is not None:
            break
        pid = modelmount_node.status()[0]["worker_pid"]
        if pid not in killed:
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
    output, _ = reader.communicate(timeout=100)
    assert killed, "the file was read before the first kill"
    assert (reader.returncode, output.split()[0]) == (0, expected)
    mount = modelmount_node.status()[0]
    assert mount["worker_restarts"] >= len(killed)
    assert mount["reads"]["failed_reads"] == 0


def test_open_handles_mmaps_and_random_readers_go_on_over_many_kills(
    modelmount_node: NodeProcess, small_model: tuple[str, bytes]
) -> None:
    reference, content = small_model
    target = modelmount_node.target()
    modelmount_node.publish(reference, target)
    skip_without_resend(modelmount_node)
    path = target / "model.bin"
    stop = threading.Event()
    reads = [0]
    # In a process of its own: a SIGBUS or a hang must not take the test with it.
    script = f"""
import mmap, os, random, sys, time
content_sha = {hashlib.sha256(content).hexdigest()!r}
fd = os.open({str(path)!r}, os.O_RDONLY)
mapped = mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)
expected = open(sys.argv[1], 'rb').read()
deadline = time.monotonic() + 6
count = 0
while time.monotonic() < deadline:
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    offset = random.randrange(len(expected) - 200000)
    assert os.pread(fd, 150000, offset) == expected[offset:offset + 150000]
    offset = random.randrange(len(expected) - 200000)
    assert mapped[offset:offset + 5000] == expected[offset:offset + 5000]
    count += 1
print(count)
"""
    expected_path = modelmount_node.directory / "expected.bin"
    expected_path.write_bytes(content)

    def kill() -> None:
        while not stop.wait(0.7):
            pid = modelmount_node.status()[0]["worker_pid"]
            try:
                os.kill(pid, signal.SIGKILL)
                reads[0] += 1
            except ProcessLookupError:
                continue

    readers = [
        subprocess.Popen([sys.executable, "-c", script, str(expected_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    killer = threading.Thread(target=kill)
    killer.start()
    results = [(reader.communicate(timeout=90)[0], reader.returncode) for reader in readers]
    stop.set()
    killer.join()
    assert [status for _, status in results] == [0, 0, 0]
    assert all(int(output) > 0 for output, _ in results)
    assert reads[0] >= 3, "too few kills to prove anything"


def test_sigkill_of_the_fetcher_loses_no_read(modelmount_node: NodeProcess, small_model: tuple[str, bytes]) -> None:
    reference, content = small_model
    target = modelmount_node.target()
    modelmount_node.publish(reference, target)
    chunks: list[bytes] = []

    def read() -> None:
        with open(target / "model.bin", "rb", buffering=0) as file:
            while chunk := file.read(1 << 20):
                chunks.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    os.kill(modelmount_node.status()[0]["fetcher_pid"], signal.SIGKILL)
    reader.join(60)
    assert b"".join(chunks) == content
    deadline = time.monotonic() + 10
    while modelmount_node.status()[0]["fetcher_restarts"] != 1:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_republish_after_the_death_of_the_supervisor_goes_on_with_the_same_connection(
    tmp_path: Path, small_model: tuple[str, bytes]
) -> None:
    """The keeper holds the connection: open handles stay, reads wait for the republish and lose nothing."""
    reference, content = small_model
    with NodeProcess(tmp_path, "--spares=0") as node:
        target = node.target()
        node.publish(reference, target)
        skip_without_resend(node)
        file = open(target / "model.bin", "rb", buffering=0)  # noqa: SIM115 - open across the death
        with file:
            assert file.read(1000) == content[:1000]
            supervisor = SupervisorClient(str(node.state_dir)).ping()
            os.kill(supervisor, signal.SIGKILL)
            results: list[bytes] = []
            reader = threading.Thread(target=lambda: results.append(os.pread(file.fileno(), 100_000, 40 << 20)))
            reader.start()
            deadline = time.monotonic() + 20
            while True:
                try:
                    node.publish(reference, target)
                    break
                except grpc.RpcError as exc:
                    code = exc.code()
                assert code is grpc.StatusCode.UNAVAILABLE
                assert time.monotonic() < deadline
                time.sleep(0.1)
            reader.join(20)
            assert results == [content[40 << 20 :][:100_000]]
            assert file.read(1000) == content[1000:2000]
        node.unpublish(target)
        assert node.status() == []


def test_sigkill_of_the_keeper_is_noticed_by_nobody(tmp_path: Path, small_model: tuple[str, bytes]) -> None:
    reference, content = small_model
    with NodeProcess(tmp_path, "--spares=0") as node:
        target = node.target()
        node.publish(reference, target)
        keeper = KeeperClient(str(node.state_dir))
        for _ in range(3):
            os.kill(process_of(node.pid, "keeper"), signal.SIGKILL)
            assert (target / "model.bin").read_bytes() == content
            deadline = time.monotonic() + 20
            while not (kept := connected_mounts(keeper)):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            assert len(kept) == 1
        other = node.target("other")
        node.publish(reference, other, "vol-2")
        assert len({os.stat(path).st_dev for path in (target, other)}) == 1, "the same superblock still"
        node.unpublish(target)
        node.unpublish(other, "vol-2")
        assert keeper.mounts() == []


def connected_mounts(keeper: KeeperClient) -> list[str]:
    try:
        return [mount.mount_id for mount in keeper.mounts() if mount.connected]
    except ControlError:
        return []


def test_metadata_is_served_while_reads_wait_and_a_killed_reader_dies(
    modelmount_node: NodeProcess, fake_registry: FakeRegistry
) -> None:
    """The registry never answers for the blob; everything but its bytes works."""
    release = threading.Event()
    digest = "sha256:" + "1" * 64

    def never(offset: int, length: int) -> bytes:
        release.wait(30)
        return bytes(length)

    fake_registry.blob_readers[digest] = (1 << 20, never)
    from fakes.registry import model_manifest

    layer = {
        "mediaType": "application/vnd.cncf.model.weight.v1.raw",
        "digest": digest,
        "size": 1 << 20,
        "annotations": {"org.cncf.model.filepath": "slow.bin"},
    }
    fake_registry.add_manifest("team/slow", "v1", model_manifest([layer], fake_registry.add_blob(b"{}")))
    target = modelmount_node.target()
    modelmount_node.publish(f"{fake_registry.host}/team/slow:v1", target)
    try:
        reader = subprocess.Popen(["cat", str(target / "slow.bin")], stdout=subprocess.DEVNULL)
        time.sleep(0.5)
        assert os.listdir(target) == ["slow.bin"]
        assert (target / "slow.bin").stat().st_size == 1 << 20
        assert os.statvfs(target).f_blocks == 256
        reader.kill()
        started = time.monotonic()
        reader.wait(10)
        assert time.monotonic() - started < 3
        started = time.monotonic()
        modelmount_node.unpublish(target)
        assert time.monotonic() - started < 4, "an unpublish never waits for a registry"
    finally:
        release.set()


def test_what_a_reader_may_rely_on(modelmount_node: NodeProcess, fake_registry: FakeRegistry) -> None:
    """The examples of docs/semantics.md."""
    files = {"b.bin": bytes(range(256)) * 20000, "a/deep/er/c.txt": b"c", "run.sh": b"#!/bin/sh\n"}
    digest = fake_registry.add_model("team/semantics", "v1", files)
    target = modelmount_node.target()
    modelmount_node.publish(f"{fake_registry.host}/team/semantics@{digest}", target)
    assert sorted(os.listdir(target)) == ["a", "b.bin", "run.sh"]
    status = (target / "b.bin").stat()
    assert (status.st_mode & 0o7777, status.st_uid, status.st_size) == (0o444, 0, len(files["b.bin"]))
    assert (target / "a").stat().st_mode & 0o7777 == 0o555
    inode = status.st_ino
    with open(target / "b.bin", "rb") as file:
        assert os.pread(file.fileno(), 100, len(files["b.bin"]) - 10) == files["b.bin"][-10:]
        assert os.pread(file.fileno(), 100, len(files["b.bin"]) + 5) == b""
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            assert mapped[5_000_000:5_000_100] == files["b.bin"][5_000_000:5_000_100]
        file.seek(4 * 1024 * 1024 - 3)
        assert file.read(6) == files["b.bin"][4 * 1024 * 1024 - 3 :][:6], "across a block boundary"
    os.kill(modelmount_node.status()[0]["worker_pid"], signal.SIGKILL)
    assert (target / "b.bin").stat().st_ino == inode
    assert not (target / ".modelmount-flush-latch").exists()
    with pytest.raises(FileNotFoundError):
        (target / "nothing").stat()
    with pytest.raises(OSError, match="Operation not supported"):
        os.getxattr(target / "b.bin", "user.anything")


def test_the_worker_and_the_fetcher_have_no_rights(
    modelmount_node: NodeProcess, small_model: tuple[str, bytes]
) -> None:
    reference, _ = small_model
    modelmount_node.publish(reference, modelmount_node.target())
    mount = modelmount_node.status()[0]
    for pid in (mount["worker_pid"], mount["fetcher_pid"]):
        facts = dict(
            line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
        )
        assert facts["Uid"].split()[0] != "0"
        assert {facts[name].strip("0") for name in ("CapPrm", "CapEff", "CapInh", "CapAmb")} == {""}
        assert facts["NoNewPrivs"] == "1"
        assert facts["Groups"].strip() == ""


@pytest.mark.timeout(120)
def test_a_read_under_which_worker_after_worker_dies_ends_and_the_others_go_on(
    tmp_path: Path, fake_registry: FakeRegistry
) -> None:
    """Each of them has lived long enough to be taken for one that serves, and the read has not killed it at once."""
    content = random.Random(8).randbytes(64 << 20)
    digest = fake_registry.add_model("team/deadly", "v1", {"model.bin": content}, indexed=True)
    with NodeProcess(tmp_path / "n", "--fuse-backend=raw", "--read-deadline=8") as node:
        target = node.target()
        node.publish(f"{fake_registry.host}/team/deadly@{digest}", target, attributes={"prefetch": "ondemand"})
        fd = os.open(target / "model.bin", os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)

        def is_cached() -> bool:
            """Where the disk is slow the first readers are answered from memory, and nothing need be kept."""
            before = mount_of(node)["reads"]
            os.posix_fadvise(fd, 0, 4096, os.POSIX_FADV_DONTNEED)
            assert os.pread(fd, 4096, 0) == content[:4096]  # and what is fetched ahead of it is not all
            reads = mount_of(node)["reads"]
            return all(reads[name] == before[name] for name in ("waited_reads", "lent_reads"))

        wait_for(node, "the first block to be cached", is_cached)
        fake_registry.faults.append(Fault(match="/blobs/", status=503, times=1 << 30))
        ended: list[tuple[float, int | None]] = []

        def read() -> None:
            began, error = time.monotonic(), None
            try:
                os.pread(fd, 4096, 63 << 20)
            except OSError as exc:
                error = exc.errno
            ended.append((time.monotonic() - began, error))

        reader = threading.Thread(target=read)
        reader.start()
        kills = 0
        while reader.is_alive() and kills < 20:
            reader.join(1.2)
            with contextlib.suppress(ProcessLookupError, ControlError, ValueError):
                (mount,) = node.status()
                if mount["worker_alive"]:
                    os.kill(mount["worker_pid"], signal.SIGKILL)
                    kills += 1
            os.posix_fadvise(fd, 0, 4096, os.POSIX_FADV_DONTNEED)
            assert os.pread(fd, 4096, 0) == content[:4096], "what is cached is read meanwhile"
        print(f"{kills} workers were killed under it; it ended after {ended}")
        assert [error for _, error in ended] == [errno.EIO]
        assert kills > 3
        fake_registry.faults.clear()
        time.sleep(0.5)  # what is asked for again at once gets the same answer
        assert os.pread(fd, 4096, 63 << 20) == content[63 << 20 :][:4096]
        os.close(fd)
        node.unpublish_all()
