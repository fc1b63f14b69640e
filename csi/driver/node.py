"""The CSI Node service: parse, call the publisher, map the result.

Source: CSI 1.13 spec, "NodePublishVolume" and following; what kubelet really sends is in docs/architecture.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import grpc

from csi.credentials import Keyring, united
from csi.driver.announcer import Announcer
from csi.driver.capabilities import check_capability, described
from csi.driver.credentials import candidates, keyring_of
from csi.driver.handlers import ToTheEnd, required_id, required_path, rpc
from csi.driver.publisher import Publisher, PublishRequest
from csi.driver.token_login import TokenLogin, service_account_of, token_credentials
from csi.errors import InvalidVolumeError, ModelMountError, VolumeNotFoundError
from csi.pods import pod_of
from csi.volume import SHARED_DOMAIN, Sharing, isolated_domain, parse_attributes
from csi.wire import csi_pb2, csi_pb2_grpc

_POD_NAMESPACE = "csi.storage.k8s.io/pod.namespace"


@dataclass(frozen=True, slots=True)
class NodePolicy:
    """What an administrator has set for this node. `token_logins` by registry."""

    sharing: Sharing = Sharing.SHARED
    token_logins: Mapping[str, TokenLogin] = field(default_factory=dict)


class NodeService(csi_pb2_grpc.NodeServicer):
    """Stage and expand RPCs are not offered: the generated base class answers UNIMPLEMENTED."""

    def __init__(
        self,
        node_id: str,
        publisher: Publisher,
        policy: NodePolicy = NodePolicy(),
        announcer: Announcer | None = None,
    ) -> None:
        self._announcer = announcer
        self._node_id = node_id
        self._policy = policy
        self._publisher = publisher
        self._work = ToTheEnd()

    @rpc
    async def NodePublishVolume(
        self, request: csi_pb2.NodePublishVolumeRequest, context: grpc.aio.ServicerContext
    ) -> csi_pb2.NodePublishVolumeResponse:
        try:
            await self._work.run(self._publisher.publish(parse_publish(request, self._policy)))
        except ModelMountError as exc:
            if self._announcer is not None:
                await self._announcer.refused(pod_of(request.volume_context), exc)
            raise
        return csi_pb2.NodePublishVolumeResponse()

    @rpc
    async def NodeUnpublishVolume(
        self, request: csi_pb2.NodeUnpublishVolumeRequest, context: grpc.aio.ServicerContext
    ) -> csi_pb2.NodeUnpublishVolumeResponse:
        volume_id = required_id(request.volume_id, "volume_id")
        await self._work.run(self._publisher.unpublish(volume_id, required_path(request.target_path, "target_path")))
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
            raise VolumeNotFoundError(
                f"volume {volume_id} is not published at {request.volume_path[:200]}", volume_id=volume_id
            )
        usage = csi_pb2.VolumeUsage
        return csi_pb2.NodeGetVolumeStatsResponse(
            usage=[
                usage(unit=usage.BYTES, total=published.total_bytes, used=published.total_bytes, available=0),
                usage(unit=usage.INODES, total=published.files, used=published.files, available=0),
            ]
        )

    @rpc
    async def NodeGetVolumeHealth(
        self, request: csi_pb2.NodeGetVolumeHealthRequest, context: grpc.aio.ServicerContext
    ) -> csi_pb2.NodeGetVolumeHealthResponse:
        volume_id = required_id(request.volume_id, "volume_id")
        # The path is optional here: without it every place is asked about where the volume is published.
        published = [
            publication
            for publication in self._publisher.of_volume(volume_id)
            if request.volume_publish_path in ("", publication.target_path)
        ]
        if not published:
            raise VolumeNotFoundError(
                f"volume {volume_id} is not published at {request.volume_publish_path[:200] or 'any path here'}",
                volume_id=volume_id,
            )
        troubles = {
            (trouble.severity, trouble.reason): trouble
            for publication in published
            for trouble in await self._publisher.troubles(publication)
        }
        entry = csi_pb2.VolumeHealth.VolumeHealthEntry
        return csi_pb2.NodeGetVolumeHealthResponse(
            volume_health=csi_pb2.VolumeHealth(
                volume_id=volume_id,
                health_statuses=[
                    entry(status=trouble.severity.value, reason=trouble.reason, message=trouble.message)
                    for trouble in troubles.values()
                ],
            )
        )

    @rpc
    async def NodeGetStorageHealth(
        self, request: csi_pb2.NodeGetStorageHealthRequest, context: grpc.aio.ServicerContext
    ) -> csi_pb2.NodeGetStorageHealthResponse:
        health = csi_pb2.NodeGetStorageHealthResponse.StorageBackendHealth
        return csi_pb2.NodeGetStorageHealthResponse(
            backend_health=[
                health(status=csi_pb2.STORAGE_DEGRADED, reason=trouble.reason, message=trouble.message)
                for trouble in await self._publisher.node_troubles()
            ]
        )

    @rpc
    async def NodeGetCapabilities(
        self, request: csi_pb2.NodeGetCapabilitiesRequest, context: grpc.aio.ServicerContext
    ) -> csi_pb2.NodeGetCapabilitiesResponse:
        capability = csi_pb2.NodeServiceCapability
        offered = (
            capability.RPC.GET_VOLUME_STATS,
            capability.RPC.GET_VOLUME_HEALTH,
            capability.RPC.GET_STORAGE_HEALTH,
        )
        return csi_pb2.NodeGetCapabilitiesResponse(
            capabilities=[capability(rpc=capability.RPC(type=kind)) for kind in offered]
        )

    @rpc
    async def NodeGetInfo(
        self, request: csi_pb2.NodeGetInfoRequest, context: grpc.aio.ServicerContext
    ) -> csi_pb2.NodeGetInfoResponse:
        return csi_pb2.NodeGetInfoResponse(node_id=self._node_id)


def parse_publish(request: csi_pb2.NodePublishVolumeRequest, policy: NodePolicy) -> PublishRequest:
    """Raises: InvalidVolumeError naming the field."""
    volume_id = required_id(request.volume_id, "volume_id")
    target_path = required_path(request.target_path, "target_path")
    if not request.HasField("volume_capability"):
        raise InvalidVolumeError("volume_capability is missing", field="volume_capability")
    check_capability(request.volume_capability)
    attributes = parse_attributes(request.volume_context)
    keyring, registry = keyring_of(request.secrets), attributes.reference.registry
    by_secret = candidates(keyring, attributes.reference)
    by_token = token_credentials(request.secrets, request.volume_context, attributes.reference, policy.token_logins)
    return PublishRequest(
        volume_id=volume_id,
        target_path=target_path,
        attributes=attributes,
        arguments=_fingerprint(request),
        credentials=united(by_secret, by_token),
        keyring=Keyring((*keyring.entries, *(("", token) for token in by_token))).named(registry),
        domain=_domain(request, policy.sharing),
        # Vouched for by kubelet only when nothing but its token opened the door.
        service_account=service_account_of(request.volume_context) if by_token and not by_secret else "",
        pod=pod_of(request.volume_context),
    )


def _domain(request: csi_pb2.NodePublishVolumeRequest, sharing: Sharing) -> str:
    """The pod's namespace is kubelet's word, not the pod author's: it overwrites these keys. Raises: InvalidVolumeError."""
    if sharing is Sharing.SHARED:
        return SHARED_DOMAIN
    return isolated_domain(request.volume_context.get(_POD_NAMESPACE, ""))


def _fingerprint(request: csi_pb2.NodePublishVolumeRequest) -> str:
    """Everything a repeat must repeat: not secrets, and not what Kubernetes itself adds (tokens rotate)."""
    own = {
        key: value
        for key, value in request.volume_context.items()
        if not key.startswith(("csi.storage.k8s.io/", "storage.kubernetes.io/"))
    }
    arguments = [own, request.readonly, *described(request.volume_capability)]
    return hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()
