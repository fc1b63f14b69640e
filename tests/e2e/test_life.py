"""Pods of the driver come and go, the node too; readers in other pods read on. Every byte they read is checked."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from e2e.api import DRIVER, NAMESPACE, KubernetesApi
from e2e.helm import Helm
from e2e.local_cluster import ADDRESS, NODE, LocalCluster
from e2e.models import HASH, MOUNTS, Model, claim_of, inline, persistent_volume
from prometheus_client.parser import text_string_to_metric_families
from registry_process import RegistryProcess

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(500), pytest.mark.usefixtures("clean")]

READER = (Path(__file__).parent / "reader.py").read_text(encoding="utf-8")


def start_reader(cluster: KubernetesApi, name: str, volumes: list[dict[str, Any]], *within_mib: int) -> None:
    """A pod that reads all the while, and has begun to; of the whole model, or of its first MiB only."""
    command = ["python3", "-c", READER, "/models", *map(str, within_mib)]
    cluster.run_pod(name, command, volumes, MOUNTS, image=cluster.driver_image)
    cluster.wait_running(name)
    cluster.wait("the first reads", lambda: "reads" in cluster.kubectl("logs", name), 60)


def stop_reader(cluster: KubernetesApi, name: str) -> dict[str, Any]:
    """Let it read the whole model once more, and end; what it told, in which nothing is wrong."""
    with contextlib.suppress(AssertionError):  # the reader may end, and this command with it, before it has returned
        cluster.kubectl("exec", name, "--", "touch", "/tmp/stop")
    status, message = cluster.result(name, 60)
    print(f"\n{name}: {message}")
    told: dict[str, Any] = json.loads(message)
    assert (status, told["errors"], told["wrong"]) == (0, 0, 0), message
    assert told["reads"] > 20
    return told


def reads_go_on(cluster: KubernetesApi, name: str) -> None:
    """Wait until a running reader tells of further reads, none of which failed or was wrong."""

    def told() -> dict[str, Any]:
        return dict(json.loads(cluster.kubectl("logs", name, "--tail=1")))

    before = told()["reads"]
    cluster.wait(f"{name} to read on", lambda: told()["reads"] > before + 20, 30)
    assert (told()["errors"], told()["wrong"]) == (0, 0), told()


@contextlib.contextmanager
def reading(cluster: KubernetesApi, model: Model, name: str = "reader") -> Iterator[dict[str, Any]]:
    """A pod that reads all the while; what it told at its end is in the value."""
    start_reader(cluster, name, inline(model.references["v2"]))
    told: dict[str, Any] = {}
    yield told
    time.sleep(1.5)  # reads after the last event count too
    told.update(stop_reader(cluster, name))


def delete_driver_pod(cluster: KubernetesApi, component: str) -> None:
    """Delete the pod and wait for its successor."""
    (pod,) = cluster.driver_pods(component)
    cluster.request("DELETE", f"/api/v1/namespaces/{NAMESPACE}/pods/{pod['metadata']['name']}")
    cluster.wait_rolled_out(component)


def kill_container(cluster: LocalCluster, component: str) -> None:
    """SIGKILL to its PID 1, which takes the whole container, and wait until it runs again."""
    (before,) = cluster.container_pids(component)
    os.kill(before, signal.SIGKILL)
    cluster.wait(
        f"{component} to be started again",
        lambda: bool(cluster.container_pids(component)) and cluster.container_pids(component) != [before],
        60,
    )
    cluster.wait_rolled_out(component)


def test_the_node_pod_is_deleted_and_killed_while_a_pod_reads(
    cluster: KubernetesApi, local_cluster: LocalCluster, model: Model
) -> None:
    with reading(cluster, model):
        delete_driver_pod(cluster, "node")
        cluster.wait("kubelet to register the driver", cluster.is_registered, 60)
        kill_container(local_cluster, "node")
        cluster.wait("kubelet to register the driver", cluster.is_registered, 60)
        cluster.run_pod("second", HASH, inline(model.references["v1"]), MOUNTS)
        assert cluster.result("second") == (0, model.digests["v1"])


def test_workers_and_fetchers_are_killed_while_a_pod_reads(
    cluster: KubernetesApi, local_cluster: LocalCluster, model: Model
) -> None:
    with reading(cluster, model):
        for role in ("worker", "fetcher", "worker"):
            os.kill(child_pid(local_cluster, role), signal.SIGKILL)
            time.sleep(1)
        (mount,) = cluster.status()
        assert (mount["worker_restarts"], mount["fetcher_restarts"]) == (2, 1)


def child_pid(cluster: LocalCluster, role: str) -> int:
    """The host's pid of the one worker or fetcher that serves a mount; the supervisor knows it by its own pid."""
    (supervisor,) = cluster.container_pids("supervisor")
    (mount,) = cluster.status()
    name_space = os.readlink(f"/proc/{supervisor}/ns/pid")
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and os.readlink(entry / "ns" / "pid") == name_space:
                inner = (entry / "status").read_text().partition("NSpid:")[2].split("\n")[0].split()[-1]
                if int(inner) == mount[f"{role}_pid"]:
                    return int(entry.name)
    raise AssertionError(f"no {role} found")


