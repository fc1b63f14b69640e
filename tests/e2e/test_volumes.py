"""What users write, read by containers: every scenario compares content."""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import requests
from e2e.api import NAMESPACE, KubernetesApi
from e2e.local_cluster import ADDRESS, LocalCluster
from e2e.models import HASH, MOUNTS, Model, claim_of, inline, persistent_volume
from e2e.provisioner import create_request, create_volume
from registry_process import PASSWORD, USERNAME, RegistryProcess

from csi.wire import csi_pb2

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300), pytest.mark.usefixtures("clean")]


def test_an_inline_volume_is_read_by_a_container(cluster: KubernetesApi, model: Model) -> None:
    cluster.run_pod("inline", HASH, inline(model.references["v1"]), MOUNTS)
    assert cluster.result("inline") == (0, model.digests["v1"])


def test_two_versions_side_by_side_as_claims_of_persistent_volumes(cluster: KubernetesApi, model: Model) -> None:
    for version in ("v1", "v2"):
        volume = persistent_volume(f"model-{version}", {"reference": model.references[version]})
        cluster.request("POST", "/api/v1/persistentvolumes", volume)
        cluster.create("persistentvolumeclaims", claim_of(f"model-{version}"))
    volumes = [{"name": v, "persistentVolumeClaim": {"claimName": f"model-{v}"}} for v in ("v1", "v2")]
    mounts = [{"name": v, "mountPath": f"/models/{v}"} for v in ("v1", "v2")]
    command = (
        "cat /models/v1/version.txt /models/v2/version.txt > /dev/termination-log;"
        "for v in v1 v2; do sha256sum < /models/$v/weights/model.safetensors | cut -d' ' -f1 >> /dev/termination-log; done;"
        "! touch /models/v1/new"
    )
    cluster.run_pod("versions", command, volumes, mounts)
    assert cluster.result("versions") == (0, f"v1v2{model.digests['v1']}\n{model.digests['v2']}")
    for version in ("v1", "v2"):
        cluster.request("DELETE", f"/api/v1/namespaces/default/persistentvolumeclaims/model-{version}")
        cluster.request("DELETE", f"/api/v1/persistentvolumes/model-{version}")


CLAIMS = "/api/v1/namespaces/default/persistentvolumeclaims"
RECORDS = "/apis/csi.modelmount.dev/v1alpha1/modelvolumes"


def claim_for(cluster: KubernetesApi, name: str, reference: str) -> None:
    """A claim that names its model; external-provisioner, as the chart runs it, does the rest."""
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name, "annotations": {"csi.modelmount.dev/reference": reference}},
        "spec": {
            "accessModes": ["ReadOnlyMany"],
            "storageClassName": "models",
            "resources": {"requests": {"storage": "1Gi"}},
        },
    }
    cluster.request("POST", CLAIMS, claim)


def phase_of(cluster: KubernetesApi, path: str) -> str:
    found = cluster.get(path)
    return "gone" if found is None else str(found["status"].get("phase"))


def wait_bound(cluster: KubernetesApi, name: str) -> str:
    """The name of its PersistentVolume."""
    cluster.wait(f"claim {name} to be bound", lambda: phase_of(cluster, f"{CLAIMS}/{name}") == "Bound", 90)
    return str(cluster.request("GET", f"{CLAIMS}/{name}")["spec"]["volumeName"])


def test_a_claim_per_version_names_its_model_by_an_annotation(cluster: KubernetesApi, model: Model) -> None:
    """Two claims, two versions, in one pod; the tag is resolved once, by the controller."""
    for version in ("v1", "v2"):
        claim_for(cluster, version, f"{model.repository}:{version}")
    names = {version: wait_bound(cluster, version) for version in ("v1", "v2")}
    volumes = [{"name": v, "persistentVolumeClaim": {"claimName": v, "readOnly": True}} for v in ("v1", "v2")]
    mounts = [{"name": v, "mountPath": f"/{v}"} for v in ("v1", "v2")]
    command = (
        "for v in v1 v2; do sha256sum < /$v/weights/model.safetensors | cut -d' ' -f1 >> /dev/termination-log; done"
    )
    cluster.run_pod("claims", command, volumes, mounts)
    assert cluster.result("claims") == (0, f"{model.digests['v1']}\n{model.digests['v2']}")
    listed = cluster.request("GET", RECORDS)["items"]
    assert {item["spec"]["volumeName"]: item["spec"]["digest"] for item in listed} == {
        names[version]: model.references[version].rpartition("@")[2] for version in ("v1", "v2")
    }
    cluster.delete_pod("claims")
    for version in ("v1", "v2"):
        cluster.request("DELETE", f"{CLAIMS}/{version}")
    cluster.wait("the records to go", lambda: cluster.request("GET", RECORDS)["items"] == [], 90)


