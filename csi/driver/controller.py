"""The CSI Controller service: parse, call the provisioner, map the result.

Source: CSI 1.13 spec, "Controller Service RPC".
"""

from __future__ import annotations

import grpc

from csi.driver.capabilities import check_capability, described
from csi.driver.credentials import keyring_of
from csi.driver.handlers import ToTheEnd, required_id, rpc
from csi.driver.provisioner import CreateRequest, Provisioner
from csi.errors import InvalidVolumeError
from csi.wire import csi_pb2, csi_pb2_grpc

_CAPABILITIES = (csi_pb2.ControllerServiceCapability.RPC.CREATE_DELETE_VOLUME,)


class ControllerService(csi_pb2_grpc.ControllerServicer):
    """Publish, snapshot, expand and list RPCs are not offered: the generated base class answers UNIMPLEMENTED."""

    def __init__(self, provisioner: Provisioner) -> None:
        self._provisioner = provisioner
        self._work = ToTheEnd()

    @rpc
    async def CreateVolume(
        self, request: csi_pb2.CreateVolumeRequest, context: grpc.aio.ServicerContext
    ) -> csi_pb2.CreateVolumeResponse:
        volume = await self._work.run(self._provisioner.create(parse_create(request)))
        return csi_pb2.CreateVolumeResponse(
            volume=csi_pb2.Volume(
                volume_id=volume.volume_id,
                capacity_bytes=volume.capacity_bytes,
                volume_context=volume.volume_context,
            )
        )

    @rpc
    async def DeleteVolume(
        self, request: csi_pb2.DeleteVolumeRequest, context: grpc.aio.ServicerContext
    ) -> csi_pb2.DeleteVolumeResponse:
        await self._work.run(self._provisioner.delete(required_id(request.volume_id, "volume_id")))
        return csi_pb2.DeleteVolumeResponse()

    @rpc
    async def ValidateVolumeCapabilities(
        self, request: csi_pb2.ValidateVolumeCapabilitiesRequest, context: grpc.aio.ServicerContext
    ) -> csi_pb2.ValidateVolumeCapabilitiesResponse:
        volume_id = required_id(request.volume_id, "volume_id")
        if not request.volume_capabilities:
            raise InvalidVolumeError("volume_capabilities are missing", field="volume_capabilities")
        volume = await self._provisioner.find(volume_id)
        try:
            for position, capability in enumerate(request.volume_capabilities):
                check_capability(capability, f"volume_capabilities[{position}]")
            if request.volume_context and dict(request.volume_context) != dict(volume.volume_context):
                raise InvalidVolumeError(f"volume {volume_id} has another volume_context", field="volume_context")
            if request.mutable_parameters:
                raise InvalidVolumeError("a model has no mutable parameters", field="mutable_parameters")
        except InvalidVolumeError as exc:
            return csi_pb2.ValidateVolumeCapabilitiesResponse(message=str(exc))
        confirmed = csi_pb2.ValidateVolumeCapabilitiesResponse.Confirmed(
            volume_context=request.volume_context,
            volume_capabilities=request.volume_capabilities,
            parameters=request.parameters,
        )
        return csi_pb2.ValidateVolumeCapabilitiesResponse(confirmed=confirmed)

    @rpc
    async def ControllerGetCapabilities(
        self, request: csi_pb2.ControllerGetCapabilitiesRequest, context: grpc.aio.ServicerContext
    ) -> csi_pb2.ControllerGetCapabilitiesResponse:
        capability = csi_pb2.ControllerServiceCapability
        return csi_pb2.ControllerGetCapabilitiesResponse(
            capabilities=[capability(rpc=capability.RPC(type=kind)) for kind in _CAPABILITIES]
        )


def parse_create(request: csi_pb2.CreateVolumeRequest) -> CreateRequest:
    """Raises: InvalidVolumeError naming the field."""
    if not request.name:
        raise InvalidVolumeError("name is missing", field="name")
    if not request.volume_capabilities:
        raise InvalidVolumeError("volume_capabilities are missing", field="volume_capabilities")
    for position, capability in enumerate(request.volume_capabilities):
        check_capability(capability, f"volume_capabilities[{position}]")
    if request.HasField("volume_content_source"):
        raise InvalidVolumeError(
            "volume_content_source: a model is not made from a snapshot or another volume; remove the claim's dataSource",
            field="volume_content_source",
        )
    if request.mutable_parameters:
        raise InvalidVolumeError(
            f"mutable_parameters: unknown key {sorted(request.mutable_parameters)[0][:80]!r}; a model has none (remove the "
            "claim's volumeAttributesClassName)",
            field="mutable_parameters",
        )
    capacity = request.capacity_range
    if capacity.required_bytes < 0 or capacity.limit_bytes < 0:
        raise InvalidVolumeError("capacity_range: sizes cannot be negative", field="capacity_range")
    if capacity.limit_bytes and capacity.required_bytes > capacity.limit_bytes:
        raise InvalidVolumeError("capacity_range: required_bytes is above limit_bytes", field="capacity_range")
    return CreateRequest(
        name=request.name,
        parameters=dict(request.parameters),
        capabilities=[described(capability) for capability in request.volume_capabilities],
        required_bytes=capacity.required_bytes,
        limit_bytes=capacity.limit_bytes,
        keyring=keyring_of(request.secrets),
    )