def test_a_helm_upgrade_of_the_node_while_a_pod_reads(
    cluster: KubernetesApi, release: Helm, values: dict[str, Any], model: Model
) -> None:
    with reading(cluster, model):
        release.install(values | {"node.resources.requests.cpu": "21m"})
        cluster.wait_rolled_out("node")
    release.install(values)
    cluster.wait_rolled_out("node")


def test_kubelet_is_restarted_while_a_pod_reads(
    cluster: KubernetesApi, local_cluster: LocalCluster, model: Model
) -> None:
    with reading(cluster, model):
        local_cluster.stop_process("kubelet", signal.SIGKILL)
        local_cluster.start_kubelet()
        local_cluster.wait("the node to be Ready", local_cluster.node_is_ready, 60)
        time.sleep(5)  # it publishes every volume again within seconds of its start


def test_a_pod_deleted_while_the_driver_is_down_is_gone_when_it_is_back(
    cluster: KubernetesApi, local_cluster: LocalCluster, model: Model
) -> None:
    """Until then it reads on, as does another pod through all of it."""
    path = f"/apis/apps/v1/namespaces/{NAMESPACE}/daemonsets/modelmount-node"
    away = {"spec": {"template": {"spec": {"nodeSelector": {"e2e": "nowhere"}}}}}
    start_reader(cluster, "orphan", inline(model.references["v1"]))
    with reading(cluster, model):
        cluster.request("PATCH", path, away)
        cluster.wait("the node pod to be gone", lambda: cluster.driver_pods("node") == [], 60)
        try:
            reads_go_on(cluster, "orphan")
            cluster.request("DELETE", "/api/v1/namespaces/default/pods/orphan")
            time.sleep(4)
            assert cluster.pod("orphan")["metadata"]["deletionTimestamp"], "kubelet waits for the driver"
        finally:
            cluster.request("PATCH", path, {"spec": {"template": {"spec": {"nodeSelector": {"e2e": None}}}}})
            cluster.wait_rolled_out("node")
        cluster.wait_gone("orphan", 60)


@contextlib.contextmanager
def registry_that_fails(binary: Path, directory: Path) -> Iterator[RegistryProcess]:
    """A registry that pods can reach, to be stopped."""
    registry = RegistryProcess(binary, directory / "registry")
    registry.start(f"{ADDRESS}:5002")
    try:
        yield registry
    finally:
        registry.stop()


MODEL_MIB, READ_MIB = 256, 8  # what is fetched ahead of the reads is 128 MiB at most
ON_DEMAND = {"prefetch": "ondemand"}


@contextlib.contextmanager
def read_that_waits(cluster: KubernetesApi, pod: str) -> Iterator[subprocess.Popen[str]]:
    """A process in the pod that reads the whole model, most of which is to come from a registry that is down. Its output is
    the model's sha256.
    """
    read = ["sha256sum", "/models/weights/model.safetensors"]
    with cluster.kubectl_process("exec", pod, "--", *read) as process:
        yield process


def test_a_pod_is_gone_in_seconds_while_its_registry_is_down(
    cluster: KubernetesApi, local_cluster: LocalCluster, registry_binary: Path, tmp_path: Path
) -> None:
    """Though one of its reads waits for what is not cached; what is cached is read right until the end."""
    with registry_that_fails(registry_binary, tmp_path) as registry:
        model = Model(registry.host, tmp_path, "team/waits", size_mib=MODEL_MIB)
        volumes = inline(model.references["v1"], volumeAttributes=ON_DEMAND | {"reference": model.references["v1"]})
        start_reader(cluster, "stuck", volumes, READ_MIB)
        reads_go_on(cluster, "stuck")
        registry.stop()
        with read_that_waits(cluster, "stuck") as read:
            reads_go_on(cluster, "stuck")
            assert read.poll() is None, "it has nowhere to read from"
            print(f"gone after {cluster.delete_pod('stuck'):.1f} s")
        registry.start(registry.host)
        cluster.run_pod("after", HASH, volumes, MOUNTS)
        assert cluster.result("after") == (0, model.digests["v1"])


