"""What kubelet does with pods' volumes, done to the real driver: registration, the exact calls, what its answers lead to,
and what is left when kubelet, the driver or the whole machine was away meanwhile.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from fakes.kubelet import TOKENS_KEY, Claimed, CSIDriver, FakeKubelet, Inline, Pod, volume_handle
from fakes.registry import FakeRegistry, Fault, model_manifest
from support.containers import Container, VolumeMount
from support.machine import Machine
from support.node_process import COMMAND, NodeProcess, process_of

from csi.cache.format import CHECKED_NAME, HASHES_NAME
from csi.wire import csi_pb2

pytestmark = pytest.mark.fuse

FILES = {"config.json": b'{"a": 1}', "weights/model.safetensors": os.urandom(9 * 1024 * 1024)}
READER = """
import hashlib, os, sys
for line in sys.stdin:
    try:
        name = line.strip()
        print(sorted(os.listdir(name)) if os.path.isdir(name) else hashlib.sha256(open(name, "rb").read()).hexdigest(), flush=True)
    except OSError as exc:
        print(exc.strerror, flush=True)
"""
SERVER = [sys.executable, "-c", READER]
HASHES = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}


@pytest.fixture(scope="module")
def shared_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with Machine(tmp_path_factory.mktemp("m"), "--read-deadline=5") as machine:
        yield machine


@pytest.fixture
def machine(shared_machine: Machine) -> Iterator[Machine]:
    """The shared one, without any pod before and after the test. Nothing in the test may have done a pod harm."""
    kubelet = shared_machine.kubelet
    kubelet.driver = CSIDriver()
    kubelet.calls.clear()
    kubelet.events.clear()
    yield shared_machine
    kubelet.wait_registered()
    kubelet.delete(*kubelet.pods.values())
    kubelet.advance(300)
    assert shared_machine.mounts() == []
    assert list((kubelet.root / "pods").iterdir()) == []
    assert kubelet.harm == []


@pytest.fixture
def own_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """For tests that switch it off, or take its driver away."""
    with Machine(tmp_path_factory.mktemp("m"), "--read-deadline=5", "--spares=0") as machine:
        yield machine
        assert machine.kubelet.harm == []


@pytest.fixture
def model(fake_registry: FakeRegistry) -> str:
    """A reference to FILES."""
    return f"{fake_registry.host}/team/model@{fake_registry.add_model('team/model', 'v1', FILES)}"


def pod_of(reference: str, name: str = "pod", **changes: str) -> Pod:
    """A pod with one inline volume `model`."""
    return Pod(name=name, volumes=[Inline(name="model", attributes={"reference": reference} | changes)])


def shows(kubelet: FakeKubelet, pod: Pod, volume: str = "model") -> bytes:
    return (kubelet.target(pod, volume) / "weights/model.safetensors").read_bytes()


# --- registration


def test_the_driver_registers_by_kubelets_handshake(machine: Machine) -> None:
    kubelet = machine.kubelet
    kubelet.restart()
    kubelet.wait_registered()
    assert [call.rpc for call in kubelet.calls] == ["GetInfo", "NodeGetInfo", "NotifyRegistrationStatus"]
    info = kubelet.calls[0].request
    assert (info.type, info.name, list(info.supported_versions)) == ("CSIPlugin", "csi.modelmount.dev", ["1.0.0"])
    assert kubelet.node_id == "test-node"
    assert kubelet.calls[-1].request.plugin_registered


def test_a_second_instance_is_refused_until_the_first_has_gone(own_machine: Machine) -> None:
    """As when two generations of the node's pod overlap: kubelet keeps the one it has."""
    kubelet = own_machine.kubelet
    directory = own_machine.directory / "n"
    # kubelet looks into directories below plugins_registry too.
    with NodeProcess(directory, f"--registration-dir={kubelet.plugins_registry}/2", "--spares=0") as second:
        kubelet.sync_plugins()
        refused = kubelet.calls_of("NotifyRegistrationStatus")[-1].request
        assert not refused.plugin_registered
        assert any("kubelet refuses csi.modelmount.dev" in line["message"] for line in second.log_lines())
        second.identity.Probe(csi_pb2.ProbeRequest(), timeout=10)
        own_machine.node.stop()
        kubelet.sync_plugins()
        assert kubelet.calls_of("NotifyRegistrationStatus")[-1].request.plugin_registered
    kubelet.sync_plugins()
    assert not kubelet.registered, "a stopped driver takes its socket away"