def test_a_claims_whole_life(cluster: KubernetesApi, local_cluster: LocalCluster, model: Model) -> None:
    """Repeats at once, a tag that moves, a controller that is replaced, another wish under the same name; then the claim's
    end, which waits for its pod, and its volume's and its record's.
    """
    moving = f"{model.repository}:moving"
    _move_tag(model, "v1", "moving")
    claim_for(cluster, "life", moving)
    path = f"/api/v1/persistentvolumes/{wait_bound(cluster, 'life')}"
    source = cluster.request("GET", path)["spec"]["csi"]
    assert source["volumeAttributes"]["reference"].endswith(model.references["v1"].rpartition("@")[2])

    request = create_request(local_cluster, cluster.request("GET", f"{CLAIMS}/life"))
    with ThreadPoolExecutor(max_workers=6) as threads:
        first, *others = threads.map(lambda _: create_volume(local_cluster, request), range(6))
    assert all(other == first for other in others)
    assert first.volume_id == source["volumeHandle"]
    assert first.volume_context["reference"] == source["volumeAttributes"]["reference"]
    _move_tag(model, "v2", "moving")
    (pod,) = cluster.driver_pods("controller")
    cluster.request("DELETE", f"/api/v1/namespaces/{NAMESPACE}/pods/{pod['metadata']['name']}")
    assert create_volume(local_cluster, request) == first, "another process, the same answer"
    other = csi_pb2.CreateVolumeRequest()
    other.CopyFrom(request)
    other.parameters["verify"] = "whole"
    with pytest.raises(grpc.RpcError) as refused:
        create_volume(local_cluster, other)
    assert refused.value.code() is grpc.StatusCode.ALREADY_EXISTS

    volumes = [{"name": "model", "persistentVolumeClaim": {"claimName": "life", "readOnly": True}}]
    cluster.run_pod("life", f"{HASH}; sleep 600", volumes, MOUNTS)
    cluster.wait_running("life")
    cluster.request("DELETE", f"{CLAIMS}/life")
    assert cluster.get(f"{CLAIMS}/life") is not None, "a claim that a pod uses stays"
    assert cluster.kubectl("exec", "life", "--", "cat", "/models/version.txt") == "v1"
    cluster.delete_pod("life")
    cluster.wait("the claim to go", lambda: phase_of(cluster, f"{CLAIMS}/life") == "gone", 60)
    cluster.wait("the volume to go", lambda: cluster.get(path) is None, 90)
    assert cluster.request("GET", RECORDS)["items"] == []


def _move_tag(model: Model, version: str, tag: str) -> None:
    host, _, repository = model.repository.partition("/")
    url = f"http://{host}/v2/{repository}/manifests"
    kind = "application/vnd.oci.image.manifest.v1+json"
    found = requests.get(f"{url}/{version}", headers={"Accept": kind}, timeout=30)
    put = requests.put(f"{url}/{tag}", data=found.content, headers={"Content-Type": kind}, timeout=30)
    assert put.status_code == 201, put.text


def test_a_claim_cannot_name_a_repository_its_class_does_not_list(cluster: KubernetesApi, registry_host: str) -> None:
    claim_for(cluster, "foreign", f"{registry_host}/other/model:v1")

    def explained() -> bool:
        return any(
            "ProvisioningFailed" in event and "allowedRepositories" in event for event in cluster.events("foreign")
        )

    cluster.wait("an event on the claim that says why", explained, 90)
    assert phase_of(cluster, f"{CLAIMS}/foreign") == "Pending"
    cluster.request("DELETE", f"{CLAIMS}/foreign")


