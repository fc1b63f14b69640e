"""The CSI node service over its real socket, with real mounts and a real or a misbehaving registry."""

from __future__ import annotations

import base64
import errno
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import grpc
import pytest
from fakes.registry import MANIFEST_TYPE, FakeRegistry, Fault, model_manifest
from registry_process import PASSWORD, USERNAME, RegistryProcess
from support.node_process import COMMAND, NodeProcess, alive, children_of, mounts_below, publish_request

from csi.control.supervisor import SupervisorClient
from csi.wire import csi_pb2, registration_pb2, registration_pb2_grpc

pytestmark = pytest.mark.fuse

FILES = {"config.json": b'{"a": 1}', "weights/model.safetensors": os.urandom(9 * 1024 * 1024), "empty.txt": b""}


@pytest.fixture
def model(fake_registry: FakeRegistry) -> str:
    """A reference to FILES."""
    digest = fake_registry.add_model("team/model", "v1", FILES)
    return f"{fake_registry.host}/team/model@{digest}"


def refusal(call: object) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call()  # type: ignore[operator]
    return caught.value


def assert_untouched(node: NodeProcess, target: Path) -> None:
    """Nothing is mounted, nothing was made, nothing runs for it."""
    assert not target.exists()
    assert mounts_below(node.directory) == []
    assert node.status() == []


