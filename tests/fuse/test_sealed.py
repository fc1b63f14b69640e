"""Complete, proven models shown as plain files: no process of ours in their reads, and nothing that takes them away."""

from __future__ import annotations

import mmap
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from fakes.registry import FakeRegistry
from support.node_process import COMMAND, NodeProcess, alive, process_of

from csi import mountinfo
from csi.control.keeper import KeeperClient
from csi.control.supervisor import SupervisorClient
from csi.errors import ControlError
from csi.stream.blocks import BLOCK_BYTES
from csi.wire import csi_pb2

pytestmark = pytest.mark.fuse

SIZE = 3 * BLOCK_BYTES + 4321


def files_of(name: str) -> dict[str, bytes]:
    return {"weights/w.bin": random.Random(name).randbytes(SIZE), "config.json": b"{}", "empty.txt": b""}


def wait_for(condition: Callable[[], bool], node: NodeProcess, what: str, seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: {node.status()} {node.log()}"
        time.sleep(0.05)


def mount_at(node: NodeProcess, target: Path) -> dict[str, Any]:
    return next(mount for mount in node.status() if str(target) in mount["targets"])


def is_sealed(target: Path) -> bool:
    (entry,) = mountinfo.at(mountinfo.read(), str(target))
    return mountinfo.sealed_mount(entry) is not None


def publish_complete(
    node: NodeProcess, registry: FakeRegistry, files: dict[str, bytes], repository: str = "team/a"
) -> tuple[str, Path]:
    """The model's reference, and a target that was published before it was complete, and is now."""
    reference = f"{registry.host}/{repository}@{registry.add_model(repository, 'v1', files, indexed=True)}"
    early = node.target("early")
    node.publish(reference, early, "early")
    wait_for(
        lambda: all(
            blob["state"] == "verified" for blob in mount_at(node, early)["progress"].get("blobs") or [{"state": ""}]
        ),
        node,
        "never complete",
    )
    wait_for(lambda: len(list(node.data_dir.rglob("mounts/*/*/hashes"))) > 0, node, "never proven")
    return reference, early


def publish_sealed(node: NodeProcess, reference: str, volume_id: str = "late") -> Path:
    """Another target of it, which shows plain files."""
    target = node.target(volume_id)
    node.publish(reference, target, volume_id)
    assert is_sealed(target), (mount_at(node, target)["sealed"], node.log())
    return target


def assert_shows(target: Path, files: dict[str, bytes]) -> None:
    found = {str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*") if path.is_file()}
    assert found == files


@pytest.mark.parametrize("flags", [("--passthrough=off",), ("--fuse-backend=pyfuse3",), ("--seal=always",)])
def test_a_complete_model_is_shown_as_plain_files(
    tmp_path: Path, fake_registry: FakeRegistry, flags: tuple[str, ...]
) -> None:
    files = files_of(flags[0])
    with NodeProcess(tmp_path / "node", *flags) as node:
        reference, early = publish_complete(node, fake_registry, files)
        assert not is_sealed(early), "it was shown before it was complete"
        target = publish_sealed(node, reference)
        assert_shows(target, files)
        assert_shows(early, files)
        (entry,) = mountinfo.at(mountinfo.read(), str(target))
        assert {"ro", "nosuid", "nodev", "noexec", "noatime"} <= entry.options
        for act in (
            lambda: os.open(target / "weights/w.bin", os.O_RDWR),
            lambda: os.unlink(target / "config.json"),
            lambda: os.chmod(target / "config.json", 0o777),
        ):
            with pytest.raises(OSError, match="Read-only"):
                act()
        mount = mount_at(node, target)
        assert mount["sealed"] == {"refusal": None, "targets": [str(target)]}
        reads = mount["reads"]
        for role in ("worker", "fetcher"):
            os.kill(mount[f"{role}_pid"], signal.SIGSTOP)
        with open(target / "weights/w.bin", "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            assert mapped[:] == files["weights/w.bin"], "nobody of ours is asked"
        for role in ("worker", "fetcher"):
            os.kill(mount[f"{role}_pid"], signal.SIGCONT)
        assert mount_at(node, target)["reads"] == reads
        node.publish(reference, target, "late")  # kubelet says it again
        assert is_sealed(target)
        shown = subprocess.run(
            [*COMMAND, "status", "--state-dir", str(node.state_dir)], check=True, capture_output=True, text=True
        ).stdout
        assert "1 of 2 volumes show plain files" in shown
        node.unpublish(target, "late")
        assert not target.exists()
        node.unpublish(early, "early")
        assert node.status() == []


def test_a_model_that_is_in_the_cache_already_is_shown_so_at_once(tmp_path: Path, fake_registry: FakeRegistry) -> None:
    files = files_of("again")
    with NodeProcess(tmp_path / "node", "--seal=always") as node:
        reference, early = publish_complete(node, fake_registry, files)
        node.unpublish(early, "early")
        wait_for(lambda: node.status() == [], node, "still mounted")
        assert_shows(publish_sealed(node, reference), files)
        node.unpublish_all()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ((), "the kernel reads proven files by itself"),
        (("--passthrough=off", "--seal=never"), "switched off"),
    ],
)
def test_where_it_is_not_wished_status_says_why(
    tmp_path: Path, fake_registry: FakeRegistry, flags: tuple[str, ...], reason: str
) -> None:
    with NodeProcess(tmp_path / "node", *flags) as node:
        reference, _ = publish_complete(node, fake_registry, files_of("not wished"))
        target = node.target()
        node.publish(reference, target)
        assert not is_sealed(target)
        assert reason in mount_at(node, target)["sealed"]["refusal"]
        node.unpublish_all()


def test_it_outlives_everything_of_ours_and_is_never_evicted(tmp_path: Path, fake_registry: FakeRegistry) -> None:
    files, other = files_of("outlives"), files_of("the other")
    with NodeProcess(tmp_path / "node", "--seal=always") as node:
        reference, early = publish_complete(node, fake_registry, files)
        target = publish_sealed(node, reference)
        node.unpublish(early, "early")
        for verb in ("keeper", "supervisor", "store", "node"):
            wait_for(lambda: _running(node, verb), node, f"no {verb}")  # noqa: B023
            pid = process_of(node.pid, verb)
            os.kill(pid, signal.SIGKILL)
            assert_shows(target, files)
            wait_for(lambda: _successor(node, verb, pid), node, f"no new {verb}")  # noqa: B023
            # Keeper and supervisor have each other's descriptors; of two at once see below.
            wait_for(lambda: _answers(node) and _is_connected(node), node, "no connection")
        client = SupervisorClient(str(node.state_dir))
        wait_for(lambda: _pruned(client), node, "no store")
        assert_shows(target, files)
        assert mount_at(node, target)["sealed"]["targets"] == [str(target)]
        publish_complete(node, fake_registry, other, "team/b")
        _pruned(client)
        assert_shows(target, files)
        node.unpublish(target, "late")
        node.unpublish_all()
        wait_for(lambda: node.status() == [], node, "still mounted")
        _pruned(client)
        assert list((node.data_dir / "cache").rglob("sealed/*")) == []


def test_the_keeper_alone_keeps_it_from_being_evicted(tmp_path: Path, fake_registry: FakeRegistry) -> None:
    """Keeper and supervisor die at once, so that the mount itself is lost; its plain files are still shown."""
    files = files_of("alone")
    with NodeProcess(tmp_path / "node", "--seal=always") as node:
        reference, early = publish_complete(node, fake_registry, files)
        target = publish_sealed(node, reference)
        node.unpublish(early, "early")
        pids = {verb: process_of(node.pid, verb) for verb in ("supervisor", "keeper")}
        for pid in pids.values():
            os.kill(pid, signal.SIGKILL)
        for verb, pid in pids.items():
            wait_for(lambda: _successor(node, verb, pid), node, f"no new {verb}")  # noqa: B023
        wait_for(lambda: _answers(node), node, "no supervisor")
        client = SupervisorClient(str(node.state_dir))
        wait_for(lambda: _pruned(client), node, "no store")
        assert_shows(target, files)
        node.publish(reference, target, "late")  # kubelet says it again
        assert_shows(target, files)
        node.unpublish(target, "late")
        assert not target.exists()


def test_a_blob_that_was_damaged_is_not_shown_again_and_the_next_copy_is(
    tmp_path: Path, fake_registry: FakeRegistry
) -> None:
    files = files_of("damage")
    with NodeProcess(tmp_path / "node", "--seal=always") as node:
        reference, early = publish_complete(node, fake_registry, files)
        node.unpublish(publish_sealed(node, reference), "late")
        node.unpublish(early, "early")
        (proven,) = (node.data_dir / "cache").rglob("blobs/*/data")
        with open(proven, "r+b") as file:
            file.seek(BLOCK_BYTES + 5)
            file.write(b"damage")
        target = node.target()
        node.publish(reference, target)
        assert not is_sealed(target), "it was written to since it was hashed"
        assert_shows(target, files)
        client = SupervisorClient(str(node.state_dir))
        assert client.cache("verify")["blobs"][0]["right"] is False
        node.unpublish_all()
        wait_for(lambda: node.status() == [], node, "still mounted")
        client.cache("prune")
        reference, early = publish_complete(node, fake_registry, files)
        wait_for(lambda: bool(list((node.data_dir / "cache").rglob("blobs/*/data"))), node, "never proven again")
        assert_shows(publish_sealed(node, reference), files)
        node.unpublish_all()


def _successor(node: NodeProcess, verb: str, before: int) -> bool:
    return not alive(before) and _running(node, verb)


def _running(node: NodeProcess, verb: str) -> bool:
    try:
        process_of(node.pid, verb)
    except (OSError, ValueError):  # one ended meanwhile, or there is none
        return False
    return True


def _answers(node: NodeProcess) -> bool:
    try:
        node.status()
        return bool(node.identity.Probe(csi_pb2.ProbeRequest(), timeout=5).ready.value)
    except (ControlError, grpc.RpcError):
        return False


def _is_connected(node: NodeProcess) -> bool:
    try:
        return all(mount.connected for mount in KeeperClient(str(node.state_dir)).mounts())
    except ControlError:
        return False


def _pruned(client: SupervisorClient) -> bool:
    try:
        client.cache("prune")
    except ControlError:
        return False
    return True