def test_an_instance_at_the_same_socket_says_that_another_one_is_there(own_machine: Machine) -> None:
    flags = (f"--endpoint=unix://{own_machine.node.socket_path}", "--node-id=x", "--no-registration")
    directories = (f"--state-dir={own_machine.directory}/s", f"--data-dir={own_machine.directory}/t")
    done = subprocess.run([*COMMAND, "node", *flags, *directories], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "another CSI driver listens" in done.stderr
    own_machine.node.identity.Probe(csi_pb2.ProbeRequest(), timeout=10)


def test_a_restarted_driver_is_registered_again(own_machine: Machine, model: str) -> None:
    kubelet, pod = own_machine.kubelet, pod_of(model)
    os.kill(process_of(own_machine.node.pid, "node"), signal.SIGKILL)  # no time to take its socket away
    eventually(lambda: len(kubelet.calls_of("NotifyRegistrationStatus")) > 1, kubelet.sync_plugins)
    kubelet.run(pod)
    kubelet.advance(10)
    assert shows(kubelet, pod) == FILES["weights/model.safetensors"]
    own_machine.node.stop()
    kubelet.sync_plugins()
    assert not kubelet.registered
    own_machine.node.start()
    kubelet.wait_registered()
    kubelet.delete(pod)
    kubelet.advance(10)
    assert kubelet.is_gone(pod)


# --- what is sent, and when


def test_an_inline_volume_comes_with_kubelets_arguments_and_is_mounted(machine: Machine, model: str) -> None:
    kubelet = machine.kubelet
    kubelet.driver = CSIDriver(token_requests=["registry.example"], tokens_in_secrets=True)
    pod = Pod(
        name="web",
        namespace="apps",
        service_account="reader",
        volumes=[Inline(name="model", attributes={"reference": model}, read_only=False)],
    )
    kubelet.run(pod)
    assert kubelet.is_mounted(pod), kubelet.events
    assert shows(kubelet, pod) == FILES["weights/model.safetensors"]
    assert [call.rpc for call in kubelet.calls] == ["NodeGetCapabilities", "NodeGetCapabilities", "NodePublishVolume"]
    request = kubelet.calls[-1].request
    assert request.volume_id == volume_handle(pod, pod.volumes[0])
    assert len(request.volume_id.encode()) <= 128
    assert request.target_path == f"{kubelet.root}/pods/{pod.uid}/volumes/kubernetes.io~csi/model/mount"
    assert request.volume_capability.access_mode.mode == csi_pb2.VolumeCapability.AccessMode.SINGLE_NODE_WRITER
    assert not request.readonly
    assert request.volume_context["csi.storage.k8s.io/ephemeral"] == "true"
    assert request.volume_context["csi.storage.k8s.io/serviceAccount.name"] == "reader"
    assert set(request.secrets) == {TOKENS_KEY}
    with pytest.raises(OSError, match="Read-only"):
        (kubelet.target(pod, "model") / "new").touch()


def test_a_persistent_volume_comes_with_kubelets_arguments_and_is_mounted(machine: Machine, model: str) -> None:
    kubelet = machine.kubelet
    kubelet.secrets["models", "pull"] = {"username": "u", "password": "p"}
    volume = Claimed(
        name="model",
        persistent_volume="pv-1",
        handle="handle-1",
        attributes={"reference": model},
        mount_options=["ro", "noatime"],
        secret=("models", "pull"),
    )
    pod = Pod(name="web", volumes=[volume])
    kubelet.run(pod)
    assert kubelet.is_mounted(pod), kubelet.events
    request = kubelet.calls[-1].request
    assert request.volume_id == "handle-1"
    assert request.target_path.endswith("/volumes/kubernetes.io~csi/pv-1/mount")
    assert request.volume_capability.access_mode.mode == csi_pb2.VolumeCapability.AccessMode.MULTI_NODE_READER_ONLY
    assert request.secrets == {"username": "u", "password": "p"}
    assert shows(kubelet, pod) == FILES["weights/model.safetensors"]


def test_a_secret_that_does_not_exist_yet_is_waited_for(machine: Machine, model: str) -> None:
    kubelet = machine.kubelet
    pod = Pod(name="pod", volumes=[Inline(name="model", attributes={"reference": model}, secret="late")])
    kubelet.run(pod)
    assert 'secrets "late" not found' in kubelet.events_of(pod)[-1]
    kubelet.secrets["default", "late"] = {"username": "u", "password": "p"}
    kubelet.advance(1)
    assert kubelet.is_mounted(pod)


def test_a_volume_is_published_twice_in_a_second_and_every_minute_and_nobody_notices(
    machine: Machine, fake_registry: FakeRegistry, model: str
) -> None:
    kubelet, pod = machine.kubelet, pod_of(model)
    kubelet.run(pod)
    with Container(kubelet, pod, SERVER, VolumeMount(name="model", at="m")) as container:
        assert container.ask("/mnt/m/weights/model.safetensors") == HASHES["weights/model.safetensors"]
        mounts, asked = machine.mounts(), len(fake_registry.requests("/"))
        workers = [mount["worker_pid"] for mount in machine.node.status()]
        kubelet.advance(1)
        assert len(kubelet.calls_of("NodePublishVolume")) == 2
        kubelet.advance(600)
        assert len(kubelet.calls_of("NodePublishVolume")) > 8
        assert {call.code for call in kubelet.calls} == {grpc.StatusCode.OK}
        assert machine.mounts() == mounts
        assert [mount["worker_pid"] for mount in machine.node.status()] == workers
        assert len(fake_registry.requests("/")) == asked, "a republish within the hour asks nobody"
        assert container.ask("/mnt/m/config.json") == HASHES["config.json"]


def test_a_rotated_token_changes_nothing_but_the_login(machine: Machine, model: str) -> None:
    """kubelet brings another token with each publish, in volume_context where the cluster is old."""
    kubelet = machine.kubelet
    for in_secrets in (True, False):
        kubelet.driver = CSIDriver(token_requests=["a", "b"], tokens_in_secrets=in_secrets)
        pod = pod_of(model, f"pod-{in_secrets}")
        kubelet.token = lambda pod, audience: f"token-{kubelet.now}-{audience}"
        kubelet.run(pod)
        mounts = machine.mounts()
        kubelet.advance(200)
        sent = {
            str(call.request.secrets or call.request.volume_context) for call in kubelet.calls_of("NodePublishVolume")
        }
        assert len(sent) > 2
        assert {call.code for call in kubelet.calls} == {grpc.StatusCode.OK}
        assert machine.mounts() == mounts
    assert "token-" not in machine.node.log_path.read_text()


# --- what answers lead to


def test_while_the_registry_is_down_the_volume_is_uncertain_and_a_deleted_pod_is_unpublished(
    machine: Machine, fake_registry: FakeRegistry, model: str
) -> None:
    kubelet, pod = machine.kubelet, pod_of(model)
    fake_registry.faults.append(Fault(match="/manifests/", status=503, times=1_000_000))
    kubelet.run(pod)
    assert kubelet.calls[-1].code is grpc.StatusCode.UNAVAILABLE
    assert fake_registry.host in kubelet.events_of(pod)[-1]
    assert (kubelet.target(pod, "model").parent / "vol_data.json").exists()
    kubelet.advance(4)
    assert len(kubelet.calls_of("NodePublishVolume")) == 4, "half a second, doubled each time"
    kubelet.delete(pod)
    kubelet.advance(10)
    assert kubelet.calls[-1].rpc == "NodeUnpublishVolume"
    assert kubelet.is_gone(pod)
    assert machine.node.status() == []


def test_a_pod_that_waited_for_its_registry_starts_when_it_is_back(
    machine: Machine, fake_registry: FakeRegistry, model: str
) -> None:
    kubelet, pod = machine.kubelet, pod_of(model)
    fake_registry.faults.append(Fault(match="/manifests/", status=503, times=1_000_000))
    kubelet.run(pod)
    fake_registry.faults.clear()
    kubelet.advance(1)
    assert kubelet.is_mounted(pod)
    assert shows(kubelet, pod) == FILES["weights/model.safetensors"]


@pytest.mark.parametrize("attribute", ["reference", "unknown"])
def test_a_final_refusal_leaves_nothing_and_is_explained_and_mended(
    machine: Machine, fake_registry: FakeRegistry, model: str, attribute: str
) -> None:
    """kubelet removes its own traces and never calls NodeUnpublishVolume; the volume is tried again all the same."""
    kubelet = machine.kubelet
    missing = f"{fake_registry.host}/team/later:v1"
    pod = pod_of(missing) if attribute == "reference" else pod_of(model, colour="red")
    kubelet.run(pod)
    code, word = {
        "reference": (grpc.StatusCode.NOT_FOUND, missing),
        "unknown": (grpc.StatusCode.INVALID_ARGUMENT, "colour"),
    }[attribute]
    assert kubelet.calls[-1].code is code
    assert word in kubelet.events_of(pod)[-1]
    assert not kubelet.target(pod, "model").parent.exists()
    assert machine.node.status() == []
    kubelet.advance(20)
    assert not kubelet.calls_of("NodeUnpublishVolume")
    if attribute == "reference":
        fake_registry.add_model("team/later", "v1", FILES)
        kubelet.advance(60)
        assert shows(kubelet, pod) == FILES["weights/model.safetensors"]


def test_a_live_volume_never_gets_a_final_answer(machine: Machine, fake_registry: FakeRegistry, model: str) -> None:
    """The model is gone from its registry, and the login is refused: the pod reads on, its mounts stay."""
    kubelet, pod = machine.kubelet, pod_of(model)
    kubelet.run(pod)
    assert shows(kubelet, pod) == FILES["weights/model.safetensors"]
    mounts = machine.mounts()
    for status in (404, 401, 403, 500):
        fake_registry.faults[:] = [Fault(match="/", status=status, times=1_000_000)]
        kubelet.restart()
        kubelet.wait_registered()
        kubelet.advance(200)
        assert kubelet.is_mounted(pod)
        assert machine.mounts() == mounts
    with Container(kubelet, pod, SERVER, VolumeMount(name="model", at="m")) as container:
        assert container.ask("/mnt/m/config.json") == HASHES["config.json"]


# --- kubelet, driver or machine away


def test_a_restarted_kubelet_publishes_every_live_volume_at_once_and_unpublishes_the_rest(
    machine: Machine, model: str
) -> None:
    kubelet = machine.kubelet
    pods = [pod_of(model, f"pod-{number}") for number in range(20)]
    kubelet.run(*pods)
    assert all(kubelet.is_mounted(pod) for pod in pods)
    mounts = machine.mounts()
    kubelet.restart()
    assert not kubelet.is_mounted(pods[0])
    gone = [kubelet.pods.pop(pod.uid) for pod in pods[15:]]  # deleted while it was away
    kubelet.calls.clear()
    kubelet.wait_registered()
    kubelet.sync()
    codes = [call.code for call in kubelet.calls_of("NodePublishVolume")]
    assert codes == [grpc.StatusCode.OK] * 15
    assert all(kubelet.is_mounted(pod) for pod in pods[:15])
    assert all(kubelet.is_gone(pod) for pod in gone)
    gone_targets = {str(kubelet.root / "pods" / pod.uid / "volumes/kubernetes.io~csi/model/mount") for pod in gone}
    assert set(machine.mounts()) == set(mounts) - gone_targets


def test_a_pod_deleted_while_the_driver_is_down_is_gone_when_it_is_back(own_machine: Machine, model: str) -> None:
    kubelet, pod = own_machine.kubelet, pod_of(model)
    kubelet.run(pod)
    own_machine.node.stop()
    kubelet.delete(pod)
    kubelet.advance(30)
    assert not kubelet.is_gone(pod)
    assert grpc.StatusCode.OK not in [call.code for call in kubelet.calls_of("NodeUnpublishVolume")]
    own_machine.node.start()
    kubelet.wait_registered()
    kubelet.advance(130)
    assert kubelet.calls_of("NodeUnpublishVolume")[-1].code is grpc.StatusCode.OK
    assert kubelet.is_gone(pod)
    assert own_machine.mounts() == []


def test_an_unpublish_is_repeated_until_the_keeper_is_back(own_machine: Machine, model: str) -> None:
    """The keeper is stopped, not dead: kubelet hears UNAVAILABLE, keeps the volume, and calls again."""
    kubelet, pod = own_machine.kubelet, pod_of(model)
    kubelet.run(pod)
    keeper = process_of(own_machine.node.pid, "keeper")
    os.kill(keeper, signal.SIGSTOP)
    try:
        kubelet.delete(pod)
        assert kubelet.calls_of("NodeUnpublishVolume")[-1].code is grpc.StatusCode.UNAVAILABLE
        assert not kubelet.is_gone(pod)
    finally:
        os.kill(keeper, signal.SIGCONT)
    kubelet.advance(300)
    assert kubelet.is_gone(pod)
    assert own_machine.mounts() == []


def is_durable(data_dir: Path) -> bool:
    """Whether every blob of every mount is proven and will be believed at the next boot: its block hashes are on disk."""
    blobs = list(data_dir.glob("cache/v*/*/mounts/*/sha256-*"))
    return bool(blobs) and all(any((blob / name).exists() for name in (CHECKED_NAME, HASHES_NAME)) for blob in blobs)


@pytest.mark.parametrize("run_is_tmpfs", [True, False])
def test_after_a_reboot_pods_get_the_same_bytes_though_the_tag_moved_and_the_registry_is_gone(
    own_machine: Machine, run_is_tmpfs: bool
) -> None:
    """kubelet's directories are there, every process and mount is gone, and the kernel says another boot id."""
    kubelet = own_machine.kubelet
    with FakeRegistry() as registry:
        registry.add_model("team/model", "prod", FILES)
        stays, goes = (
            pod_of(f"{registry.host}/team/model:prod", "stays"),
            pod_of(f"{registry.host}/team/model:prod", "goes"),
        )
        kubelet.run(stays, goes)
        assert shows(kubelet, stays) == FILES["weights/model.safetensors"]
        eventually(lambda: is_durable(own_machine.node.data_dir))
        registry.add_model("team/model", "prod", {"weights/model.safetensors": b"another version"})
        own_machine.switch_off(run_is_tmpfs=run_is_tmpfs)
        assert own_machine.mounts() == []
        kubelet.pods.pop(goes.uid)  # deleted while the machine was off: it has to be cleared away
        registry.faults.append(Fault(match="/", status=503, times=1_000_000))
        own_machine.switch_on()
        kubelet.advance(5)
        assert kubelet.is_mounted(stays), kubelet.events_of(stays)
        assert kubelet.is_gone(goes)
        assert shows(kubelet, stays) == FILES["weights/model.safetensors"]
        new = pod_of(f"{registry.host}/team/model:prod", "new")
        kubelet.run(new)
        assert not kubelet.is_mounted(new), "what the tag names now only its registry can say"
        registry.faults.clear()
        kubelet.advance(5)
        assert shows(kubelet, new) == b"another version"
        kubelet.delete(stays, new)
        kubelet.advance(10)
        assert own_machine.mounts() == []
        assert not list((own_machine.node.data_dir / "pins").iterdir()), "the last unpublish ends the pin"


# --- containers


def test_containers_see_the_model_and_its_parts_read_only_without_set_user_id_bits(
    machine: Machine, model: str
) -> None:
    kubelet, pod = machine.kubelet, pod_of(model)
    kubelet.run(pod)
    mounts = (
        VolumeMount(name="model", at="m", read_only=False),
        VolumeMount(name="model", at="dir", sub_path="weights"),
        VolumeMount(name="model", at="file", sub_path="config.json"),
    )
    with Container(kubelet, pod, SERVER, *mounts) as container:
        assert container.ask("/mnt/m") == "['config.json', 'weights']"
        assert container.ask("/mnt/dir") == "['model.safetensors']"
        assert container.ask("/mnt/dir/model.safetensors") == HASHES["weights/model.safetensors"]
        assert container.ask("/mnt/file") == HASHES["config.json"]
    kubelet.delete(pod)
    kubelet.advance(5)
    assert kubelet.is_gone(pod)


def test_a_pods_volume_goes_while_another_pods_container_reads_on(machine: Machine, model: str) -> None:
    kubelet = machine.kubelet
    pods = [pod_of(model, name) for name in ("a", "b")]
    kubelet.run(*pods)
    with Container(kubelet, pods[0], SERVER, VolumeMount(name="model", at="m")) as container:
        container.ask("/mnt/m/config.json")
        kubelet.delete(pods[1])
        kubelet.advance(5)
        assert kubelet.is_gone(pods[1])
        assert container.ask("/mnt/m/weights/model.safetensors") == HASHES["weights/model.safetensors"]


def test_a_container_that_outlives_its_volume_is_told_and_keeps_nothing_alive(machine: Machine, model: str) -> None:
    """A runtime that is late: kubelet unpublishes first. The container's private bind is all that is left of the mount."""
    kubelet, pod = machine.kubelet, pod_of(model)
    kubelet.run(pod)
    with Container(kubelet, pod, SERVER, VolumeMount(name="model", at="m")) as container:
        container.ask("/mnt/m/config.json")
        kubelet.delete(pod)
        kubelet.advance(5)
        assert kubelet.is_gone(pod)
        assert machine.node.status() == []


def test_a_restarted_container_sees_a_mount_that_was_made_anew(own_machine: Machine, model: str) -> None:
    """Keeper and supervisor were both lost. What runs keeps a dead mount; kubelet's next publish heals the target, and the
    container that is started again reads.
    """
    kubelet, pod = own_machine.kubelet, pod_of(model)
    kubelet.run(pod)
    mount = VolumeMount(name="model", at="m")
    with Container(kubelet, pod, SERVER, mount) as container:
        assert container.ask("/mnt/m/config.json") == HASHES["config.json"]
        own_machine.node.stop()
        own_machine.node.start()
        assert container.ask("/mnt/m") == "Transport endpoint is not connected"
        kubelet.wait_registered()
        kubelet.advance(80)
        assert kubelet.is_mounted(pod)
        assert container.ask("/mnt/m") == "Transport endpoint is not connected", "its bind is private"
    with Container(kubelet, pod, SERVER, mount) as container:
        assert container.ask("/mnt/m/weights/model.safetensors") == HASHES["weights/model.safetensors"]
    kubelet.delete(pod)
    kubelet.advance(10)
    assert kubelet.is_gone(pod)
    assert own_machine.mounts() == []


def test_a_running_container_sees_a_mount_that_was_made_anew_where_it_asks_for_that(
    own_machine: Machine, model: str
) -> None:
    """`mountPropagation: HostToContainer`: the dead mount is covered in the container too, again and again."""
    kubelet, pod = own_machine.kubelet, pod_of(model)
    kubelet.run(pod)
    mount = VolumeMount(name="model", at="m", host_to_container=True)
    with Container(kubelet, pod, SERVER, mount) as container:
        for _ in range(2):
            assert container.ask("/mnt/m/config.json") == HASHES["config.json"]
            own_machine.node.stop()
            own_machine.node.start()
            assert container.ask("/mnt/m") == "Transport endpoint is not connected"
            kubelet.wait_registered()
            kubelet.advance(80)
            assert kubelet.is_mounted(pod)
            assert container.ask("/mnt/m/weights/model.safetensors") == HASHES["weights/model.safetensors"]
        kubelet.delete(pod)
        kubelet.advance(10)
    assert kubelet.is_gone(pod)
    assert own_machine.mounts() == []


WRITES = r"""
import ctypes, errno, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def raw(name, *arguments):
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)
d, f = "/mnt/m/weights", "/mnt/m/config.json"
attempts = {
    "create": lambda: os.open(d + "/new", os.O_CREAT | os.O_WRONLY),
    "exclusive": lambda: os.open(d + "/new", os.O_CREAT | os.O_EXCL | os.O_RDONLY),
    "write": lambda: os.open(f, os.O_WRONLY),
    "read-write": lambda: os.open(f, os.O_RDWR),
    "append": lambda: os.open(f, os.O_WRONLY | os.O_APPEND),
    "open-truncate": lambda: os.open(f, os.O_RDONLY | os.O_TRUNC),
    "tmpfile": lambda: os.open(d, os.O_TMPFILE | os.O_RDWR),
    "truncate": lambda: os.truncate(f, 0),
    "unlink": lambda: os.unlink(f),
    "rmdir": lambda: os.rmdir(d),
    "mkdir": lambda: os.mkdir(d + "/new"),
    "mknod": lambda: os.mknod(d + "/new"),
    "fifo": lambda: os.mkfifo(d + "/new"),
    "symlink": lambda: os.symlink("x", d + "/new"),
    "link": lambda: os.link(f, "/mnt/m/new"),
    "rename": lambda: os.rename(f, "/mnt/m/new"),
    "exchange": lambda: raw("renameat2", -100, f.encode(), -100, d.encode(), 2),
    "chmod": lambda: os.chmod(f, 0o777),
    "chown": lambda: os.chown(f, 1, 1),
    "utime": lambda: os.utime(f),
    "setxattr": lambda: os.setxattr(f, "user.x", b"1"),
    "removexattr": lambda: os.removexattr(f, "user.x"),
}
for name, attempt in attempts.items():
    try:
        attempt()
        print(name, "worked")
    except OSError as exc:
        if exc.errno != errno.EROFS:
            print(name, errno.errorcode[exc.errno])
print(open("/mnt/m/config.json").read())
"""


def test_every_way_to_write_fails_with_a_read_only_file_system(machine: Machine, model: str) -> None:
    """As root, in a container whose mount is not even read-only."""
    kubelet, pod = machine.kubelet, pod_of(model)
    kubelet.run(pod)
    with Container(
        kubelet, pod, [sys.executable, "-c", WRITES], VolumeMount(name="model", at="m", read_only=False)
    ) as one:
        assert one.result() == (0, FILES["config.json"].decode() + "\n", "")


INSPECT = r"""
import errno, json, os
(line,) = [line for line in open("/proc/self/mountinfo") if line.split()[4] == "/mnt/m"]
def attributes(path):
    try:
        return os.listxattr(path, follow_symlinks=False)
    except OSError as exc:
        return [] if exc.errno == errno.ENOTSUP else exc.strerror
modes = {}
for directory, names, files in os.walk("/mnt/m"):
    for path in [directory] + [os.path.join(directory, name) for name in files]:
        found = os.lstat(path)
        modes[path] = (oct(found.st_mode), found.st_uid, attributes(path))
print(json.dumps([line.split()[5], modes]))
"""


def test_a_container_sees_no_set_id_bit_no_device_and_no_attribute_though_the_hosts_flags_do_not_reach_it(
    machine: Machine, fake_registry: FakeRegistry
) -> None:
    """The layer claims all of them. A runtime mounts anew with flags of its own, so nothing but the tree protects."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, mode in (("tool", 0o6755), ("data", 0o1666)):
            member = tarfile.TarInfo(name)
            member.mode, member.uid, member.size = mode, 1000, 4
            member.pax_headers = {"SCHILY.xattr.security.capability": "x", "SCHILY.xattr.user.a": "b"}
            archive.addfile(member, io.BytesIO(b"data"))
    layer = {
        "mediaType": "application/vnd.cncf.model.weight.v1.tar",
        "digest": fake_registry.add_blob(packed.getvalue()),
        "size": len(packed.getvalue()),
        "annotations": {"org.cncf.model.filepath": "."},
    }
    fake_registry.add_manifest("team/modes", "v1", model_manifest([layer], fake_registry.add_blob(b"{}")))
    kubelet, pod = machine.kubelet, pod_of(f"{fake_registry.host}/team/modes:v1")
    kubelet.run(pod)
    mount = VolumeMount(name="model", at="m", read_only=False)
    with Container(kubelet, pod, [sys.executable, "-c", INSPECT], mount) as one:
        status, out, errors = one.result()
    assert (status, errors) == (0, "")
    flags, modes = json.loads(out)
    assert not {"nosuid", "nodev"} & set(flags.split(",")), "the host's flags would hide what this test is about"
    assert modes == {
        "/mnt/m": ["0o40555", 0, []],
        "/mnt/m/tool": ["0o100555", 0, []],
        "/mnt/m/data": ["0o100444", 0, []],
    }


def test_df_in_a_container_is_sane(machine: Machine, model: str) -> None:
    kubelet, pod = machine.kubelet, pod_of(model)
    kubelet.run(pod)
    command = ["df", "--block-size=1", "--output=fstype,used,avail,itotal", "/mnt/m"]
    with Container(kubelet, pod, command, VolumeMount(name="model", at="m")) as one:
        status, out, errors = one.result()
    assert (status, errors) == (0, "")
    kind, used, free, inodes = out.splitlines()[1].split()
    assert kind == "fuse.modelmount"
    assert sum(map(len, FILES.values())) <= int(used) < sum(map(len, FILES.values())) + (1 << 20)
    assert int(free) == 0
    assert int(inodes) >= len(FILES)


def test_while_the_registry_is_down_what_is_cached_is_read_the_rest_fails_in_time_and_pods_go(
    machine: Machine, fake_registry: FakeRegistry
) -> None:
    names = ("cached.bin", "missing.bin")
    digest = fake_registry.add_model("team/half", "v1", {name: os.urandom(9 << 20) for name in names}, indexed=True)
    kubelet, pod = machine.kubelet, pod_of(f"{fake_registry.host}/team/half@{digest}", prefetch="ondemand")
    kubelet.run(pod)
    with Container(kubelet, pod, SERVER, VolumeMount(name="model", at="m")) as container:
        right = container.ask("/mnt/m/cached.bin")
        fake_registry.faults.append(Fault(match="/", status=503, times=1_000_000))
        assert container.ask("/mnt/m/cached.bin") == right
        assert container.ask("/mnt/m/missing.bin") == "Input/output error"
        assert container.ask("/mnt/m") == "['cached.bin', 'missing.bin']"
    late = pod_of(f"{fake_registry.host}/team/half@{digest}", "late", prefetch="ondemand")
    kubelet.run(late)
    assert kubelet.is_mounted(late), "who could read it a moment ago may while the registry is down"
    kubelet.delete(pod, late)
    kubelet.advance(5)
    assert kubelet.is_gone(pod)
    assert kubelet.is_gone(late)


MAPPED = """
import mmap
with open("/mnt/m/weights/model.safetensors", "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    print("mapped", flush=True)
    print(mapped[5000000], flush=True)
"""


def test_the_last_pod_of_a_mount_goes_while_its_page_fault_waits_for_a_dead_registry(
    tmp_path_factory: pytest.TempPathFactory, fake_registry: FakeRegistry, model: str
) -> None:
    """A read may wait ten minutes here; the pod does not: a killed process leaves its fault at once."""
    fake_registry.faults.append(Fault(match="/blobs/", status=503, times=1_000_000))
    with Machine(tmp_path_factory.mktemp("m"), "--read-deadline=600", "--spares=0") as machine:
        kubelet, pod = machine.kubelet, pod_of(model)
        kubelet.run(pod)
        with Container(kubelet, pod, [sys.executable, "-c", MAPPED], VolumeMount(name="model", at="m")) as container:
            assert container.process.stdout is not None
            assert container.process.stdout.readline() == "mapped\n"
            eventually(lambda: machine.node.status()[0]["progress"].get("last_error"))
        kubelet.delete(pod)
        kubelet.advance(5)
        assert kubelet.is_gone(pod)
        assert machine.node.status() == []
        assert machine.mounts() == []


# --- many


def test_two_persistent_volumes_of_one_model_and_two_versions_side_by_side_in_one_pod(
    machine: Machine, fake_registry: FakeRegistry, model: str
) -> None:
    """Their handles differ; the two of one model are one file system."""
    other = fake_registry.add_model("team/model", "v2", {"weights/model.safetensors": b"version 2"})
    references = {"a": model, "b": model, "c": f"{fake_registry.host}/team/model@{other}"}
    volumes = [
        Claimed(name=name, persistent_volume=f"pv-{name}", handle=f"handle-{name}", attributes={"reference": reference})
        for name, reference in references.items()
    ]
    kubelet, pod = machine.kubelet, Pod(name="versions", volumes=volumes)
    kubelet.run(pod)
    assert shows(kubelet, pod, "a") == shows(kubelet, pod, "b") == FILES["weights/model.safetensors"]
    assert shows(kubelet, pod, "c") == b"version 2"
    devices = {name: os.stat(kubelet.target(pod, name)).st_dev for name in references}
    assert devices["a"] == devices["b"] != devices["c"]
    assert kubelet.stats(pod, "c").usage[0].total == len(b"version 2")


def test_a_hundred_pods_of_one_model_and_twenty_models_in_one_pod_start_at_once(
    machine: Machine, fake_registry: FakeRegistry, model: str
) -> None:
    kubelet = machine.kubelet
    pods = [pod_of(model, f"pod-{number}") for number in range(100)]
    references = [
        f"{fake_registry.host}/team/m{number}@"
        + fake_registry.add_model(f"team/m{number}", "v1", {"weights/model.safetensors": str(number).encode()})
        for number in range(20)
    ]
    many = Pod(
        name="many",
        volumes=[Inline(name=f"v{n}", attributes={"reference": reference}) for n, reference in enumerate(references)],
    )
    kubelet.run(*pods, many)
    assert {call.code for call in kubelet.calls} == {grpc.StatusCode.OK}, kubelet.events[-3:]
    assert all(kubelet.is_mounted(pod) for pod in (*pods, many))
    assert len({os.stat(kubelet.target(pod, "model")).st_dev for pod in pods}) == 1
    for number in range(20):
        assert shows(kubelet, many, f"v{number}") == str(number).encode()
    assert len(machine.node.status()) == 21
    kubelet.restart()
    kubelet.wait_registered()
    kubelet.sync()
    assert {call.code for call in kubelet.calls} == {grpc.StatusCode.OK}
    assert len(machine.node.status()) == 21


def eventually(condition: Callable[[], object], meanwhile: Callable[[], object] = lambda: None) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        meanwhile()
        assert time.monotonic() < deadline
        time.sleep(0.02)