def test_identity_and_capabilities(modelmount_node: NodeProcess) -> None:
    info = modelmount_node.identity.GetPluginInfo(csi_pb2.GetPluginInfoRequest(), timeout=5)
    assert info.name == "csi.modelmount.dev"
    assert info.vendor_version
    assert modelmount_node.node.NodeGetInfo(csi_pb2.NodeGetInfoRequest(), timeout=5).node_id == "test-node"
    with pytest.raises(grpc.RpcError) as caught:
        modelmount_node.node.NodeStageVolume(csi_pb2.NodeStageVolumeRequest(), timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_every_file_is_there_with_its_bytes_and_gone_after_unpublish(modelmount_node: NodeProcess, model: str) -> None:
    target = modelmount_node.target()
    modelmount_node.publish(model, target)
    for name, content in FILES.items():
        assert (target / name).read_bytes() == content
    assert sorted(os.listdir(target)) == ["config.json", "empty.txt", "weights"]
    modelmount_node.unpublish(target)
    assert_untouched(modelmount_node, target)


def test_publish_twice_is_a_no_op_and_unpublish_twice_too(modelmount_node: NodeProcess, model: str) -> None:
    target = modelmount_node.target()
    modelmount_node.publish(model, target)
    before = mounts_below(modelmount_node.directory)
    modelmount_node.publish(model, target, secrets={"username": "other", "password": "secret"})
    assert mounts_below(modelmount_node.directory) == before
    modelmount_node.unpublish(target)
    modelmount_node.unpublish(target)
    modelmount_node.unpublish(modelmount_node.target("never"), "unknown-volume")


def test_other_arguments_at_the_same_target_conflict(
    modelmount_node: NodeProcess, fake_registry: FakeRegistry, model: str
) -> None:
    other = fake_registry.add_model("team/other", "v1", {"a": b"b"})
    target = modelmount_node.target()
    modelmount_node.publish(model, target)
    error = refusal(lambda: modelmount_node.publish(f"{fake_registry.host}/team/other@{other}", target))
    assert error.code() is grpc.StatusCode.ALREADY_EXISTS
    assert refusal(lambda: modelmount_node.publish(model, target, "vol-2")).code() is grpc.StatusCode.ALREADY_EXISTS
    assert (target / "config.json").read_bytes() == FILES["config.json"]


def test_two_volumes_of_one_model_share_a_superblock(modelmount_node: NodeProcess, model: str) -> None:
    targets = [modelmount_node.target(name) for name in ("a", "b")]
    for number, target in enumerate(targets):
        modelmount_node.publish(model, target, f"vol-{number}")
    assert len({os.stat(target).st_dev for target in targets}) == 1
    assert len(modelmount_node.status()) == 1
    modelmount_node.unpublish(targets[0], "vol-0")
    assert (targets[1] / "config.json").read_bytes() == FILES["config.json"]
    modelmount_node.unpublish(targets[1], "vol-1")
    assert modelmount_node.status() == []


def test_a_moved_tag_does_not_move_a_published_volume(
    modelmount_node: NodeProcess, fake_registry: FakeRegistry
) -> None:
    fake_registry.add_model("team/moving", "prod", {"version": b"one"})
    reference = f"{fake_registry.host}/team/moving:prod"
    first, second, other = (modelmount_node.target(name) for name in ("first", "second", "other"))
    modelmount_node.publish(reference, first, "same-volume")
    fake_registry.add_model("team/moving", "prod", {"version": b"two"})
    modelmount_node.publish(reference, second, "same-volume")
    modelmount_node.publish(reference, other, "new-volume")
    assert (first / "version").read_bytes() == (second / "version").read_bytes() == b"one"
    assert (other / "version").read_bytes() == b"two"
    modelmount_node.unpublish(first, "same-volume")
    modelmount_node.unpublish(second, "same-volume")
    modelmount_node.publish(reference, first, "same-volume")
    assert (first / "version").read_bytes() == b"two", "the last unpublish ends the pin"


@pytest.mark.parametrize("indexed", [False, True])
def test_many_publishes_at_once_make_one_mount(
    modelmount_node: NodeProcess, fake_registry: FakeRegistry, indexed: bool
) -> None:
    digest = fake_registry.add_model("team/model", "v1", FILES, indexed=indexed)
    model = f"{fake_registry.host}/team/model@{digest}"
    targets = [modelmount_node.target(f"pod-{number}") for number in range(8)]
    errors: list[Exception] = []

    def publish(number: int) -> None:
        try:
            modelmount_node.publish(model, targets[number], f"vol-{number}")
        except Exception as exc:
            errors.append(exc)

    threads = [threading.Thread(target=publish, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len({os.stat(target).st_dev for target in targets}) == 1


def test_the_mount_is_read_only_whatever_was_asked_for(modelmount_node: NodeProcess, model: str) -> None:
    target = modelmount_node.target()
    modelmount_node.publish(model, target, readonly=False)
    for attempt in (
        lambda: (target / "new").write_bytes(b""),
        lambda: (target / "config.json").write_bytes(b""),
        lambda: (target / "config.json").unlink(),
        lambda: (target / "weights").rename(target / "w"),
        lambda: (target / "config.json").chmod(0o777),
    ):
        with pytest.raises(OSError) as caught:
            attempt()
        assert caught.value.errno == errno.EROFS
    assert os.statvfs(target).f_flag & os.ST_RDONLY


def test_stats_come_from_memory_and_only_for_what_is_published(modelmount_node: NodeProcess, model: str) -> None:
    target = modelmount_node.target()
    modelmount_node.publish(model, target)
    request = csi_pb2.NodeGetVolumeStatsRequest(volume_id="vol-1", volume_path=str(target))
    usage = modelmount_node.node.NodeGetVolumeStats(request, timeout=5).usage
    assert usage[0].total == usage[0].used == sum(map(len, FILES.values()))
    request.volume_path = "/elsewhere"
    error = refusal(lambda: modelmount_node.node.NodeGetVolumeStats(request, timeout=5))
    assert error.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda r: r.ClearField("volume_id"), "volume_id"),
        (lambda r: r.ClearField("target_path"), "target_path"),
        (lambda r: r.ClearField("volume_capability"), "volume_capability"),
        (lambda r: r.volume_capability.block.SetInParent(), "Block"),
        (lambda r: r.volume_capability.ClearField("access_mode"), "access_mode"),
        (lambda r: r.volume_capability.mount.mount_flags.append("rw"), "mountOptions"),
        (lambda r: r.volume_context.update({"colour": "red"}), "colour"),
        (lambda r: r.volume_context.update({"reference": "no-registry/model"}), "registry host"),
        (lambda r: r.volume_context.update({"reference": "r.io/m@sha256:12"}), "64"),
        (lambda r: r.volume_context.pop("reference"), "reference"),
        (lambda r: r.volume_context.update({"modelRef": "r.io/other:1"}), "different models"),
        (lambda r: r.volume_context.update({"verify": "never"}), "whole"),
        (lambda r: r.secrets.update({"token": "x"}), "username and password"),
        (lambda r: r.volume_context.update({"reference": "oci-layout:/etc:x"}), "--layout-root"),
    ],
)
def test_a_wrong_request_names_its_field(modelmount_node: NodeProcess, model: str, change: object, word: str) -> None:
    target = modelmount_node.target()
    request = publish_request(model, target)
    change(request)  # type: ignore[operator]
    error = refusal(lambda: modelmount_node.node.NodePublishVolume(request, timeout=30))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert word in error.details()
    assert_untouched(modelmount_node, target)


