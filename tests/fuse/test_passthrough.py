"""Files that are proven blobs are read by the kernel itself: without a worker, and never mixed with reads through one."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes.registry import FakeRegistry
from support.node_process import NodeProcess, process_of

from csi.control.supervisor import SupervisorClient
from csi.oci.digest import Digest
from csi.stream.blocks import BLOCK_BYTES

pytestmark = pytest.mark.fuse

SIZE = 3 * BLOCK_BYTES + 4321


@pytest.fixture
def content(request: pytest.FixtureRequest) -> bytes:
    return random.Random(request.node.name).randbytes(SIZE)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeProcess]:
    with NodeProcess(tmp_path / "node", "--read-deadline=10") as node:
        yield node
        node.unpublish_all()


def mount_at(node: NodeProcess, target: Path) -> dict[str, Any]:
    return next(mount for mount in node.status() if str(target) in mount["targets"])


def wait_for(condition: Callable[[], bool], node: NodeProcess, what: str, seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: {node.status()} {node.log()}"
        time.sleep(0.05)


def passes(node: NodeProcess, target: Path, content: bytes) -> bool:
    return str(Digest.of(content)) in mount_at(node, target)["passthrough"]["blobs"]


def publish(node: NodeProcess, registry: FakeRegistry, content: bytes) -> Path:
    registry.add_model("team/a", "v1", {"w.bin": content, "small.txt": b"small"}, indexed=True)
    target = node.target()
    node.publish(f"{registry.host}/team/a:v1", target)
    return target


def publish_proven(node: NodeProcess, registry: FakeRegistry, content: bytes) -> Path:
    target = publish(node, registry, content)
    wait_for(lambda: passes(node, target, content), node, "the blob is not passed through")
    mount_at(node, target)  # the worker answers in order: it has heard of it by now
    return target


def opens(node: NodeProcess, target: Path) -> tuple[int, int]:
    """Of them, by passthrough."""
    reads = mount_at(node, target)["reads"]
    return reads["opens"], reads["passed_opens"]


def test_a_proven_file_is_read_without_a_worker(node: NodeProcess, fake_registry: FakeRegistry, content: bytes) -> None:
    target = publish_proven(node, fake_registry, content)
    reads = mount_at(node, target)["reads"]["reads"]
    with open(target / "w.bin", "rb", buffering=0) as file:
        assert opens(node, target) == (1, 1)
        worker = mount_at(node, target)["worker_pid"]
        os.kill(worker, signal.SIGSTOP)
        try:
            assert file.read(SIZE + 1) == content
            with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
                assert mapped[:] == content
            assert os.pread(file.fileno(), 100, SIZE - 50) == content[-50:]
            assert os.pread(file.fileno(), 100, SIZE) == b""
        finally:
            os.kill(worker, signal.SIGCONT)
    assert mount_at(node, target)["reads"]["reads"] == reads
    assert opens(node, target) == (1, 1)
    assert (target / "small.txt").read_bytes() == b"small"
    assert opens(node, target) == (2, 1)
    with pytest.raises(OSError, match="Read-only"):
        os.open(target / "w.bin", os.O_RDWR)


def test_what_is_open_through_the_worker_stays_so_until_it_is_closed(
    node: NodeProcess, fake_registry: FakeRegistry, content: bytes
) -> None:
    target = publish(node, fake_registry, content)
    with open(target / "w.bin", "rb", buffering=0) as early:
        mapped = mmap.mmap(early.fileno(), 0, prot=mmap.PROT_READ)
        wait_for(lambda: passes(node, target, content), node, "the blob is not passed through")
        assert (target / "w.bin").read_bytes() == content
    assert mapped[:] == content
    with open(target / "w.bin", "rb") as still:
        assert still.read() == content, "the mapping holds the file open"
    assert opens(node, target) == (3, 0)
    mapped.close()
    wait_for(lambda: (target / "w.bin").read_bytes() == content and opens(node, target)[1] > 0, node, "never passed")
    with open(target / "w.bin", "rb") as passed:
        assert passed.read() == content


def test_a_new_worker_a_new_keeper_and_the_next_open_have_the_same_file(
    node: NodeProcess, fake_registry: FakeRegistry, content: bytes
) -> None:
    target = publish_proven(node, fake_registry, content)
    with open(target / "w.bin", "rb", buffering=0) as file:
        for role in ("worker", "fetcher"):
            pid = mount_at(node, target)[f"{role}_pid"]
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda: mount_at(node, target)[f"{role}_pid"] not in (None, pid), node, f"no new {role}")  # noqa: B023
            assert os.pread(file.fileno(), SIZE, 0) == content
            assert (target / "w.bin").read_bytes() == content, "another id would be EIO"
    wait_for(lambda: passes(node, target, content), node, "the blob is not passed through any more")
    assert (target / "w.bin").read_bytes() == content
    assert opens(node, target)[1] > 0


def test_nothing_is_passed_through_when_it_is_switched_off(
    tmp_path: Path, fake_registry: FakeRegistry, content: bytes
) -> None:
    for flags, reason in ((("--passthrough=off",), "switched off"), (("--fuse-backend=pyfuse3",), "pyfuse3")):
        with NodeProcess(tmp_path / flags[0], *flags) as node:
            target = publish(node, fake_registry, content)
            assert (target / "w.bin").read_bytes() == content
            wait_for(lambda: len(list(node.data_dir.rglob("hashes"))) == 2, node, "never proven")
            assert (target / "w.bin").read_bytes() == content
            found = mount_at(node, target)["passthrough"]
            assert reason in found["refusal"]
            assert found["blobs"] == []
            node.unpublish_all()


def test_a_cache_on_an_overlay_is_read_through_the_worker_and_status_says_why(
    tmp_path: Path, fake_registry: FakeRegistry, content: bytes
) -> None:
    directory = tmp_path / "node"
    for name in ("lower", "upper", "work"):
        (tmp_path / name).mkdir()
    (directory / "data").mkdir(parents=True)
    options = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(directory / "data")], check=True)
    try:
        with NodeProcess(directory) as node:
            target = publish(node, fake_registry, content)
            assert (target / "w.bin").read_bytes() == content
            wait_for(lambda: mount_at(node, target)["passthrough"]["refusal"] is not None, node, "no reason")
            assert "stacked" in mount_at(node, target)["passthrough"]["refusal"]
            assert (target / "w.bin").read_bytes() == content
            node.unpublish_all()
    finally:
        subprocess.run(["umount", "-l", str(directory / "data")], check=False)


def damage(node: NodeProcess) -> None:
    (proven,) = (node.data_dir / "cache").rglob("blobs/*/data")
    with open(proven, "r+b") as file:
        file.seek(BLOCK_BYTES + 5)
        file.write(b"damage")


def test_what_was_written_to_since_it_was_proven_is_not_passed_through(
    node: NodeProcess, fake_registry: FakeRegistry, content: bytes
) -> None:
    target = publish_proven(node, fake_registry, content)
    node.unpublish(target)
    damage(node)
    target = node.target()
    node.publish(f"{fake_registry.host}/team/a:v1", target)
    for _ in range(3):
        assert (target / "w.bin").read_bytes() == content
    wait_for(lambda: "is damaged" in node.log_path.read_text(), node, "the store did not look again")
    assert (target / "w.bin").read_bytes() == content
    assert not passes(node, target, content)
    assert opens(node, target)[1] == 0


def test_a_blob_of_an_earlier_boot_is_hashed_before_it_is_passed_through(
    node: NodeProcess, fake_registry: FakeRegistry, content: bytes
) -> None:
    target = publish_proven(node, fake_registry, content)
    node.unpublish(target)
    (about,) = (node.data_dir / "cache").rglob("blobs/*/about")
    import json

    known = json.loads(about.read_text())
    known["proof"]["boot"] = "0" * 32
    about.write_text(json.dumps(known))
    fake_registry.seen.clear()
    target = node.target()
    node.publish(f"{fake_registry.host}/team/a:v1", target)
    wait_for(lambda: passes(node, target, content), node, "the blob is not passed through")
    assert json.loads(about.read_text())["proof"]["boot"] != "0" * 32
    assert (target / "w.bin").read_bytes() == content
    assert opens(node, target) == (1, 1)
    assert fake_registry.requests(str(Digest.of(content))) == []


def test_damage_that_a_mount_finds_ends_passthrough_and_costs_no_byte(
    tmp_path: Path, fake_registry: FakeRegistry, content: bytes
) -> None:
    """A disk that forgets without a write: the time of the last one stays."""
    with NodeProcess(tmp_path / "node") as node:
        target = publish(node, fake_registry, content)
        with open(target / "w.bin", "rb") as early:
            wait_for(lambda: passes(node, target, content), node, "the blob is not passed through")
            (proven,) = (node.data_dir / "cache").rglob("blobs/*/data")
            before = proven.stat()
            damage(node)
            os.utime(proven, ns=(before.st_atime_ns, before.st_mtime_ns))
            os.kill(mount_at(node, target)["fetcher_pid"], signal.SIGKILL)  # the next one checks what it finds
            wait_for(lambda: mount_at(node, target)["fetcher_restarts"] == 1, node, "no new fetcher")
            wait_for(lambda: bool(mount_at(node, target)["progress"].get("blobs")), node, "no new engine")
            os.posix_fadvise(early.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert early.read() == content
            wait_for(lambda: not passes(node, target, content), node, "still passed through")
        for _ in range(3):
            assert (target / "w.bin").read_bytes() == content
        assert SupervisorClient(str(node.state_dir)).cache("verify")["blobs"][0]["right"] is False
        node.unpublish_all()


@pytest.mark.timeout(300)
def test_opens_and_kills_at_random_are_never_an_error(
    tmp_path: Path, fake_registry: FakeRegistry, content: bytes
) -> None:
    """Both ways of opening, from many threads, across dead workers and while the blob becomes proven."""
    wrong: list[str] = []
    stop = threading.Event()
    with NodeProcess(tmp_path / "node") as node:
        target = publish(node, fake_registry, content)

        def read(seed: int) -> None:
            own = random.Random(seed)
            while not stop.is_set() and not wrong:
                try:
                    with open(target / "w.bin", "rb", buffering=0) as file:
                        for _ in range(own.randrange(1, 4)):
                            offset, length = own.randrange(SIZE), own.randrange(1, 300_000)
                            if os.pread(file.fileno(), length, offset) != content[offset : offset + length]:
                                wrong.append(f"other bytes at {offset}+{length}")
                        if own.random() < 0.3:
                            with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
                                start = own.randrange(SIZE)
                                if mapped[start : start + 5000] != content[start : start + 5000]:
                                    wrong.append(f"other bytes mapped at {start}")
                except OSError as exc:
                    wrong.append(str(exc))
                time.sleep(own.random() * 0.02)

        readers = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
        for reader in readers:
            reader.start()
        chosen = random.Random(7)
        try:
            for _ in range(12):
                time.sleep(chosen.random() * 0.8)
                with contextlib.suppress(ProcessLookupError, StopIteration):
                    if (pid := mount_at(node, target)["worker_pid"]) is not None:
                        os.kill(pid, signal.SIGKILL)
        finally:
            stop.set()
            for reader in readers:
                reader.join(60)
        assert wrong == []
        wait_for(lambda: passes(node, target, content), node, "the blob is not passed through")
        assert (target / "w.bin").read_bytes() == content
        node.unpublish_all()


def test_the_ids_outlive_the_keeper(tmp_path: Path, fake_registry: FakeRegistry, content: bytes) -> None:
    from support.node_process import COMMAND

    with NodeProcess(tmp_path / "node") as node:
        target = publish_proven(node, fake_registry, content)
        with open(target / "w.bin", "rb", buffering=0) as file:
            before = process_of(node.pid, "keeper")
            keeper = subprocess.Popen([*COMMAND, "keeper", "--take-over", "--state-dir", str(node.state_dir)])
            try:
                wait_for(
                    lambda: not Path(f"/proc/{before}").exists() or keeper.poll() is not None, node, "no hand-over"
                )
                os.kill(mount_at(node, target)["worker_pid"], signal.SIGKILL)
                assert (target / "w.bin").read_bytes() == content, "another id would be EIO"
                assert os.pread(file.fileno(), SIZE, 0) == content
                node.unpublish_all()
            finally:
                keeper.terminate()
                keeper.wait(10)
