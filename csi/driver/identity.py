"""The CSI Identity service. Answers from memory, before anything else is ready."""

from __future__ import annotations

from collections.abc import Callable

import grpc

from csi.driver.handlers import rpc
from csi.driver.sockets import DRIVER_NAME
from csi.errors import DependencyMissingError, ModelMountError
from csi.wire import csi_pb2, csi_pb2_grpc


class IdentityService(csi_pb2_grpc.IdentityServicer):
    """`is_ready` and `problem` must answer from memory. `problem`: what this process cannot work without, where it is
    missing. `with_controller`: the Controller service is at the same socket.
    """

    def __init__(
        self,
        version: str,
        is_ready: Callable[[], bool],
        problem: Callable[[], ModelMountError | None] = lambda: None,
        *,
        with_controller: bool = False,
    ) -> None:
        self._version = version
        self._is_ready = is_ready
        self._problem = problem
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
        problem = self._problem()
        if problem is not None:
            raise DependencyMissingError(f"this node cannot mount: {problem}")
        reply = csi_pb2.ProbeResponse()
        reply.ready.value = self._is_ready()
        return reply