def test_an_unknown_digest_is_not_found(modelmount_node: NodeProcess, fake_registry: FakeRegistry, model: str) -> None:
    target = modelmount_node.target()
    error = refusal(lambda: modelmount_node.publish(f"{fake_registry.host}/team/model@sha256:{'0' * 64}", target))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert "NAME_UNKNOWN" in error.details()
    assert_untouched(modelmount_node, target)


def test_a_registry_that_is_down_is_unavailable(modelmount_node: NodeProcess) -> None:
    target = modelmount_node.target()
    error = refusal(lambda: modelmount_node.publish("127.0.0.1:1/team/model:v1", target))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "cannot connect" in error.details()
    assert_untouched(modelmount_node, target)


@pytest.mark.registry
def test_credentials_are_needed_checked_and_used(
    modelmount_node: NodeProcess, private_registry: RegistryProcess, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_bytes(FILES["config.json"])
    reference = f"{private_registry.host}/team/private:v1"
    push = [*COMMAND, "push", str(source), reference]
    assert subprocess.run(push, capture_output=True).returncode == 1
    subprocess.run([*push, "--username", USERNAME, "--password-stdin"], input=PASSWORD, text=True, check=True)
    target = modelmount_node.target()
    for secrets, code in (
        (None, grpc.StatusCode.PERMISSION_DENIED),
        ({"username": USERNAME, "password": "wrong"}, grpc.StatusCode.UNAUTHENTICATED),
    ):
        error = refusal(lambda secrets=secrets: modelmount_node.publish(reference, target, secrets=secrets))
        assert error.code() is code
        assert_untouched(modelmount_node, target)
    login = base64.b64encode(f"{USERNAME}:{PASSWORD}".encode()).decode()
    elsewhere = {".dockerconfigjson": json.dumps({"auths": {"elsewhere.example.com": {"auth": login}}})}
    assert refusal(lambda: modelmount_node.publish(reference, target, secrets=elsewhere)).code() is (
        grpc.StatusCode.PERMISSION_DENIED
    )
    auths = {
        f"{private_registry.host}/team/private": {"username": USERNAME, "password": "rotated"},
        f"https://{private_registry.host}/v2/": {"auth": login},
    }
    pull_secret = {".dockerconfigjson": json.dumps({"auths": auths})}
    modelmount_node.publish(reference, target, secrets=pull_secret)
    assert (target / "config.json").read_bytes() == FILES["config.json"]
    modelmount_node.publish(reference, target, secrets={"username": USERNAME, "password": PASSWORD})
    other = modelmount_node.target("other")
    error = refusal(lambda: modelmount_node.publish(reference, other, "vol-2"))
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED, "a mounted private model is not a free one"
    assert PASSWORD not in modelmount_node.log_path.read_text()


def test_a_manifest_that_is_not_a_model_is_refused(modelmount_node: NodeProcess, fake_registry: FakeRegistry) -> None:
    layer = {
        "mediaType": "application/vnd.cncf.helm.chart.content.v1.tar+gzip",
        "digest": fake_registry.add_blob(b"x"),
        "size": 1,
    }
    config = {
        "mediaType": "application/vnd.cncf.helm.config.v1+json",
        "digest": fake_registry.add_blob(b"{}"),
        "size": 2,
    }
    content = json.dumps({"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": config, "layers": [layer]}).encode()
    fake_registry.add_manifest("team/chart", "v1", content)
    target = modelmount_node.target()
    error = refusal(lambda: modelmount_node.publish(f"{fake_registry.host}/team/chart:v1", target))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "application/vnd.cncf.helm.chart.content.v1.tar+gzip" in error.details()
    assert_untouched(modelmount_node, target)


def test_manifest_bytes_that_do_not_match_the_digest_are_refused(
    modelmount_node: NodeProcess, fake_registry: FakeRegistry, model: str
) -> None:
    fake_registry.faults.append(Fault(match="/manifests/", flip_at=20))
    target = modelmount_node.target()
    error = refusal(lambda: modelmount_node.publish(model, target))
    assert error.code() is grpc.StatusCode.DATA_LOSS
    assert_untouched(modelmount_node, target)
    modelmount_node.publish(model, target)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../b", "a\x00b", "a//b", ""])
def test_a_hostile_file_name_is_refused(modelmount_node: NodeProcess, fake_registry: FakeRegistry, name: str) -> None:
    fake_registry.add_model("team/hostile", "v1", {name: b"x"})
    target = modelmount_node.target()
    error = refusal(lambda: modelmount_node.publish(f"{fake_registry.host}/team/hostile:v1", target))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert_untouched(modelmount_node, target)


def test_a_blob_shorter_than_its_descriptor_fails_the_read_with_eio_and_a_reason(
    modelmount_node: NodeProcess, fake_registry: FakeRegistry
) -> None:
    digest = fake_registry.add_blob(b"short")
    layer = {
        "mediaType": "application/vnd.cncf.model.weight.v1.raw",
        "digest": digest,
        "size": 4096,
        "annotations": {"org.cncf.model.filepath": "model.bin"},
    }
    fake_registry.add_manifest("team/short", "v1", model_manifest([layer], fake_registry.add_blob(b"{}")))
    target = modelmount_node.target()
    modelmount_node.publish(f"{fake_registry.host}/team/short:v1", target)
    with pytest.raises(OSError) as caught:
        (target / "model.bin").read_bytes()
    assert caught.value.errno == errno.EIO
    (mount,) = modelmount_node.status()
    assert "4096" in mount["progress"]["last_error"]
    modelmount_node.unpublish(target)


def test_a_blob_with_wrong_bytes_is_found_and_not_served_again(
    modelmount_node: NodeProcess, fake_registry: FakeRegistry, model: str
) -> None:
    fake_registry.faults.append(Fault(match="/blobs/", flip_at=3, times=100))
    target = modelmount_node.target()
    modelmount_node.publish(model, target)
    deadline = time.monotonic() + 20
    while not any(event["reason"] == "IntegrityFailure" for event in modelmount_node.status()[0]["events"]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    fd = os.open(target / "config.json", os.O_RDONLY | os.O_DIRECT)
    try:
        with pytest.raises(OSError) as caught:
            os.preadv(fd, [memoryview(bytearray(4096))], 0)
    finally:
        os.close(fd)
    assert caught.value.errno == errno.EIO


def test_a_target_with_content_is_left_alone(modelmount_node: NodeProcess, model: str) -> None:
    target = modelmount_node.target()
    target.mkdir()
    (target / "precious").write_text("data")
    error = refusal(lambda: modelmount_node.publish(model, target))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "precious" in error.details()
    assert (target / "precious").read_text() == "data"
    assert mounts_below(modelmount_node.directory) == []
    error = refusal(lambda: modelmount_node.unpublish(target))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert (target / "precious").read_text() == "data"


def test_a_link_on_the_way_to_the_target_is_refused(modelmount_node: NodeProcess, model: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    error = refusal(lambda: modelmount_node.publish(model, tmp_path / "link" / "mount"))
    assert "symbolic link" in error.details()
    assert os.listdir(tmp_path / "elsewhere") == []


def test_a_registry_that_comes_back_within_the_deadline_costs_the_reader_nothing(
    modelmount_node: NodeProcess, fake_registry: FakeRegistry, model: str
) -> None:
    fake_registry.faults.append(Fault(match="/blobs/", status=503, times=12))
    target = modelmount_node.target()
    modelmount_node.publish(model, target)
    for name, content in FILES.items():
        assert (target / name).read_bytes() == content
    assert modelmount_node.status()[0]["progress"]["retries"] > 0


def test_a_registry_that_stays_away_ends_reads_at_their_deadline(
    modelmount_node: NodeProcess, fake_registry: FakeRegistry, model: str
) -> None:
    fake_registry.faults.append(Fault(match="/blobs/", status=503, times=10_000))
    target = modelmount_node.target()
    modelmount_node.publish(model, target)
    started = time.monotonic()
    with pytest.raises(OSError) as caught:
        (target / "config.json").read_bytes()
    assert caught.value.errno == errno.EIO
    assert 4 < time.monotonic() - started < 20
    assert os.listdir(target), "names never wait for the network"
    modelmount_node.unpublish(target)


def test_every_block_is_fetched_once_however_many_readers_there_are(
    modelmount_node: NodeProcess, fake_registry: FakeRegistry, model: str
) -> None:
    target = modelmount_node.target()
    modelmount_node.publish(model, target)
    path = target / "weights/model.safetensors"
    contents: list[bytes] = []
    threads = [threading.Thread(target=lambda: contents.append(path.read_bytes())) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert contents == [FILES["weights/model.safetensors"]] * 6
    covered: list[int] = []
    for seen in fake_registry.requests("/blobs/"):
        assert seen.range is not None
        first, last = map(int, seen.range.removeprefix("bytes=").split("-"))
        covered += range(first // (4 << 20), last // (4 << 20) + 1) if last >= 4 << 20 else []
    assert sorted(covered) == sorted(set(covered))


def test_a_model_of_many_files_is_mounted_at_once_and_whole(
    modelmount_node: NodeProcess, fake_registry: FakeRegistry
) -> None:
    """More files than a process may usually have open."""
    files = {f"shard-{number % 40}/{number}.bin": str(number).encode() for number in range(1500)}
    digest = fake_registry.add_model("team/many", "v1", files)
    target = modelmount_node.target()
    modelmount_node.publish(f"{fake_registry.host}/team/many@{digest}", target)
    assert {name: (target / name).read_bytes() for name in files} == files


def test_the_cache_survives_a_restart_of_everything(tmp_path: Path, fake_registry: FakeRegistry, model: str) -> None:
    with NodeProcess(tmp_path, "--spares=0") as node:
        target = node.target()
        node.publish(model, target)
        assert (target / "weights/model.safetensors").read_bytes() == FILES["weights/model.safetensors"]
        while not all(blob["state"] == "verified" for blob in node.status()[0]["progress"]["blobs"]):
            time.sleep(0.02)
        node.unpublish(target)
    asked = len(fake_registry.requests("/blobs/"))
    with NodeProcess(tmp_path, "--spares=0") as node:
        node.publish(model, target)
        assert (target / "weights/model.safetensors").read_bytes() == FILES["weights/model.safetensors"]
        node.unpublish(target)
    assert len(fake_registry.requests("/blobs/")) == asked


def test_publications_survive_a_restart_of_the_node_process_alone(tmp_path: Path, model: str) -> None:
    with NodeProcess(tmp_path, "--spares=0") as modelmount_node:
        kill_the_node_process_and_go_on(modelmount_node, model)


def kill_the_node_process_and_go_on(modelmount_node: NodeProcess, model: str) -> None:
    target = modelmount_node.target()
    modelmount_node.publish(model, target)
    node_pids = [
        pid for pid in children_of(modelmount_node.pid) if b"\0node\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    assert len(node_pids) == 1
    os.kill(node_pids[0], signal.SIGKILL)
    assert (target / "config.json").read_bytes() == FILES["config.json"]
    deadline = time.monotonic() + 20
    codes = set()
    while True:
        try:
            modelmount_node.publish(model, target)
            break
        except grpc.RpcError as exc:
            codes.add(exc.code())
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert codes <= {grpc.StatusCode.UNAVAILABLE}, "kubelet takes any other code as final"
    assert (target / "weights/model.safetensors").read_bytes() == FILES["weights/model.safetensors"]
    modelmount_node.unpublish(target)
    assert_untouched(modelmount_node, target)


def test_a_mount_that_was_lost_is_made_anew_by_the_next_publish(tmp_path: Path, model: str) -> None:
    with NodeProcess(tmp_path, "--spares=0") as node:
        target = node.target()
        node.publish(model, target)
        node.stop()
        node.start()
        with pytest.raises(OSError) as caught:
            os.listdir(target)
        assert caught.value.errno == errno.ENOTCONN
        node.publish(model, target)
        assert (target / "config.json").read_bytes() == FILES["config.json"]
        node.unpublish(target)
        assert not target.exists()


def test_a_killed_parent_takes_its_process_tree_along(tmp_path: Path, model: str) -> None:
    with NodeProcess(tmp_path, "--spares=0") as node:
        target = node.target()
        node.publish(model, target)
        family = children_of(node.pid)
        assert len(family) == 7
        os.kill(node.pid, signal.SIGKILL)
        deadline = time.monotonic() + 20
        while any(alive(pid) for pid in family):
            assert time.monotonic() < deadline, [pid for pid in family if alive(pid)]
            time.sleep(0.05)
        node.stop()
        node.start()
        node.publish(model, target)
        assert (target / "config.json").read_bytes() == FILES["config.json"]
        node.unpublish(target)


def test_a_missing_dev_fuse_is_said_at_the_start(tmp_path: Path) -> None:
    """In a mount name space of its own where /dev/fuse is hidden."""
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare(1)")
    command = " ".join([*COMMAND, "keeper", "--state-dir", str(tmp_path / "state")])
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"mount -t tmpfs none /dev && exec {command}"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "/dev/fuse is missing" in done.stderr
    assert "modprobe fuse" in done.stderr


def test_kubelet_can_register_the_driver(tmp_path: Path) -> None:
    registry_dir = tmp_path / "r"
    flags = (
        f"--registration-dir={registry_dir}",
        "--kubelet-endpoint=/var/lib/kubelet/plugins/x/csi.sock",
        "--spares=0",
    )
    with NodeProcess(tmp_path / "node", *flags) as node:
        deadline = time.monotonic() + 20
        while not (found := list(registry_dir.glob("[!.]*.sock"))):
            assert time.monotonic() < deadline, node.log()
            time.sleep(0.02)
        with grpc.insecure_channel(f"unix:{found[0]}") as channel:
            stub = registration_pb2_grpc.RegistrationStub(channel)
            info = stub.GetInfo(registration_pb2.InfoRequest(), timeout=5)
            assert (info.type, info.name) == ("CSIPlugin", "csi.modelmount.dev")
            assert info.endpoint == "/var/lib/kubelet/plugins/x/csi.sock"
            assert list(info.supported_versions) == ["1.0.0"]
            stub.NotifyRegistrationStatus(registration_pb2.RegistrationStatus(plugin_registered=True), timeout=5)
    assert list(registry_dir.iterdir()) == [], "a stopped driver takes its socket away"


def test_a_socket_path_that_is_too_long_is_said_at_the_start(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 110) / "csi.sock"
    command = [*COMMAND, "node", "--endpoint", f"unix://{long}", "--state-dir", str(tmp_path / "s")]
    done = subprocess.run([*command, "--data-dir", str(tmp_path / "d")], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert "107" in done.stderr


def test_a_node_process_that_starts_ends_leases_of_earlier_ones_only(modelmount_node: NodeProcess, model: str) -> None:
    """One that is given while it recovers is of a publish which is on its way."""
    supervisor = SupervisorClient(str(modelmount_node.state_dir))
    started = time.monotonic()
    target = modelmount_node.target()
    modelmount_node.publish(model, target)
    supervisor.reconcile([], started)
    assert modelmount_node.status(), "given after the start"
    assert (target / "config.json").read_bytes() == FILES["config.json"]
    supervisor.reconcile([], time.monotonic())
    assert modelmount_node.status() == [], "of an earlier process, and not known any more"
    modelmount_node.unpublish(target)
