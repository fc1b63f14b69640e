"""Scenarios in a real one-node cluster: a real kubelet calls the driver, readers are real containers.

The driver runs on the host as one process tree and registers itself with kubelet. `make e2e` builds what is needed.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e.cluster import NODE, Cluster
from registry_process import PASSWORD, USERNAME, RegistryProcess
from support.node_process import COMMAND, NodeProcess

from csi import mountinfo

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
DRIVER = "csi.modelmount.dev"


class Model:
    """Two versions of a model in a registry, with the sha256 of their weights."""

    def __init__(
        self, registry: RegistryProcess, directory: Path, repository: str, login: tuple[str, ...] = ()
    ) -> None:
        self.references: dict[str, str] = {}
        self.digests: dict[str, str] = {}
        for version in ("v1", "v2"):
            source = directory / repository / version
            (source / "weights").mkdir(parents=True)
            content = random.Random(version).randbytes(24 << 20)
            (source / "weights" / "model.safetensors").write_bytes(content)
            (source / "version.txt").write_text(version)
            self.digests[version] = hashlib.sha256(content).hexdigest()
            command = [*COMMAND, "push", str(source), f"{registry.host}/{repository}:{version}", *login]
            pushed = subprocess.run(command, input=PASSWORD, check=True, capture_output=True, text=True)
            self.references[version] = pushed.stdout.strip()


@pytest.fixture(scope="module")
def directory() -> Path:
    """Short, because sockets lie below it."""
    path = ROOT / ".e2e"
    shutil.rmtree(path, ignore_errors=True)
    return path


@pytest.fixture(scope="module")
def cluster(directory: Path) -> Iterator[Cluster]:
    binaries = Path(os.environ.get("MODELMOUNT_E2E_BINARIES", ROOT / ".tools" / "k8s"))
    missing = [name for name in ("kubelet", "kube-apiserver", "containerd", "runc") if not (binaries / name).exists()]
    if missing or shutil.which("etcd") is None:
        pytest.skip(f"no Kubernetes to run: {', '.join(missing) or 'etcd'} missing; 'make e2e' builds it")
    cluster = Cluster(directory, binaries)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def driver(cluster: Cluster) -> Iterator[NodeProcess]:
    """The driver, registered. `--read-deadline` short, so that an outage ends in a test's time."""
    cluster.request(
        "POST",
        "/apis/storage.k8s.io/v1/csidrivers",
        {
            "apiVersion": "storage.k8s.io/v1",
            "kind": "CSIDriver",
            "metadata": {"name": DRIVER},
            "spec": {
                "attachRequired": False,
                "podInfoOnMount": True,
                "requiresRepublish": True,
                "fsGroupPolicy": "None",
                "volumeLifecycleModes": ["Persistent", "Ephemeral"],
            },
        },
    )
    flags = (f"--registration-dir={cluster.kubelet_dir}/plugins_registry", f"--target-root={cluster.kubelet_dir}")
    with NodeProcess(cluster.directory / "driver", *flags, "--read-deadline=20") as node:

        def registered() -> bool:
            try:
                drivers = cluster.request("GET", f"/apis/storage.k8s.io/v1/csinodes/{NODE}")["spec"]["drivers"]
            except Exception:
                return False
            return any(entry["name"] == DRIVER for entry in drivers or [])

        cluster.wait("kubelet to register the driver", registered, 60)
        yield node


