"""One cluster and one release of the chart for the whole run."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
from e2e.api import KubernetesApi
from e2e.helm import ROOT, Helm
from e2e.images import PROVISIONER_IMAGE
from e2e.local_cluster import ADDRESS, LocalCluster
from e2e.models import Model
from e2e.remote_cluster import RemoteCluster
from registry_process import RegistryProcess

BINARIES = Path(os.environ.get("MODELMOUNT_E2E_BINARIES", ROOT / ".tools" / "k8s"))
IMAGE = os.environ.get("MODELMOUNT_E2E_IMAGE", "localhost/modelmount:dev")
# Another version of image and chart, as tests/e2e/build-other makes it.
OTHER_IMAGE = os.environ.get("MODELMOUNT_E2E_OTHER_IMAGE", "localhost/modelmount:other")
OTHER_DIRECTORY = ROOT / ".tools" / "other"
OTHER_ARCHIVE = OTHER_DIRECTORY / "image.tar"
IMAGE_ARCHIVE = Path(os.environ.get("MODELMOUNT_E2E_IMAGE_ARCHIVE", ROOT / ".tools" / "image" / "modelmount.tar"))
_KUBERNETES = ("kubelet", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl", "csi-provisioner")
_NEEDED = (*_KUBERNETES, "containerd", "runc")


@pytest.fixture(scope="session")
def helm_binary() -> str:
    """helm as built by `make e2e`, else the PATH's."""
    built = BINARIES / "helm"
    found = str(built) if built.exists() else shutil.which("helm")
    if found is None:
        pytest.skip("no helm; 'make e2e' builds it")
    return found


@pytest.fixture(scope="session")
def directory() -> Path:
    """Short, because sockets lie below it."""
    path = ROOT / (".e2e-remote" if os.environ.get("KUBECONFIG") else ".e2e")
    shutil.rmtree(path, ignore_errors=True)
    return path


@pytest.fixture(scope="session")
def cluster(directory: Path) -> Iterator[KubernetesApi]:
    """KUBECONFIG's cluster, else one of our own."""
    if kubeconfig := os.environ.get("KUBECONFIG"):
        remote = RemoteCluster(Path(kubeconfig), _given_values().get("stateDir", "/run/modelmount"))
        remote.driver_image = IMAGE
        try:
            yield remote
        finally:
            remote.stop()
        return
    missing = [name for name in _NEEDED if not (BINARIES / name).exists()]
    missing += [name for name in ("etcd", "ip") if shutil.which(name) is None]
    missing += [] if IMAGE_ARCHIVE.exists() else [IMAGE_ARCHIVE.name]
    if missing:
        pytest.skip(f"no Kubernetes to run: {', '.join(missing)} missing; 'make e2e' builds it")
    local = LocalCluster(directory, BINARIES)
    local.driver_image = IMAGE
    try:
        local.start()
        local.import_image(IMAGE_ARCHIVE)
        yield local
    finally:
        local.stop()


@pytest.fixture
def local_cluster(cluster: KubernetesApi) -> LocalCluster:
    """For what needs the node's owner."""
    if not isinstance(cluster, LocalCluster):
        pytest.skip("only on the suite's own node: a remote cluster's node is not ours to stop")
    return cluster


@pytest.fixture(scope="session")
def registry_host(cluster: KubernetesApi, request: pytest.FixtureRequest) -> str:
    """An anonymous plain-HTTP registry that this process and the nodes reach by the same name."""
    if given := os.environ.get("MODELMOUNT_E2E_REGISTRY"):
        return given
    if not cluster.is_local:
        pytest.skip("MODELMOUNT_E2E_REGISTRY must name a plain-HTTP registry that the nodes reach")
    registry = RegistryProcess(
        request.getfixturevalue("registry_binary"), request.getfixturevalue("directory") / "registry"
    )
    registry.start(f"{ADDRESS}:5000")
    request.addfinalizer(registry.stop)  # noqa: PT021
    return registry.host


