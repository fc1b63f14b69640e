"""kubelet's plugin registration, served by the node itself: a socket in kubelet's plugins_registry directory.

kubelet sees the socket appear, asks GetInfo, calls NodeGetInfo at the endpoint named there, and says how it went. The
usual node-driver-registrar sidecar does the same; use one or the other.
"""

from __future__ import annotations

import contextlib
import logging
import os

import grpc

from csi.driver.sockets import DRIVER_NAME, clear_socket, registration_paths
from csi.wire import registration_pb2, registration_pb2_grpc

log = logging.getLogger(__name__)

_PLUGIN_TYPE = "CSIPlugin"
_SUPPORTED_VERSIONS = ["1.0.0"]  # of the interface between kubelet and CSI plugins; not the CSI version


class RegistrationService(registration_pb2_grpc.RegistrationServicer):
    """`endpoint` is the CSI socket as kubelet sees it, which need not be where we see it."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint

    async def GetInfo(
        self, request: registration_pb2.InfoRequest, context: grpc.aio.ServicerContext
    ) -> registration_pb2.PluginInfo:
        return registration_pb2.PluginInfo(
            type=_PLUGIN_TYPE, name=DRIVER_NAME, endpoint=self._endpoint, supported_versions=_SUPPORTED_VERSIONS
        )

    async def NotifyRegistrationStatus(
        self, request: registration_pb2.RegistrationStatus, context: grpc.aio.ServicerContext
    ) -> registration_pb2.RegistrationStatusResponse:
        if request.plugin_registered:
            log.info("kubelet has registered %s", DRIVER_NAME)
        else:
            log.error("kubelet refuses %s: %s", DRIVER_NAME, request.error)
        return registration_pb2.RegistrationStatusResponse()


class Registration:
    """The running service. `stop` removes the socket, which is how kubelet learns that the plugin is gone."""

    def __init__(self, directory: str, endpoint: str) -> None:
        self._path, self._hidden_path = registration_paths(directory)
        self._server = grpc.aio.server()
        registration_pb2_grpc.add_RegistrationServicer_to_server(RegistrationService(endpoint), self._server)

    async def start(self) -> None:
        """The socket appears under its name when it answers: kubelet calls at once, and passes over hidden files.

        Raises: ControlError when another process registers the same driver.
        """
        clear_socket(self._path)
        clear_socket(self._hidden_path)
        old_umask = os.umask(0o177)
        try:
            self._server.add_insecure_port(f"unix:{self._hidden_path}")
            await self._server.start()
        finally:
            os.umask(old_umask)
        os.rename(self._hidden_path, self._path)

    async def stop(self) -> None:
        """Remove the socket first: a successor may register at once."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        await self._server.stop(0.5)
