"""A real `modelmount node --all-in-one` for tests, driven over its CSI socket."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import grpc

from csi import mountinfo
from csi.control.supervisor import SupervisorClient
from csi.keeper import syscalls
from csi.wire import csi_pb2, csi_pb2_grpc

COMMAND = [sys.executable, "-m", "csi.cli.main"]


class NodeProcess:
    """Use as a context manager. Everything lies below `directory`; leaving kills what is left and unmounts. `under`: a
    command that executes the one it is given.
    """

    def __init__(self, directory: Path, *flags: str, under: Sequence[str] = ()) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.socket_path = directory / "csi.sock"
        self.state_dir = directory / "state"
        self.data_dir = directory / "data"
        self.log_path = directory / "node.log"
        self._flags, self._under = flags, under
        self._pods = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: grpc.Channel | None = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:  # nobody else would stop what has started
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
        for entry in reversed(mountinfo.read()):
            if entry.mount_point.startswith(str(self.directory)):
                with contextlib.suppress(OSError):
                    syscalls.detach(entry.mount_point)

    def start(self) -> None:
        """Start, and wait until Probe says ready."""
        with open(self.log_path, "ab") as log:
            self._process = subprocess.Popen(
                [
                    *self._under,
                    *COMMAND,
                    "node",
                    "--all-in-one",
                    *("--endpoint", f"unix://{self.socket_path}", "--node-id", "test-node"),
                    *("--state-dir", str(self.state_dir), "--data-dir", str(self.data_dir)),
                    *(() if any("registration" in flag for flag in self._flags) else ("--no-registration",)),
                    # The machine may be nearly full; what a test wants of the floor it says.
                    *(() if any("min-free" in flag for flag in self._flags) else ("--cache-min-free=1",)),
                    *self._flags,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + 30
        while not self.socket_path.exists():
            assert self._process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)
        self._channel = grpc.insecure_channel(f"unix:{self.socket_path}")
        while not self.identity.Probe(csi_pb2.ProbeRequest(), timeout=10, wait_for_ready=True).ready.value:
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)

    def stop(self) -> None:
        """SIGTERM and wait; SIGKILL for a tree that hangs."""
        if self._channel is not None:
            self._channel.close()
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(40)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise AssertionError(f"the node did not stop: {self.log()}") from None
        self._process = None

    @property
    def pid(self) -> int:
        """Of the parent of the process tree."""
        assert self._process is not None
        return self._process.pid

    @property
    def identity(self) -> csi_pb2_grpc.IdentityStub:
        """The Identity service."""
        return csi_pb2_grpc.IdentityStub(self._channel)

    @property
    def node(self) -> csi_pb2_grpc.NodeStub:
        """The Node service."""
        return csi_pb2_grpc.NodeStub(self._channel)

    def target(self, name: str = "vol") -> Path:
        """A new target path whose parent exists, as kubelet makes it."""
        self._pods += 1
        pod = self.directory / "pods" / f"{self._pods}-{name}"
        pod.mkdir(parents=True)
        return pod / "mount"

    def publish(self, reference: str, target: Path, volume_id: str = "vol-1", **changes: Any) -> None:
        """NodePublishVolume as kubelet sends it. Raises: grpc.RpcError."""
        self.node.NodePublishVolume(publish_request(reference, target, volume_id, **changes), timeout=120)

    def unpublish(self, target: Path, volume_id: str = "vol-1") -> None:
        """NodeUnpublishVolume. Raises: grpc.RpcError."""
        request = csi_pb2.NodeUnpublishVolumeRequest(volume_id=volume_id, target_path=str(target))
        self.node.NodeUnpublishVolume(request, timeout=60)

    def status(self) -> list[dict[str, Any]]:
        """What `modelmount status --output json` shows."""
        return SupervisorClient(str(self.state_dir)).status()

    def unpublish_all(self) -> None:
        """Take back everything that is published."""
        for mount in self.status():
            for target in mount["targets"]:
                for volume_id in mount["volumes"]:
                    self.unpublish(Path(target), volume_id)

    def log(self) -> str:
        """The processes' log, its end."""
        return self.log_path.read_text(errors="replace")[-6000:]

    def log_lines(self) -> list[dict[str, Any]]:
        """The JSON lines of the log."""
        lines = []
        for line in self.log_path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
        return lines


def publish_request(
    reference: str,
    target: Path,
    volume_id: str = "vol-1",
    *,
    secrets: dict[str, str] | None = None,
    attributes: dict[str, str] | None = None,
    readonly: bool = True,
) -> csi_pb2.NodePublishVolumeRequest:
    """As kubelet sends it for an inline volume."""
    request = csi_pb2.NodePublishVolumeRequest(
        volume_id=volume_id,
        target_path=str(target),
        readonly=readonly,
        secrets=secrets or {},
        volume_context={
            "reference": reference,
            "csi.storage.k8s.io/ephemeral": "true",
            "csi.storage.k8s.io/pod.name": "pod",
            **(attributes or {}),
        },
    )
    request.volume_capability.mount.SetInParent()
    request.volume_capability.access_mode.mode = csi_pb2.VolumeCapability.AccessMode.SINGLE_NODE_WRITER
    return request


def mounts_below(directory: Path) -> list[str]:
    """Mount points below a directory, from mountinfo."""
    return [entry.mount_point for entry in mountinfo.read() if entry.mount_point.startswith(str(directory))]


def children_of(pid: int) -> set[int]:
    """All descendants of a process."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found: set[int] = set()
    frontier = {pid}
    while frontier:
        frontier = {child for child, parent in parents.items() if parent in frontier} - found
        found |= frontier
    return found


def process_of(tree: int, verb: str) -> int:
    """The process of an all-in-one tree that runs `modelmount <verb>`."""
    (pid,) = [
        pid
        for pid in children_of(tree)
        if f"\0{verb}\0".encode() in Path(f"/proc/{pid}/cmdline").read_bytes() and alive(pid)
    ]
    return pid


def alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def is_root() -> bool:
    """Whether FUSE tests can run."""
    return os.geteuid() == 0 and os.path.exists("/dev/fuse")
