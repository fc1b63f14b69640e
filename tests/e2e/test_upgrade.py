"""Two versions of image and chart, there and back again. Readers in pods check every byte meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from e2e.api import NAMESPACE, KubernetesApi
from e2e.conftest import Version
from e2e.helm import Helm
from e2e.local_cluster import NODE, LocalCluster
from e2e.models import HASH, MOUNTS, Model, inline
from e2e.test_life import delete_driver_pod, reading

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(500), pytest.mark.usefixtures("clean")]

NODE_COMPONENTS = ("keeper", "supervisor", "node")


def images(cluster: KubernetesApi) -> dict[str, str]:
    """The tag each component's pod on the node runs."""
    tags = {}
    for component in NODE_COMPONENTS:
        (pod,) = cluster.driver_pods(component)
        tags[component] = pod["spec"]["containers"][0]["image"].rpartition(":")[2]
    return tags


def versions(cluster: KubernetesApi) -> dict[str, str]:
    """What each of them says of itself."""
    return {c: cluster.driver_exec(c, "modelmount", "--version").split()[-1] for c in NODE_COMPONENTS}


def there_and_back(release: Helm, values: dict[str, Any], other: Version) -> list[Callable[[], None]]:
    """helm's two steps: upgrade, and rollback."""
    return [lambda: release.install(values | other.values, other.chart), release.rollback]


def read_anew(cluster: KubernetesApi, model: Model, name: str) -> None:
    """A further pod of the model that is being read, and one of another model."""
    for version in ("v2", "v1"):
        cluster.run_pod(f"{name}-{version}", HASH, inline(model.references[version]), MOUNTS)
    for version in ("v2", "v1"):
        assert cluster.result(f"{name}-{version}") == (0, model.digests[version])


def test_node_and_keeper_are_upgraded_and_rolled_back_while_a_pod_reads(
    cluster: KubernetesApi, release: Helm, values: dict[str, Any], other: Version, model: Model
) -> None:
    """The supervisors wait for their administrator (`supervisor.updateStrategy`), and serve keepers and nodes of both versions."""
    this = images(cluster)["node"]
    with reading(cluster, model) as told:
        begun = time.monotonic()
        release.install(values | other.values | {"supervisor.updateStrategy": "OnDelete"}, other.chart)
        cluster.wait_rolled_out("node")
        node_s = time.monotonic() - begun
        assert images(cluster) == {"keeper": this, "supervisor": this, "node": other.tag}
        cluster.wait("kubelet to register the driver", cluster.is_registered, 60)
        read_anew(cluster, model, "new-node")
        delete_driver_pod(cluster, "keeper")
        assert images(cluster) == {"keeper": other.tag, "supervisor": this, "node": other.tag}
        assert versions(cluster)["keeper"] == versions(cluster)["node"] == other.version
        read_anew(cluster, model, "new-keeper")
        begun = time.monotonic()
        release.rollback()
        cluster.wait_rolled_out("node")
        back_s = time.monotonic() - begun
        delete_driver_pod(cluster, "keeper")
        assert set(images(cluster).values()) == {this}
        read_anew(cluster, model, "back")
    print(
        f"\nrolling upgrade of the node process {node_s:.1f} s, back {back_s:.1f} s; "
        f"longest read in either, with two keepers replaced: {told['longest_s']:.2f} s"
    )


def test_everything_is_upgraded_and_rolled_back_while_a_pod_reads(
    cluster: KubernetesApi, release: Helm, values: dict[str, Any], other: Version, model: Model
) -> None:
    this = images(cluster)["node"]
    seconds = []
    with reading(cluster, model) as told:
        for step in there_and_back(release, values, other):
            begun = time.monotonic()
            step()
            for component in ("supervisor", "node"):
                cluster.wait_rolled_out(component)
            seconds.append(time.monotonic() - begun)
            delete_driver_pod(cluster, "keeper")
            wanted = other.tag if len(seconds) == 1 else this
            assert set(images(cluster).values()) == {wanted}
            read_anew(cluster, model, f"step-{len(seconds)}")
    print(
        f"\nrolling upgrade {seconds[0]:.1f} s, back {seconds[1]:.1f} s; longest read in either: {told['longest_s']:.2f} s"
    )


def test_a_drained_node_is_upgraded_and_downgraded_and_keeps_its_cache(
    cluster: KubernetesApi,
    local_cluster: LocalCluster,
    release: Helm,
    values: dict[str, Any],
    other: Version,
    model: Model,
) -> None:
    """The safe way for any two versions. What is on disk serves both: the way back and forth fetches nothing."""
    cluster.run_pod("before", f"{HASH}; sleep 3600", inline(model.references["v1"]), MOUNTS)
    cluster.wait_running("before")
    cluster.wait("the model to be here", lambda: is_cached(cluster), 60)
    this = images(cluster)["node"]
    for step, wanted in zip(there_and_back(release, values, other), (other.tag, this), strict=True):
        drain(cluster, local_cluster)
        step()
        for component in ("supervisor", "node"):
            cluster.wait_rolled_out(component)
        delete_driver_pod(cluster, "keeper")
        cluster.kubectl("uncordon", NODE)
        assert set(images(cluster).values()) == {wanted}
        cluster.wait("kubelet to register the driver", cluster.is_registered, 60)
        name = f"after-{wanted}"
        cluster.run_pod(
            name,
            f"{HASH.replace('/dev/termination-log', '/tmp/hash')}; sleep 3600",
            inline(model.references["v1"]),
            MOUNTS,
        )
        cluster.wait_running(name)
        cluster.wait("it to be read", lambda pod=name: hash_in(cluster, pod) == model.digests["v1"], 60)  # type: ignore[misc]
        (mount,) = cluster.status()
        assert mount["progress"].get("fetched_bytes", 0) == 0, "the other version did not use the cache"


def drain(cluster: KubernetesApi, local_cluster: LocalCluster) -> None:
    """`kubectl drain`; then nothing of a model is left: no mount, no taint but the drain's own, no pod that waits."""
    cluster.kubectl(
        *("drain", NODE, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=60s"), timeout_s=90
    )
    cluster.wait("every mount of the driver to end", lambda: cluster.status() == [], 30)
    cluster.wait("every mount to be gone", lambda: local_cluster.models_mounted() == [], 30)
    assert cluster.request("GET", "/api/v1/namespaces/default/pods")["items"] == []
    taints = cluster.request("GET", f"/api/v1/nodes/{NODE}")["spec"].get("taints", [])
    assert [taint["key"] for taint in taints] == ["node.kubernetes.io/unschedulable"]
    for component in NODE_COMPONENTS:
        assert len(cluster.driver_pods(component)) == 1, f"{NAMESPACE}'s DaemonSets stay"


def is_cached(cluster: KubernetesApi) -> bool:
    """Whether every block of the one mount is on the node."""
    mounts = cluster.status()
    blobs = mounts[0]["progress"].get("blobs", []) if mounts else []
    return bool(blobs) and all(blob["present_blocks"] == blob["blocks"] for blob in blobs)


def hash_in(cluster: KubernetesApi, name: str) -> str:
    """What the pod has written of its model; empty until it has."""
    return cluster.kubectl("exec", name, "--", "sh", "-c", "cat /tmp/hash 2>/dev/null || :").strip()
