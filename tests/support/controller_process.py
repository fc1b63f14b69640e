"""A real `modelmount controller` for tests, driven over its CSI socket as external-provisioner drives it."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import grpc
from support.node_process import COMMAND

from csi.wire import csi_pb2, csi_pb2_grpc


class ControllerProcess:
    """Use as a context manager; `flags` say where volumes are kept."""

    def __init__(self, directory: Path, *flags: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.socket_path = directory / "controller.sock"
        self.log_path = directory / "controller.log"
        self._flags = flags
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: grpc.Channel | None = None

    def __enter__(self) -> ControllerProcess:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start, and wait until Probe answers."""
        command = [*COMMAND, "controller", f"--endpoint=unix://{self.socket_path}", *self._flags]
        with open(self.log_path, "ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + 30
        while not self.socket_path.exists():
            assert self._process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)
        self._channel = grpc.insecure_channel(f"unix:{self.socket_path}")
        assert self.identity.Probe(csi_pb2.ProbeRequest(), timeout=10, wait_for_ready=True).ready.value

    def stop(self) -> None:
        """SIGTERM and wait."""
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            assert self._process.wait(20) == 0, self.log()
            self._process = None

    @property
    def identity(self) -> csi_pb2_grpc.IdentityStub:
        """The Identity service."""
        return csi_pb2_grpc.IdentityStub(self._channel)

    @property
    def controller(self) -> csi_pb2_grpc.ControllerStub:
        """The Controller service."""
        return csi_pb2_grpc.ControllerStub(self._channel)

    def create(self, name: str, parameters: dict[str, str], **changes: Any) -> csi_pb2.Volume:
        """CreateVolume. Raises: grpc.RpcError."""
        reply: csi_pb2.CreateVolumeResponse = self.controller.CreateVolume(
            create_request(name, parameters, **changes), timeout=15
        )
        return reply.volume

    def delete(self, volume_id: str) -> None:
        """DeleteVolume. Raises: grpc.RpcError."""
        self.controller.DeleteVolume(csi_pb2.DeleteVolumeRequest(volume_id=volume_id), timeout=15)

    def log(self) -> str:
        """Its end."""
        return self.log_path.read_text(errors="replace")[-6000:]


def capability(mode: str = "MULTI_NODE_READER_ONLY") -> csi_pb2.VolumeCapability:
    """A mounted file system."""
    made = csi_pb2.VolumeCapability()
    made.mount.SetInParent()
    made.access_mode.mode = getattr(csi_pb2.VolumeCapability.AccessMode, mode)
    return made


def create_request(
    name: str,
    parameters: dict[str, str],
    *,
    claim: tuple[str, str] | None = None,
    required_bytes: int = 1 << 30,
    limit_bytes: int = 0,
    secrets: dict[str, str] | None = None,
) -> csi_pb2.CreateVolumeRequest:
    """As external-provisioner sends it; `claim` is (namespace, name), sent with `--extra-create-metadata`."""
    extra = {}
    if claim is not None:
        prefix = "csi.storage.k8s.io"
        extra = {f"{prefix}/pvc/namespace": claim[0], f"{prefix}/pvc/name": claim[1], f"{prefix}/pv/name": name}
    return csi_pb2.CreateVolumeRequest(
        name=name,
        capacity_range=csi_pb2.CapacityRange(required_bytes=required_bytes, limit_bytes=limit_bytes),
        volume_capabilities=[capability()],
        parameters={**parameters, **extra},
        secrets=secrets or {},
    )