def test_a_sub_path_of_a_file_and_of_a_directory(cluster: KubernetesApi, model: Model) -> None:
    mounts = [
        {"name": "model", "mountPath": "/models/weights", "subPathExpr": "$(PART)", "readOnly": True},
        {"name": "model", "mountPath": "/version", "subPath": "version.txt", "readOnly": True},
    ]
    command = (
        "cat /version > /dev/termination-log; ls /models/weights >> /dev/termination-log;"
        "sha256sum < /models/weights/model.safetensors | cut -d' ' -f1 >> /dev/termination-log"
    )
    pod = cluster.pod_of("subpath", command, inline(model.references["v2"]), mounts)
    pod["spec"]["containers"][0]["env"] = [{"name": "PART", "value": "weights"}]
    cluster.create("pods", pod)
    assert cluster.result("subpath") == (0, f"v2model.safetensors\n{model.digests['v2']}")


RESTRICTED: dict[str, Any] = {
    "securityContext": {
        "runAsNonRoot": True,
        "runAsUser": 1234,
        "fsGroup": 4321,  # kubelet must not try to change owners in a read-only tree
        "seccompProfile": {"type": "RuntimeDefault"},
    }
}


def test_a_pod_of_the_restricted_profile_may_use_an_inline_model(cluster: KubernetesApi, model: Model) -> None:
    """Pod Security allows `csi` volumes in its strictest profile; the namespace enforces it here."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "restricted", "labels": labels}}
    cluster.request("POST", "/api/v1/namespaces", namespace)
    try:
        pod = cluster.pod_of("restricted", HASH, inline(model.references["v1"]), MOUNTS, **RESTRICTED)
        pod["spec"]["containers"][0]["securityContext"] = {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        cluster.wait(
            "the namespace's service account",
            lambda: cluster.get("/api/v1/namespaces/restricted/serviceaccounts/default") is not None,
            30,
        )
        cluster.create("pods", pod, "restricted")
        assert cluster.result("restricted", namespace="restricted") == (0, model.digests["v1"])
    finally:
        cluster.request("DELETE", "/api/v1/namespaces/restricted")
        cluster.wait("the namespace to go", lambda: cluster.get("/api/v1/namespaces/restricted") is None, 90)


def test_a_pod_with_a_user_namespace_of_its_own(cluster: KubernetesApi, model: Model) -> None:
    command = (
        "{ sha256sum /models/weights/model.safetensors | cut -d' ' -f1;"
        " cat /proc/self/uid_map; stat -c %u /models/version.txt; } > /dev/termination-log 2>&1"
    )
    cluster.run_pod("userns", command, inline(model.references["v1"]), MOUNTS, hostUsers=False)
    status, message = cluster.result("userns")
    assert len(message.splitlines()) == 3, message
    digest, uid_map, owner = message.splitlines()
    assert (status, digest) == (0, model.digests["v1"])
    assert uid_map.split()[0] == "0"
    assert uid_map.split()[1] != "0", "uid 0 of the pod is another user of the node"
    assert owner == "0", "the model's mount is mapped as the pod is"


def test_ten_pods_share_one_mount(cluster: KubernetesApi, model: Model) -> None:
    names = [f"many-{number}" for number in range(10)]
    for name in names:
        cluster.run_pod(name, f"{HASH}; sleep 600", inline(model.references["v1"]), MOUNTS)
    for name in names:
        cluster.wait_running(name, 120)
    mounts = cluster.status()
    assert [len(mount["targets"]) for mount in mounts] == [10]


def test_a_wrong_attribute_is_explained_to_whoever_describes_the_pod(cluster: KubernetesApi, model: Model) -> None:
    volumes = inline(model.references["v1"])
    volumes[0]["csi"]["volumeAttributes"]["colour"] = "red"
    cluster.run_pod("wrong", HASH, volumes, MOUNTS)

    def explained() -> bool:
        return any("FailedMount" in event and "unknown key 'colour'" in event for event in cluster.events("wrong"))

    cluster.wait("an event that names the attribute", explained, 60)


def test_a_pull_secret_is_used_and_a_missing_one_is_explained(
    cluster: KubernetesApi, local_cluster: LocalCluster, registry_binary: Path, tmp_path: Path
) -> None:
    registry = RegistryProcess(registry_binary, tmp_path / "registry", htpasswd=True)
    registry.start(f"{ADDRESS}:5001")
    try:
        login = ("--username", USERNAME, "--password-stdin")
        private = Model(registry.host, tmp_path, "team/private", login, size_mib=4)
        data = {"username": USERNAME, "password": PASSWORD}
        secret = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "login"},
            "type": "kubernetes.io/basic-auth",
            "data": {key: base64.b64encode(value.encode()).decode() for key, value in data.items()},
        }
        cluster.create("secrets", secret)
        cluster.run_pod(
            "secret", HASH, inline(private.references["v1"], nodePublishSecretRef={"name": "login"}), MOUNTS
        )
        assert cluster.result("secret") == (0, private.digests["v1"])
        cluster.run_pod("no-secret", HASH, inline(private.references["v1"]), MOUNTS)

        def explained() -> bool:
            events = cluster.events("no-secret")
            return any("FailedMount" in event and "nodePublishSecretRef" in event for event in events)

        cluster.wait("an event that says what is missing", explained, 60)
        assert not any(PASSWORD in event for event in cluster.events("no-secret"))
        for component in ("keeper", "supervisor", "node"):
            for pod in cluster.driver_pods(component):
                log = cluster.kubectl("logs", "-n", "modelmount-system", pod["metadata"]["name"])
                assert PASSWORD not in log
                assert base64.b64encode(PASSWORD.encode()).decode() not in log
        cluster.delete_pod("no-secret")
        cluster.delete_pod("secret")
    finally:
        registry.stop()


def test_a_deployment_is_rolled_to_the_next_version_and_back_while_the_first_stays_warm(
    cluster: KubernetesApi, model: Model
) -> None:
    """Rolling back costs no download: the previous version is in the node's cache, verified."""

    def template(version: str) -> dict[str, Any]:
        command = f"{HASH.replace('/dev/termination-log', '/tmp/hash')}; touch /tmp/done; sleep 3600"
        pod = cluster.pod_of("server", command, inline(model.references[version]), MOUNTS)
        pod["spec"]["restartPolicy"] = "Always"
        pod["spec"]["containers"][0]["readinessProbe"] = {
            "exec": {"command": ["test", "-e", "/tmp/done"]},
            "periodSeconds": 1,
        }
        return {"metadata": pod["metadata"] | {"annotations": {"version": version}}, "spec": pod["spec"]}

    path = "/apis/apps/v1/namespaces/default/deployments"
    body = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "server"},
        "spec": {"replicas": 2, "selector": {"matchLabels": {"app": "server"}}, "template": template("v1")},
    }
    cluster.request("POST", path, body)

    def serves(version: str) -> bool:
        pods = cluster.request("GET", "/api/v1/namespaces/default/pods", labelSelector="app=server")["items"]
        ready = [
            pod
            for pod in pods
            if pod["metadata"]["annotations"].get("version") == version
            and any(status["ready"] for status in pod["status"].get("containerStatuses", []))
        ]
        if len(ready) != 2 or len(pods) != 2:
            return False
        names = [pod["metadata"]["name"] for pod in ready]
        return all(
            cluster.kubectl("exec", n, "--", "cat", "/tmp/hash").strip() == model.digests[version] for n in names
        )

    cluster.wait("version 1 to serve", lambda: serves("v1"), 90)
    for version in ("v2", "v1"):
        cluster.request("PATCH", f"{path}/server", {"spec": {"template": template(version)}})
        cluster.wait(f"{version} to serve alone", lambda wanted=version: serves(wanted), 90)  # type: ignore[misc]
    (mount,) = cluster.status()
    assert mount["digest"] in model.references["v1"]

    def is_whole() -> bool:
        (now,) = cluster.status()
        return all(blob["present_blocks"] == blob["blocks"] for blob in now["progress"]["blobs"])

    cluster.wait("all of it to be there", is_whole, 60)
    (mount,) = cluster.status()
    assert mount["progress"].get("fetched_bytes", 0) == 0, "the way back fetched bytes again"
    cluster.request("DELETE", f"{path}/server")


def test_what_a_pod_sees_is_read_only_and_sane(cluster: KubernetesApi, model: Model) -> None:
    command = (
        "df /models | grep -q modelmount || exit 3;"
        "stat -c %a /models/version.txt > /dev/termination-log;"
        "touch /models/version.txt 2>/dev/null && exit 4;"
        "cat /models/version.txt >> /dev/termination-log"
    )
    volumes = inline(model.references["v1"])
    volumes[0]["csi"].pop("readOnly")  # kubelet says readonly=false then
    mounts = [{"name": "model", "mountPath": "/models"}]
    cluster.run_pod("modes", command, volumes, mounts)
    assert cluster.result("modes") == (0, "444\nv1")
