"""Kubernetes events on the pod, posted by a real node to an API server."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from fakes.kube_api import FakeKubeApi, Refusal
from fakes.registry import FakeRegistry, Fault
from support.node_process import NodeProcess

pytestmark = pytest.mark.fuse

POD = {
    "csi.storage.k8s.io/pod.name": "reader-0",
    "csi.storage.k8s.io/pod.namespace": "apps",
    "csi.storage.k8s.io/pod.uid": "0e1f-uid",
}


def wait_for(api: FakeKubeApi, reason: str) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while not (found := [one for one in api.below("/namespaces/apps/events/") if one["reason"] == reason]):
        assert time.monotonic() < deadline, [one["reason"] for one in api.below("/events/")]
        time.sleep(0.1)
    return found[0]


def test_a_pods_owner_is_told(tmp_path: Path, fake_registry: FakeRegistry) -> None:
    digest = fake_registry.add_model("team/model", "v1", {"model.safetensors": os.urandom(5 << 20)})
    reference = f"{fake_registry.host}/team/model@{digest}"
    with (
        FakeKubeApi() as api,
        NodeProcess(tmp_path, f"--kubeconfig={api.kubeconfig(tmp_path / 'kubeconfig')}", "--spares=0") as node,
    ):
        target = node.target()
        for _ in range(3):
            with pytest.raises(grpc.RpcError):
                node.publish(f"{fake_registry.host}/team/absent:v1", target, attributes=POD)
        refused = wait_for(api, "ModelRefused")
        assert refused["type"] == "Warning"
        assert "not found" in refused["message"]
        assert refused["involvedObject"] == {
            "apiVersion": "v1",
            "kind": "Pod",
            "namespace": "apps",
            "name": "reader-0",
            "uid": "0e1f-uid",
        }
        assert len([one for one in api.asked if one.verb == "POST" and one.path.endswith("/events")]) == 1

        fault = Fault(match="/blobs/", status=503, times=1_000_000)
        fake_registry.faults.append(fault)
        node.publish(reference, target, attributes=POD)
        degraded = wait_for(api, "ModelDegraded")
        assert degraded["message"].startswith("RegistryUnreachable: ")
        assert degraded["source"] == {"component": "csi.modelmount.dev", "host": "test-node"}
        fake_registry.faults.clear()
        wait_for(api, "ModelHealed")
        wait_for(api, "ModelVerified")
        assert node.identity.Probe

        api.refusals.append(Refusal("/events", 403))
        node.publish(reference, node.target("second"), "vol-2", attributes=POD)
        node.unpublish_all()
