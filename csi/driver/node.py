"""The CSI Node service: parse, call the publisher, map the result.

Source: CSI 1.13 spec, "NodePublishVolume" and following; what kubelet really sends is in docs/architecture.md.
"""

from __future__ import annotations

import asyncio
import hashlib
import json

import grpc

from csi.driver.handlers import required_id, required_path, rpc
from csi.driver.publisher import Publisher, PublishRequest
from csi.errors import InvalidVolumeError
from csi.volume import parse_attributes
from csi.wire import csi_pb2, csi_pb2_grpc

# What a pod or PV may ask for: all of it is true of every mount already.
_MOUNT_FLAGS = frozenset({"ro", "nosuid", "nodev", "noexec", "noatime", "nodiratime"})
_TOKENS_KEY = "csi.storage.k8s.io/serviceAccount.tokens"


class NodeService(csi_pb2_grpc.NodeServicer):
    """Stage, expand and health RPCs are not offered: the generated base class answers UNIMPLEMENTED."""

    def __init__(self, node_id: str, publisher: Publisher) -> None:
        self._node_id = node_id
        self._publisher = publisher
        self._running: set[asyncio.Task[object]] = set()

    @rpc
    async def NodePublishVolume(
        self, request: csi_pb2.NodePublishVolumeRequest, context: grpc.aio.ServicerContext
    ) -> csi_pb2.NodePublishVolumeResponse:
        await self._to_the_end(self._publisher.publish(parse_publish(request)))
        return csi_pb2.NodePublishVolumeResponse()

    @rpc
    async def NodeUnpublishVolume(
        self, request: csi_pb2.NodeUnpublishVolumeRequest, context: grpc.aio.ServicerContext
    ) -> csi_pb2.NodeUnpublishVolumeResponse:
        volume_id = required_id(request.volume_id, "volume_id")
        await self._to_the_end(self._publisher.unpublish(volume_id, required_path(request.target_path, "target_path")))
        return csi_pb2.NodeUnpublishVolumeResponse()

    @rpc
    async def NodeGetVolumeStats(
        self, request: csi_pb2.NodeGetVolumeStatsRequest, context: grpc.aio.ServicerContext
    ) -> csi_pb2.NodeGetVolumeStatsResponse:
        volume_id = required_id(request.volume_id, "volume_id")
        if not request.volume_path:
            raise InvalidVolumeError("volume_path is missing", field="volume_path")
        published = self._publisher.publication(volume_id, request.volume_path)
        if published is None:
            await context.abort(
                grpc.StatusCode.NOT_FOUND, f"volume {volume_id} is not published at {request.volume_path[:200]}"
            )
        assert published is not None
        usage = csi_pb2.VolumeUsage
        return csi_pb2.NodeGetVolumeStatsResponse(
            usage=[
                usage(unit=usage.BYTES, total=published.total_bytes, used=published.total_bytes, available=0),
                usage(unit=usage.INODES, total=published.files, used=published.files, available=0),
            ]
        )

    @rpc
    async def NodeGetCapabilities(
        self, request: csi_pb2.NodeGetCapabilitiesRequest, context: grpc.aio.ServicerContext
    ) -> csi_pb2.NodeGetCapabilitiesResponse:
        capability = csi_pb2.NodeServiceCapability
        return csi_pb2.NodeGetCapabilitiesResponse(
            capabilities=[capability(rpc=capability.RPC(type=capability.RPC.GET_VOLUME_STATS))]
        )

    @rpc
    async def NodeGetInfo(
        self, request: csi_pb2.NodeGetInfoRequest, context: grpc.aio.ServicerContext
    ) -> csi_pb2.NodeGetInfoResponse:
        return csi_pb2.NodeGetInfoResponse(node_id=self._node_id)

    async def _to_the_end(self, work: object) -> None:
        """kubelet's deadline cancels this handler, never the work: its next call finds it done, or in progress."""
        task: asyncio.Task[object] = asyncio.ensure_future(work)  # type: ignore[call-overload]
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        await asyncio.shield(task)


def parse_publish(request: csi_pb2.NodePublishVolumeRequest) -> PublishRequest:
    """Raises: InvalidVolumeError naming the field. Any access mode will do; the mount is read-only whatever it is."""
    volume_id = required_id(request.volume_id, "volume_id")
    target_path = required_path(request.target_path, "target_path")
    if not request.HasField("volume_capability"):
        raise InvalidVolumeError("volume_capability is missing", field="volume_capability")
    capability = request.volume_capability
    if capability.HasField("block"):
        raise InvalidVolumeError(
            "volume_capability: a model is a file system; ask for volumeMode Filesystem, not Block",
            field="volume_capability.block",
        )
    if not capability.HasField("mount"):
        raise InvalidVolumeError("volume_capability: access type mount is missing", field="volume_capability.mount")
    if not capability.HasField("access_mode") or not capability.access_mode.mode:
        raise InvalidVolumeError("volume_capability: access_mode is missing", field="volume_capability.access_mode")
    refused = sorted(set(capability.mount.mount_flags) - _MOUNT_FLAGS)
    if refused:
        name = refused[0].partition("=")[0][:40]  # the CSI spec allows secrets in the values of mount flags
        raise InvalidVolumeError(
            f"mountOptions: {name!r} is not supported; allowed: {', '.join(sorted(_MOUNT_FLAGS))}",
            field="volume_capability.mount.mount_flags",
        )
    attributes = parse_attributes(request.volume_context)
    return PublishRequest(
        volume_id=volume_id,
        target_path=target_path,
        attributes=attributes,
        arguments=_fingerprint(request),
        credentials=_credentials(request),
    )


def _fingerprint(request: csi_pb2.NodePublishVolumeRequest) -> str:
    """Everything a repeat must repeat: not secrets, and not what Kubernetes itself adds (tokens rotate)."""
    own = {
        key: value
        for key, value in request.volume_context.items()
        if not key.startswith(("csi.storage.k8s.io/", "storage.kubernetes.io/"))
    }
    capability = request.volume_capability
    described = [
        own,
        request.readonly,
        int(capability.access_mode.mode),
        capability.mount.fs_type,
        sorted(capability.mount.mount_flags),
    ]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _credentials(request: csi_pb2.NodePublishVolumeRequest) -> dict[str, str] | None:
    """`username` and `password` of nodePublishSecretRef. Raises: InvalidVolumeError for half of them."""
    secrets = {key: value for key, value in request.secrets.items() if key != _TOKENS_KEY}
    if not secrets:
        return None
    if "username" not in secrets or "password" not in secrets:
        raise InvalidVolumeError(
            f"nodePublishSecretRef: the secret has the keys {', '.join(sorted(secrets))}; expected username and "
            "password (type kubernetes.io/basic-auth)",
            field="secrets",
        )
    return {"username": secrets["username"], "password": secrets["password"]}