@pytest.fixture(scope="module")
def model(docker_registry: RegistryProcess, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(docker_registry, tmp_path_factory.mktemp("models"), "team/model")


MOUNTS = [{"name": "model", "mountPath": "/models", "readOnly": True}]
HASH = "sha256sum /models/weights/model.safetensors | cut -d' ' -f1 > /dev/termination-log"


def inline(reference: str, **more: Any) -> list[dict[str, Any]]:
    csi = {"driver": DRIVER, "readOnly": True, "volumeAttributes": {"reference": reference}, **more}
    return [{"name": "model", "csi": csi}]


def nothing_mounted(cluster: Cluster) -> bool:
    pods = str(cluster.kubelet_dir / "pods")
    return not any(e.mount_point.startswith(pods) and e.source == "modelmount" for e in mountinfo.read())


@pytest.fixture(autouse=True)
def nothing_is_left(cluster: Cluster, driver: NodeProcess) -> Iterator[None]:
    yield
    for pod in cluster.request("GET", "/api/v1/namespaces/default/pods")["items"]:
        cluster.delete_pod(pod["metadata"]["name"])
    cluster.wait("every mount to be gone", lambda: nothing_mounted(cluster), 30)
    assert driver.status() == []


def test_an_inline_volume_is_read_by_a_container(cluster: Cluster, model: Model) -> None:
    cluster.run_pod("inline", HASH, inline(model.references["v1"]), MOUNTS)
    assert cluster.result("inline") == (0, model.digests["v1"])


def test_two_versions_side_by_side_as_claims_of_persistent_volumes(cluster: Cluster, model: Model) -> None:
    for version in ("v1", "v2"):
        volume = {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": f"model-{version}"},
            "spec": {
                "capacity": {"storage": "1Gi"},
                "accessModes": ["ReadOnlyMany"],
                "storageClassName": "",
                "persistentVolumeReclaimPolicy": "Retain",
                "csi": {
                    "driver": DRIVER,
                    "volumeHandle": f"model-{version}",
                    "volumeAttributes": {"reference": model.references[version]},
                },
            },
        }
        claim = {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": f"model-{version}"},
            "spec": {
                "accessModes": ["ReadOnlyMany"],
                "storageClassName": "",
                "volumeName": f"model-{version}",
                "resources": {"requests": {"storage": "1Gi"}},
            },
        }
        cluster.request("POST", "/api/v1/persistentvolumes", volume)
        cluster.request("POST", "/api/v1/namespaces/default/persistentvolumeclaims", claim)
    volumes = [{"name": v, "persistentVolumeClaim": {"claimName": f"model-{v}"}} for v in ("v1", "v2")]
    mounts = [{"name": v, "mountPath": f"/models/{v}"} for v in ("v1", "v2")]
    command = "cat /models/v1/version.txt /models/v2/version.txt > /dev/termination-log; ! touch /models/v1/new"
    cluster.run_pod("versions", command, volumes, mounts)
    assert cluster.result("versions") == (0, "v1v2")


def test_a_sub_path_of_a_file_and_of_a_directory(cluster: Cluster, model: Model) -> None:
    mounts = [
        {"name": "model", "mountPath": "/models/weights", "subPath": "weights", "readOnly": True},
        {"name": "model", "mountPath": "/version", "subPath": "version.txt", "readOnly": True},
    ]
    command = "cat /version > /dev/termination-log; ls /models/weights >> /dev/termination-log"
    cluster.run_pod("subpath", command, inline(model.references["v2"]), mounts)
    assert cluster.result("subpath") == (0, "v2model.safetensors")


def test_a_pod_with_fs_group_reads_as_another_user(cluster: Cluster, model: Model) -> None:
    """kubelet must not try to change owners in a read-only tree."""
    security = {"runAsUser": 1234, "runAsNonRoot": True, "fsGroup": 4321}
    volumes = inline(model.references["v1"])
    cluster.run_pod(
        "fsgroup", "cat /models/version.txt > /dev/termination-log", volumes, MOUNTS, securityContext=security
    )
    assert cluster.result("fsgroup") == (0, "v1")


def test_a_wrong_attribute_is_explained_to_whoever_describes_the_pod(cluster: Cluster, model: Model) -> None:
    volumes = inline(model.references["v1"])
    volumes[0]["csi"]["volumeAttributes"]["colour"] = "red"
    cluster.run_pod("wrong", HASH, volumes, MOUNTS)

    def explained() -> bool:
        return any("FailedMount" in event and "unknown key 'colour'" in event for event in cluster.events("wrong"))

    cluster.wait("an event that names the attribute", explained, 60)


def test_a_pod_deleted_while_the_driver_is_down_is_gone_when_it_is_back(
    cluster: Cluster, driver: NodeProcess, model: Model
) -> None:
    cluster.run_pod("orphan", "while :; do sleep 1; done", inline(model.references["v1"]), MOUNTS)
    cluster.wait("the pod to run", lambda: cluster.is_running("orphan"), 60)
    driver.stop()
    try:
        cluster.request("DELETE", "/api/v1/namespaces/default/pods/orphan")
        time.sleep(4)
        assert cluster.pod("orphan")["metadata"]["deletionTimestamp"], "kubelet waits for the driver"
    finally:
        driver.start()
    cluster.wait_gone("orphan", 60)


def test_a_pull_secret_is_used_and_a_missing_one_is_explained(
    cluster: Cluster, private_registry: RegistryProcess, tmp_path: Path
) -> None:
    import base64

    private = Model(private_registry, tmp_path, "team/private", ("--username", USERNAME, "--password-stdin"))
    data = {"username": USERNAME, "password": PASSWORD}
    cluster.request(
        "POST",
        "/api/v1/namespaces/default/secrets",
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "login"},
            "type": "kubernetes.io/basic-auth",
            "data": {key: base64.b64encode(value.encode()).decode() for key, value in data.items()},
        },
    )
    secret = {"nodePublishSecretRef": {"name": "login"}}
    cluster.run_pod("secret", HASH, inline(private.references["v1"], **secret), MOUNTS)
    assert cluster.result("secret") == (0, private.digests["v1"])
    cluster.run_pod("no-secret", HASH, inline(private.references["v1"]), MOUNTS)

    def explained() -> bool:
        return any("FailedMount" in event and "nodePublishSecretRef" in event for event in cluster.events("no-secret"))

    cluster.wait("an event that says what is missing", explained, 60)
    assert not any(PASSWORD in event for event in cluster.events("no-secret"))


