"""The controller's socket, spoken to beside external-provisioner: what it says to a repeat, or to another wish of that name."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from e2e.local_cluster import LocalCluster

from csi.wire import csi_pb2, csi_pb2_grpc

_REPEATED = (
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAVAILABLE,
)


@contextmanager
def controller_of(cluster: LocalCluster) -> Iterator[csi_pb2_grpc.ControllerStub]:
    """The controller's socket, which lies in a volume of its pod."""
    (pod,) = cluster.driver_pods("controller")
    volume = cluster.kubelet_dir / "pods" / pod["metadata"]["uid"] / "volumes" / "kubernetes.io~empty-dir" / "socket"
    with tempfile.TemporaryDirectory() as short:  # a socket's path has at most 107 bytes
        os.symlink(volume, f"{short}/s")
        with grpc.insecure_channel(f"unix:{short}/s/csi.sock") as channel:
            yield csi_pb2_grpc.ControllerStub(channel)


def create_request(cluster: LocalCluster, claim: dict[str, Any]) -> csi_pb2.CreateVolumeRequest:
    """CreateVolume as external-provisioner sends it for that claim, with `--extra-create-metadata`."""
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
    return request


def create_volume(cluster: LocalCluster, request: csi_pb2.CreateVolumeRequest) -> csi_pb2.Volume:
    """Repeated, as external-provisioner does, while the controller is away or busy with that volume; 15 s each.

    Raises: grpc.RpcError for any other answer.
    """
    deadline, delay_s = time.monotonic() + 120, 0.2
    while True:
        try:
            with controller_of(cluster) as controller:
                answer: csi_pb2.CreateVolumeResponse = controller.CreateVolume(request, timeout=15)
                return answer.volume
        except (grpc.RpcError, ValueError) as exc:  # ValueError: its pod is being replaced
            if (isinstance(exc, grpc.RpcError) and exc.code() not in _REPEATED) or time.monotonic() > deadline:
                raise
        time.sleep(delay_s)
        delay_s = min(5.0, delay_s * 2)
