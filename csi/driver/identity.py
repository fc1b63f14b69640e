"""The CSI Identity service. Answers from memory, before anything else is ready."""

from __future__ import annotations

from collections.abc import Callable

import grpc

from csi.driver.handlers import rpc
from csi.wire import csi_pb2, csi_pb2_grpc

DRIVER_NAME = "csi.modelmount.dev"


class IdentityService(csi_pb2_grpc.IdentityServicer):
    """`is_ready` must answer from memory. `with_controller`: the Controller service is at the same socket."""

    def __init__(self, version: str, is_ready: Callable[[], bool], *, with_controller: bool = False) -> None:
        self._version = version
        self._is_ready = is_ready
        self._with_controller = with_controller

    @rpc
    async def GetPluginInfo(
        self, request: csi_pb2.GetPluginInfoRequest, context: grpc.aio.ServicerContext
    ) -> csi_pb2.GetPluginInfoResponse:
        return csi_pb2.GetPluginInfoResponse(name=DRIVER_NAME, vendor_version=self._version)

    @rpc
    async def GetPluginCapabilities(
        self, request: csi_pb2.GetPluginCapabilitiesRequest, context: grpc.aio.ServicerContext
    ) -> csi_pb2.GetPluginCapabilitiesResponse:
        service = csi_pb2.PluginCapability.Service
        offered = [service.CONTROLLER_SERVICE] if self._with_controller else []
        return csi_pb2.GetPluginCapabilitiesResponse(
            capabilities=[csi_pb2.PluginCapability(service=service(type=kind)) for kind in offered]
        )

    @rpc
    async def Probe(self, request: csi_pb2.ProbeRequest, context: grpc.aio.ServicerContext) -> csi_pb2.ProbeResponse:
        reply = csi_pb2.ProbeResponse()
        reply.ready.value = self._is_ready()
        return reply