READ_ON = (
    "i=0; while [ $i -lt 30 ]; do "
    "dd if=/models/weights/model.safetensors of=/tmp/copy bs=1M 2>/dev/null || exit 9; "
    "[ $(sha256sum /models/weights/model.safetensors | cut -d' ' -f1) = {digest} ] || exit 8; "
    "i=$((i+1)); sleep 0.2; done; echo fine > /dev/termination-log"
)


def test_a_reader_sees_nothing_of_killed_workers_fetchers_node_and_kubelet(
    cluster: Cluster, driver: NodeProcess, model: Model
) -> None:
    command = READ_ON.format(digest=model.digests["v2"])
    cluster.run_pod("reader", command, inline(model.references["v2"]), MOUNTS)
    cluster.wait("the reader to run", lambda: cluster.is_running("reader"), 60)
    for role in ("worker_pid", "fetcher_pid", "worker_pid"):
        os.kill(driver.status()[0][role], signal.SIGKILL)
        time.sleep(0.7)
    node_pids = [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and _is_node_process(entry, driver.socket_path)
    ]
    assert len(node_pids) == 1
    os.kill(node_pids[0], signal.SIGKILL)
    cluster.stop_process("kubelet", signal.SIGKILL)
    cluster.start_kubelet()
    assert cluster.result("reader") == (0, "fine")
    assert driver.status()[0]["reads"]["failed_reads"] == 0


def _is_node_process(entry: Path, socket_path: Path) -> bool:
    try:
        arguments = (entry / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return (
        b"node" in arguments
        and b"--all-in-one" not in arguments
        and any(argument.endswith(os.fsencode(socket_path)) for argument in arguments)
    )


def test_a_pod_is_gone_in_seconds_while_its_registry_is_down(
    cluster: Cluster, registry_binary: Path, tmp_path: Path
) -> None:
    registry = RegistryProcess(registry_binary, tmp_path / "registry")
    registry.start()
    try:
        model = Model(registry, tmp_path, "team/model")
        large = tmp_path / "large"
        large.mkdir()
        with open(large / "big.bin", "wb") as file:
            file.truncate(600 << 20)
        command = [*COMMAND, "push", str(large), f"{registry.host}/team/big:v1"]
        reference = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        assert model.references
        cluster.run_pod("stuck", "while :; do cat /models/big.bin > /dev/null; done", inline(reference), MOUNTS)
        cluster.wait("the pod to run", lambda: cluster.is_running("stuck"), 60)
    finally:
        registry.stop()
    assert cluster.delete_pod("stuck") < 40