def test_a_registry_outage_shows_in_the_pods_status_and_clears(
    cluster: KubernetesApi, local_cluster: LocalCluster, registry_binary: Path, tmp_path: Path
) -> None:
    """With kubelet's feature gate CSIVolumeHealth, which asks for PersistentVolumes only, not for inline volumes. What is cached
    is read all the while, and a read that waits for the rest ends with the right bytes.
    """

    def health() -> str:
        return json.dumps(cluster.pod("health")["status"].get("volumeHealth", []))

    with registry_that_fails(registry_binary, tmp_path) as registry:
        model = Model(registry.host, tmp_path, "team/health", size_mib=MODEL_MIB)
        attributes = ON_DEMAND | {"reference": model.references["v1"]}
        cluster.request("POST", "/api/v1/persistentvolumes", persistent_volume("health", attributes))
        cluster.create("persistentvolumeclaims", claim_of("health"))
        claimed = [{"name": "model", "persistentVolumeClaim": {"claimName": "health"}}]
        start_reader(cluster, "health", claimed, READ_MIB)
        reads_go_on(cluster, "health")
        registry.stop()
        with read_that_waits(cluster, "health") as read:
            cluster.wait("the outage to show in the pod's status", lambda: "RegistryUnreachable" in health(), 100)
            reads_go_on(cluster, "health")
            registry.start(registry.host)
            assert read.communicate(timeout=60)[0].split()[0] == model.digests["v1"]
        cluster.wait("the outage to be over in the pod's status", lambda: "RegistryUnreachable" not in health(), 100)
        stop_reader(cluster, "health")
        cluster.delete_pod("health")
        cluster.request("DELETE", "/api/v1/namespaces/default/persistentvolumeclaims/health")
        cluster.request("DELETE", "/api/v1/persistentvolumes/health")


def test_the_node_is_rebooted(cluster: KubernetesApi, local_cluster: LocalCluster, release: Helm, model: Model) -> None:
    """kubelet, containerd and every container killed, every mount and tmpfs gone, and the next boot has another id; the pod
    restarts, and reads the same bytes from the cache.
    """
    command = f"{HASH.replace('/dev/termination-log', '/tmp/hash')}; sleep 3600"
    cluster.run_pod("survivor", command, inline(model.references["v1"]), MOUNTS, restartPolicy="Always")
    cluster.wait_running("survivor")
    boot_ids = {driver_boot_id(cluster), local_cluster.boot_id}
    assert len(boot_ids) == 1, "containers see the boot id of the cluster's node"
    local_cluster.reboot()
    local_cluster.wait("the node to be Ready", local_cluster.node_is_ready, 90)
    for component in ("keeper", "supervisor", "node"):
        cluster.wait_rolled_out(component)

    def reads_again() -> bool:
        status = (cluster.pod("survivor")["status"].get("containerStatuses") or [{}])[0]
        if not status.get("restartCount") or "running" not in status.get("state", {}):
            return False
        with contextlib.suppress(AssertionError):
            return cluster.kubectl("exec", "survivor", "--", "cat", "/tmp/hash").strip() == model.digests["v1"]
        return False

    cluster.wait("the pod to read its model again", reads_again, 120)
    assert driver_boot_id(cluster) == local_cluster.boot_id
    assert driver_boot_id(cluster) not in boot_ids
    (mount,) = cluster.status()
    assert mount["progress"].get("fetched_bytes", 0) == 0, "what was verified before the reboot was fetched again"


def driver_boot_id(cluster: KubernetesApi) -> str:
    """What the supervisor, whose cache depends on it, takes for the id of this boot."""
    return cluster.driver_exec("supervisor", "cat", "/proc/sys/kernel/random/boot_id").strip()


