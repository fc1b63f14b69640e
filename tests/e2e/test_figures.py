"""Figures, printed and never judged: `make e2e-figures`."""

from __future__ import annotations

import os
import time
from datetime import datetime
from pathlib import Path

import pytest
from e2e.api import KubernetesApi
from e2e.local_cluster import ADDRESS, LocalCluster
from e2e.models import MOUNTS, inline, sparse_model
from registry_process import RegistryProcess

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("clean"),
    pytest.mark.skipif(not os.environ.get("MODELMOUNT_E2E_FIGURES"), reason="figures are measured on request only"),
]


def seconds_to_running(cluster: KubernetesApi, name: str, reference: str) -> tuple[float, float]:
    """From the create call to the container's start, by our clock; and the part kubelet's record gives, in whole seconds."""
    started = time.time()
    cluster.run_pod(name, "sleep 600", inline(reference), MOUNTS)
    cluster.wait_running(name, 120)
    seen = time.time() - started
    state = cluster.pod(name)["status"]["containerStatuses"][0]["state"]["running"]["startedAt"]
    return seen, datetime.fromisoformat(state).timestamp() - int(started)


@pytest.mark.parametrize("size", [1 << 30, 20 << 30], ids=["1GiB", "20GiB"])
def test_seconds_from_pod_create_to_running(
    cluster: KubernetesApi, local_cluster: LocalCluster, registry_binary: Path, tmp_path: Path, size: int
) -> None:
    registry = RegistryProcess(registry_binary, tmp_path / "registry")
    registry.start(f"{ADDRESS}:5002")
    try:
        reference = sparse_model(registry, size)
        cluster.run_pod("none", "sleep 600", [], [])
        begun = time.time()
        cluster.wait_running("none")
        bare = time.time() - begun
        figures = {"pod without a volume": bare}
        figures["cold"], _ = seconds_to_running(cluster, "cold", reference)
        figures["mounted already"], _ = seconds_to_running(cluster, "second", reference)
        for name in ("cold", "second"):
            cluster.delete_pod(name)
        cluster.wait("the mount to end", lambda: cluster.status() == [], 30)
        figures["warm"], _ = seconds_to_running(cluster, "warm", reference)
        print(f"\n{size >> 30} GiB, pod create to running: " + ", ".join(f"{k} {v:.2f} s" for k, v in figures.items()))
        cluster.delete_pod("warm")
    finally:
        registry.stop()


def test_resident_memory_of_each_container(cluster: KubernetesApi, local_cluster: LocalCluster) -> None:
    told = []
    for component in ("keeper", "supervisor", "node", "controller"):
        (pid,) = local_cluster.container_pids(component)
        name_space = os.readlink(f"/proc/{pid}/ns/pid")
        resident, proportional = 0, 0
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and _name_space(entry) == name_space:
                rollup = dict(line.split()[:2] for line in (entry / "smaps_rollup").read_text().splitlines()[1:])
                resident += int(rollup["Rss:"]) * 1024
                proportional += int(rollup["Pss:"]) * 1024
        told.append(f"{component} {resident / 1e6:.0f} MB (Pss {proportional / 1e6:.0f})")
    print("\nresident, idle, sum of a container's processes (spare worker and fetcher included): " + ", ".join(told))


def _name_space(entry: Path) -> str:
    try:
        return os.readlink(entry / "ns" / "pid")
    except OSError:
        return ""
