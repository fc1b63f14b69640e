"""What external-provisioner does for a claim, done here: its image cannot be had everywhere. The controller is the chart's,
in its own container; only the sidecar's part, CreateVolume and DeleteVolume and the PersistentVolume between them, is ours.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from e2e.api import DRIVER
from e2e.local_cluster import LocalCluster

from csi.wire import csi_pb2, csi_pb2_grpc


@contextmanager
def controller_of(cluster: LocalCluster) -> Iterator[csi_pb2_grpc.ControllerStub]:
    """The controller's socket, which lies in a volume of its pod."""
    (pod,) = cluster.driver_pods("controller")
    volume = cluster.kubelet_dir / "pods" / pod["metadata"]["uid"] / "volumes" / "kubernetes.io~empty-dir" / "socket"
    with tempfile.TemporaryDirectory() as short:  # a socket's path has at most 107 bytes
        os.symlink(volume, f"{short}/s")
        with grpc.insecure_channel(f"unix:{short}/s/csi.sock") as channel:
            yield csi_pb2_grpc.ControllerStub(channel)


def provision(cluster: LocalCluster, claim: dict[str, Any]) -> str:
    """Make the claim's PersistentVolume. Returns its name. Raises: grpc.RpcError as the controller answers."""
    metadata, storage_class = claim["metadata"], claim["spec"]["storageClassName"]
    parameters = cluster.request("GET", f"/apis/storage.k8s.io/v1/storageclasses/{storage_class}")["parameters"]
    name = f"pvc-{metadata['uid']}"
    request = csi_pb2.CreateVolumeRequest(
        name=name,
        parameters={
            **parameters,
            "csi.storage.k8s.io/pvc/name": metadata["name"],
            "csi.storage.k8s.io/pvc/namespace": metadata["namespace"],
            "csi.storage.k8s.io/pv/name": name,
        },
    )
    request.capacity_range.required_bytes = 1 << 30
    capability = request.volume_capabilities.add()
    capability.mount.SetInParent()
    capability.access_mode.mode = csi_pb2.VolumeCapability.AccessMode.MULTI_NODE_READER_ONLY
    with controller_of(cluster) as controller:
        volume = controller.CreateVolume(request, timeout=30).volume
    cluster.request(
        "POST",
        "/api/v1/persistentvolumes",
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": name},
            "spec": {
                "capacity": {"storage": str(volume.capacity_bytes)},
                "accessModes": claim["spec"]["accessModes"],
                "storageClassName": storage_class,
                "persistentVolumeReclaimPolicy": "Delete",
                "claimRef": {
                    "apiVersion": "v1",
                    "kind": "PersistentVolumeClaim",
                    **{key: metadata[key] for key in ("name", "namespace", "uid")},
                },
                "csi": {
                    "driver": DRIVER,
                    "volumeHandle": volume.volume_id,
                    "volumeAttributes": dict(volume.volume_context),
                },
            },
        },
    )
    return name


def unprovision(cluster: LocalCluster, name: str) -> None:
    """After the claim's end: DeleteVolume, and the object goes."""
    volume = cluster.request("GET", f"/api/v1/persistentvolumes/{name}")
    with controller_of(cluster) as controller:
        controller.DeleteVolume(
            csi_pb2.DeleteVolumeRequest(volume_id=volume["spec"]["csi"]["volumeHandle"]), timeout=30
        )
    cluster.request("DELETE", f"/api/v1/persistentvolumes/{name}")