@pytest.fixture(scope="session")
def values(cluster: KubernetesApi, registry_host: str) -> dict[str, Any]:
    """The values of the release."""
    repository, _, tag = IMAGE.rpartition(":")
    values: dict[str, Any] = {
        "image": {"repository": repository, "tag": tag, "pullPolicy": cluster.pull_policy},
        "fetch.plainHTTPHosts": [registry_host],
        "storageClasses": [{"name": "models", "allowedRepositories": [f"{registry_host}/team/*"]}],
        "fetch.readDeadlineSeconds": 20,  # an outage ends within a test's time
    }
    if isinstance(cluster, LocalCluster):
        values |= {
            "controller.provisioner.image": PROVISIONER_IMAGE,
            # How full this machine's disk is does not matter.
            "cache.minFreePercent": 1,
            "fetch.plainHTTPHosts": [registry_host, f"{ADDRESS}:5001", f"{ADDRESS}:5002"],
            "kubeletDir": str(cluster.kubelet_dir),
            "stateDir": cluster.state_dir,
            "dataDir": str(cluster.data_dir),
        }
    return values | _given_values()


def _given_values() -> dict[str, Any]:
    """What a remote cluster needs besides: MODELMOUNT_E2E_VALUES='{"kubeletDir": "/var/lib/k0s/kubelet"}'."""
    return dict(json.loads(os.environ.get("MODELMOUNT_E2E_VALUES") or "{}"))


@dataclass(frozen=True, slots=True)
class Version:
    """Another version of image and chart; `values` name the image."""

    chart: Path
    tag: str
    version: str
    values: dict[str, Any]


@pytest.fixture(scope="session")
def other(cluster: KubernetesApi) -> Version:
    """What the release is upgraded to, and from where it is rolled back."""
    charts = list(OTHER_DIRECTORY.glob("modelmount-*.tgz"))
    if not charts:
        pytest.skip("no other version of the chart; tests/e2e/build-other makes one")
    if isinstance(cluster, LocalCluster):
        cluster.import_image(OTHER_ARCHIVE)
    elif "MODELMOUNT_E2E_OTHER_IMAGE" not in os.environ:
        pytest.skip("MODELMOUNT_E2E_OTHER_IMAGE must name an image of another version that the nodes have")
    repository, _, tag = OTHER_IMAGE.rpartition(":")
    image = {"repository": repository, "tag": tag, "pullPolicy": cluster.pull_policy}
    return Version(charts[0], tag, (OTHER_DIRECTORY / "version").read_text().strip(), {"image": image})


@pytest.fixture(scope="session")
def helm(cluster: KubernetesApi, helm_binary: str, directory: Path) -> Helm:
    """helm for the cluster."""
    return Helm(helm_binary, directory, cluster.kubeconfig)


@pytest.fixture(scope="session")
def release(cluster: KubernetesApi, helm: Helm, values: dict[str, Any]) -> Iterator[Helm]:
    """The chart, installed and registered with kubelet."""
    helm.install(values)
    try:
        for component in ("keeper", "supervisor", "node"):
            cluster.wait_rolled_out(component)
        cluster.wait("kubelet to register the driver", cluster.is_registered, 60)
        yield helm
    finally:
        helm.uninstall()


@pytest.fixture(scope="session")
def model(registry_host: str, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Two versions of 24 MiB."""
    return Model(registry_host, tmp_path_factory.mktemp("models"), "team/model")


@pytest.fixture
def clean(cluster: KubernetesApi, release: Helm) -> Iterator[None]:
    """After the test: no pod, no mount on the node, no mount in the driver."""
    yield
    for plural in ("deployments",):
        for found in cluster.request("GET", f"/apis/apps/v1/namespaces/default/{plural}")["items"]:
            cluster.request("DELETE", f"/apis/apps/v1/namespaces/default/{plural}/{found['metadata']['name']}")
    names = [pod["metadata"]["name"] for pod in cluster.request("GET", "/api/v1/namespaces/default/pods")["items"]]
    for name in names:
        with contextlib.suppress(requests.HTTPError):  # gone already
            cluster.request("DELETE", f"/api/v1/namespaces/default/pods/{name}")
    for name in names:
        cluster.wait_gone(name, 60)
    cluster.wait("every mount of the driver to end", lambda: cluster.status() == [], 30)
    if isinstance(cluster, LocalCluster):
        cluster.wait("every mount to be gone", lambda: cluster.models_mounted() == [], 30)
