"""Volume and storage health over the CSI socket: each cause shows with its reason, and is gone when the cause is."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from fakes.registry import FakeRegistry, Fault
from support.hang import hung
from support.node_process import NodeProcess

from csi.wire import csi_pb2

pytestmark = pytest.mark.fuse

FILES = {"config.json": b'{"a": 1}', "model.safetensors": os.urandom(9 * 1024 * 1024)}


@pytest.fixture
def published(modelmount_node: NodeProcess, fake_registry: FakeRegistry) -> Iterator[Path]:
    """FILES, while the registry serves no blobs."""
    fake_registry.faults.append(Fault(match="/blobs/", status=503, times=1_000_000))
    digest = fake_registry.add_model("team/model", "v1", FILES)
    target = modelmount_node.target()
    modelmount_node.publish(f"{fake_registry.host}/team/model@{digest}", target)
    yield target
    modelmount_node.unpublish(target)


def health(node: NodeProcess, target: Path, volume_id: str = "vol-1") -> dict[str, tuple[str, str]]:
    """Reason → how bad and the message."""
    request = csi_pb2.NodeGetVolumeHealthRequest(volume_id=volume_id, volume_publish_path=str(target))
    answer = node.node.NodeGetVolumeHealth(request, timeout=10).volume_health
    assert answer.volume_id == volume_id
    return {
        entry.reason: (csi_pb2.VolumeHealthErrorType.Name(entry.status), entry.message)
        for entry in answer.health_statuses
    }


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_node_says_that_it_reports_health(modelmount_node: NodeProcess) -> None:
    reply = modelmount_node.node.NodeGetCapabilities(csi_pb2.NodeGetCapabilitiesRequest(), timeout=5)
    rpc = csi_pb2.NodeServiceCapability.RPC
    kinds = {one.rpc.type for one in reply.capabilities}
    assert kinds == {rpc.GET_VOLUME_STATS, rpc.GET_VOLUME_HEALTH, rpc.GET_STORAGE_HEALTH}


def test_a_registry_that_is_away_shows_until_it_is_back(
    modelmount_node: NodeProcess, fake_registry: FakeRegistry, published: Path
) -> None:
    eventually(lambda: health(modelmount_node, published))
    ((reason, (status, message)),) = health(modelmount_node, published).items()
    assert (reason, status) == ("RegistryUnreachable", "DEGRADED")
    assert "503" in message
    storage = modelmount_node.node.NodeGetStorageHealth(csi_pb2.NodeGetStorageHealthRequest(), timeout=10)
    assert [one.reason for one in storage.backend_health] == ["RegistryUnreachable"]
    assert modelmount_node.identity.Probe(csi_pb2.ProbeRequest(), timeout=5).ready.value
    fake_registry.faults.clear()
    eventually(lambda: not health(modelmount_node, published))
    storage = modelmount_node.node.NodeGetStorageHealth(csi_pb2.NodeGetStorageHealthRequest(), timeout=10)
    assert not storage.backend_health


def test_refused_credentials_show_as_such(
    modelmount_node: NodeProcess, fake_registry: FakeRegistry, published: Path
) -> None:
    fake_registry.faults[:] = [Fault(match="/blobs/", status=403, times=1_000_000)]
    eventually(lambda: "CredentialsExpired" in health(modelmount_node, published))
    fake_registry.faults.clear()
    eventually(lambda: not health(modelmount_node, published))


def test_without_a_path_the_volume_is_asked_about_wherever_it_is(modelmount_node: NodeProcess, published: Path) -> None:
    request = csi_pb2.NodeGetVolumeHealthRequest(volume_id="vol-1")
    eventually(lambda: modelmount_node.node.NodeGetVolumeHealth(request, timeout=10).volume_health.health_statuses)


def test_wrong_bytes_are_data_loss(modelmount_node: NodeProcess, fake_registry: FakeRegistry, published: Path) -> None:
    fake_registry.faults[:] = [Fault(match="/blobs/", flip_at=3, times=1_000_000)]
    eventually(lambda: "IntegrityFailure" in health(modelmount_node, published))
    status, message = health(modelmount_node, published)["IntegrityFailure"]
    assert status == "DATA_LOSS"
    assert "sha256:" in message


def test_a_worker_that_hangs_shows_while_stats_and_probe_answer(
    modelmount_node: NodeProcess, fake_registry: FakeRegistry, published: Path
) -> None:
    fake_registry.faults.clear()
    eventually(lambda: not health(modelmount_node, published))
    worker = modelmount_node.status()[0]["worker_pid"]
    with hung(worker):
        assert "WorkerNotAnswering" in health(modelmount_node, published)
        request = csi_pb2.NodeGetVolumeStatsRequest(volume_id="vol-1", volume_path=str(published))
        started = time.monotonic()
        assert modelmount_node.node.NodeGetVolumeStats(request, timeout=5).usage
        assert time.monotonic() - started < 1
        assert modelmount_node.identity.Probe(csi_pb2.ProbeRequest(), timeout=5).ready.value
    eventually(lambda: not health(modelmount_node, published))


def test_an_aborted_connection_is_lost_until_the_next_publish(
    modelmount_node: NodeProcess, fake_registry: FakeRegistry, published: Path, tmp_path: Path
) -> None:
    fake_registry.faults.clear()
    reference = modelmount_node.status()[0]["reference"]
    minor = modelmount_node.status()[0]["device"].partition(":")[2]
    control = tmp_path / "fusectl"
    control.mkdir()
    subprocess.run(["mount", "-t", "fusectl", "none", control], check=True)
    try:
        (control / minor / "abort").write_text("1")
    finally:
        subprocess.run(["umount", control], check=True)
    eventually(lambda: "MountLost" in health(modelmount_node, published))
    assert health(modelmount_node, published)["MountLost"][0] == "INACCESSIBLE"
    modelmount_node.publish(reference, published)
    eventually(lambda: not health(modelmount_node, published))
    assert (published / "config.json").read_bytes() == FILES["config.json"]


@pytest.mark.parametrize(
    ("volume_id", "path", "code"),
    [
        ("", "/x", grpc.StatusCode.INVALID_ARGUMENT),
        ("vol-1", "/nowhere", grpc.StatusCode.NOT_FOUND),
        ("other", "", grpc.StatusCode.NOT_FOUND),
    ],
)
def test_health_of_what_is_not_published(
    modelmount_node: NodeProcess, volume_id: str, path: str, code: grpc.StatusCode
) -> None:
    request = csi_pb2.NodeGetVolumeHealthRequest(volume_id=volume_id, volume_publish_path=path)
    with pytest.raises(grpc.RpcError) as caught:
        modelmount_node.node.NodeGetVolumeHealth(request, timeout=5)
    assert caught.value.code() is code