def test_an_uninstalled_release_leaves_nothing_on_the_node(
    cluster: KubernetesApi, local_cluster: LocalCluster, release: Helm, values: dict[str, Any], model: Model
) -> None:
    """No mount, not even of a pod that was forgotten, no socket, record, object, taint or cache. Installed again, it serves."""
    cluster.run_pod("before", HASH, inline(model.references["v1"]), MOUNTS)
    assert cluster.result("before") == (0, model.digests["v1"])
    cluster.delete_pod("before")
    cluster.run_pod("forgotten", "sleep 3600", inline(model.references["v2"]), MOUNTS)
    cluster.wait_running("forgotten")
    assert list(local_cluster.data_dir.glob("cache/*"))
    release.uninstall()
    cluster.wait("the driver's pods to be gone", lambda: pods_of_the_driver(cluster) == [], 60)
    try:
        assert local_cluster.models_mounted() == []
        places = [local_cluster.kubelet_dir / "plugins", local_cluster.kubelet_dir / "plugins_registry"]
        for place in places:
            assert [path for path in place.rglob("*") if path.is_socket()] == []
        for place in (Path(local_cluster.state_dir), local_cluster.data_dir):
            assert list(place.iterdir()) == []
        assert not cluster.request("GET", f"/api/v1/nodes/{NODE}")["spec"].get("taints")
        for path in (f"/apis/apps/v1/namespaces/{NAMESPACE}/daemonsets", f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs"):
            assert cluster.request("GET", path)["items"] == [], "the hooks took themselves away too"
        assert cluster.get(f"/apis/storage.k8s.io/v1/csidrivers/{DRIVER}") is None
        cluster.wait("kubelet to forget the driver", lambda: not cluster.is_registered(), 30)
        for kind in ("clusterroles", "clusterrolebindings"):
            names = cluster.request("GET", f"/apis/rbac.authorization.k8s.io/v1/{kind}")["items"]
            assert not [item for item in names if item["metadata"]["name"].startswith("modelmount")]
    finally:
        release.install(values)
        for component in ("keeper", "supervisor", "node"):
            cluster.wait_rolled_out(component)
        cluster.wait("kubelet to register the driver", cluster.is_registered, 60)
    cluster.delete_pod("forgotten")
    cluster.run_pod("after", HASH, inline(model.references["v1"]), MOUNTS)
    assert cluster.result("after") == (0, model.digests["v1"])


def pods_of_the_driver(cluster: KubernetesApi) -> list[str]:
    listing = cluster.request("GET", f"/api/v1/namespaces/{NAMESPACE}/pods")["items"]
    return [pod["metadata"]["name"] for pod in listing]


def test_the_keeper_pod_is_deleted_and_killed_while_a_pod_reads(
    cluster: KubernetesApi, local_cluster: LocalCluster, model: Model
) -> None:
    with reading(cluster, model):
        delete_driver_pod(cluster, "keeper")
        kill_container(local_cluster, "keeper")
        cluster.run_pod("other-model", HASH, inline(model.references["v1"]), MOUNTS)
        assert cluster.result("other-model") == (0, model.digests["v1"])


def test_a_model_mounted_before_the_keepers_death_is_shown_to_another_pod_after_it(
    cluster: KubernetesApi, local_cluster: LocalCluster, model: Model
) -> None:
    with reading(cluster, model):
        kill_container(local_cluster, "keeper")
        cluster.run_pod("same-model", HASH, inline(model.references["v2"]), MOUNTS)
        assert cluster.result("same-model") == (0, model.digests["v2"])


def test_the_supervisor_pod_is_deleted_while_a_pod_reads(
    cluster: KubernetesApi, local_cluster: LocalCluster, model: Model
) -> None:
    with reading(cluster, model):
        delete_driver_pod(cluster, "supervisor")


def test_the_supervisor_container_is_killed_while_a_pod_reads(
    cluster: KubernetesApi, local_cluster: LocalCluster, model: Model
) -> None:
    with reading(cluster, model):
        kill_container(local_cluster, "supervisor")


def test_a_helm_upgrade_of_supervisor_and_node_while_a_pod_reads(
    cluster: KubernetesApi, release: Helm, values: dict[str, Any], model: Model
) -> None:
    with reading(cluster, model):
        release.install(values | {"podAnnotations": {"e2e/revision": "2"}})
        for component in ("supervisor", "node"):
            cluster.wait_rolled_out(component)
    release.install(values)
    for component in ("supervisor", "node"):
        cluster.wait_rolled_out(component)


def test_a_complete_model_is_shown_as_plain_files_where_that_is_wished(
    cluster: KubernetesApi, release: Helm, values: dict[str, Any], model: Model
) -> None:
    """Through the death of every pod of the driver; also in a user namespace, which needs idmapped mounts."""
    release.install(values | {"cache.seal": "always"})
    cluster.wait_rolled_out("supervisor")

    def is_proven() -> bool:
        """The model's last volume shows plain files: each try is one more volume."""
        cluster.run_pod("probe", HASH, inline(model.references["v2"]), MOUNTS)
        assert cluster.result("probe") == (0, model.digests["v2"])
        (mount,) = cluster.status()
        sealed = bool(mount["sealed"]["targets"])
        cluster.delete_pod("probe")
        return sealed

    try:
        with reading(cluster, model, "early"):
            cluster.wait("the model to be complete and proven", is_proven, 120)
            cluster.wait("the probe's volume to be gone", lambda: len(cluster.status()[0]["targets"]) == 1, 30)
            with reading(cluster, model, "late"):
                (mount,) = cluster.status()
                assert len(mount["targets"]) == 2
                # The first one's too, where an earlier scenario has left the model here.
                sealed = mount["sealed"]["targets"]
                assert sealed
                for component in ("supervisor", "node", "keeper"):
                    delete_driver_pod(cluster, component)
                (mount,) = cluster.status()
                assert mount["sealed"]["targets"] == sealed
                cluster.run_pod("userns", HASH, inline(model.references["v2"]), MOUNTS, hostUsers=False)
                assert cluster.result("userns") == (0, model.digests["v2"])
    finally:
        release.install(values)
        cluster.wait_rolled_out("supervisor")


def test_metrics_and_health_are_served_at_the_nodes_address(
    cluster: KubernetesApi, local_cluster: LocalCluster, model: Model
) -> None:
    cluster.run_pod("measured", f"{HASH}; sleep 3600", inline(model.references["v1"]), MOUNTS)
    cluster.wait_running("measured")
    (pod,) = cluster.driver_pods("node")
    address = f"http://{pod['status']['podIP']}:9808"
    assert requests.get(f"{address}/healthz", timeout=10).text == "ok\n"

    def told() -> bool:
        families = text_string_to_metric_families(requests.get(f"{address}/metrics", timeout=10).text)
        samples = [sample for family in families for sample in family.samples]
        mount = {"mount": cluster.status()[0]["mount_id"], "model": model.repository}

        def value(name: str, **labels: str) -> float:
            return max((s.value for s in samples if s.name == name and labels.items() <= s.labels.items()), default=-1)

        return (
            value("modelmount_component_up", component="keeper") == 1
            and value("modelmount_component_up", component="supervisor") == 1
            and value("modelmount_csi_call_seconds_count", code="OK", rpc="NodePublishVolume") >= 1
            and value("modelmount_mount_cached_bytes", **mount) >= 24 << 20
            and value("modelmount_mount_targets", **mount) == 1
        )

    cluster.wait("the metrics to tell of the model", told, 30)


def test_status_and_doctor_answer_in_the_nodes_pod(cluster: KubernetesApi, model: Model) -> None:
    """As an administrator calls them; the first also on a terminal."""
    cluster.run_pod("measured", f"{HASH}; sleep 3600", inline(model.references["v1"]), MOUNTS)
    cluster.wait_running("measured")
    at = [f"--state-dir={cluster.state_dir}"]
    told = cluster.driver_exec("node", "modelmount", "doctor", *at, "--output=json")
    findings = {finding["subject"]: finding for finding in json.loads(told)["findings"]}
    print(f"\n{told}")
    assert findings.keys() >= {"kernel", "FUSE", "keeper", "supervisor", "disk", "clock"}
    assert {findings[process]["verdict"] for process in ("keeper", "supervisor")} == {"ok"}
    (pod,) = cluster.driver_pods("node")
    command = ["exec", "-it", "-n", NAMESPACE, pod["metadata"]["name"], "-c", "node", "--"]
    command += ["modelmount", "status", "--watch"]
    terminal, theirs = pty.openpty()
    try:
        with cluster.kubectl_process(*command, *at, terminal=theirs):
            shown = ""
            deadline = time.monotonic() + 30
            while shown.count(model.repository) < 2:  # drawn again
                assert time.monotonic() < deadline, shown
                shown += os.read(terminal, 65536).decode(errors="replace")
    finally:
        os.close(terminal)
        os.close(theirs)


def test_the_startup_taint_is_removed_when_the_driver_is_registered(
    cluster: KubernetesApi, local_cluster: LocalCluster, release: Helm, values: dict[str, Any]
) -> None:
    def taints() -> list[str]:
        node = cluster.request("GET", f"/api/v1/nodes/{NODE}")
        return [taint["key"] for taint in node["spec"].get("taints", [])]

    cluster.kubectl("taint", "node", NODE, "csi.modelmount.dev/agent-not-ready=:NoSchedule", "other=:PreferNoSchedule")
    try:
        release.install(values | {"node.removeStartupTaint": True})
        cluster.wait_rolled_out("node")
        cluster.wait("the taint to go", lambda: taints() == ["other"], 60)
    finally:
        cluster.request("PATCH", f"/api/v1/nodes/{NODE}", {"spec": {"taints": None}})
        release.install(values)
        cluster.wait_rolled_out("node")
