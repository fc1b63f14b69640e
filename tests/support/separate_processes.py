"""Keeper, supervisors and node as processes of their own, as in a cluster, where nobody starts them again at once."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.node_process import COMMAND, NodeProcess

from csi.control.keeper import KeeperClient
from csi.control.supervisor import SupervisorClient
from csi.errors import ControlError
from csi.wire import csi_pb2

TIMEOUT_S = 60.0


class SeparateProcesses(NodeProcess):
    """`supervisors` holds every supervisor started, the newest last."""

    def start(self) -> None:
        """Start all three, and wait until Probe says ready."""
        self.supervisors: list[subprocess.Popen[bytes]] = []
        self._others: list[subprocess.Popen[bytes]] = []
        self._common = ["--state-dir", str(self.state_dir)]
        try:
            self.start_keeper()
            self.start_supervisor()
            endpoint = ["--endpoint", f"unix://{self.socket_path}", "--node-id", "test-node", "--no-registration"]
            self._others.append(
                self._spawn("node", *self._common, *endpoint, "--data-dir", str(self.data_dir), "--no-events")
            )
            deadline = time.monotonic() + TIMEOUT_S
            while not self.socket_path.exists():
                assert time.monotonic() < deadline, self.log()
                time.sleep(0.02)
            self._channel = grpc.insecure_channel(f"unix:{self.socket_path}")
            while not self.identity.Probe(csi_pb2.ProbeRequest(), timeout=10, wait_for_ready=True).ready.value:
                assert time.monotonic() < deadline, self.log()
                time.sleep(0.02)
        except BaseException:
            self.stop()
            raise

    def start_keeper(self) -> subprocess.Popen[bytes]:
        """Another keeper, and wait until it answers."""
        keeper = self._spawn("keeper", *self._common)
        self._others.append(keeper)
        self._wait_for(KeeperClient(str(self.state_dir)).ping)
        return keeper

    def start_supervisor(self, *flags: str) -> subprocess.Popen[bytes]:
        """Another supervisor; returned when it says that it is ready."""
        process = self.start_supervisor_unready(*flags)
        ready = self.ready_file(process)
        deadline = time.monotonic() + TIMEOUT_S
        while not ready.exists():
            assert process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)
        return process

    def start_supervisor_unready(self, *flags: str) -> subprocess.Popen[bytes]:
        """Another supervisor."""
        number = len(self.supervisors)
        ready = self.directory / f"ready-{number}"
        data = ["--data-dir", str(self.data_dir), "--ready-file", str(ready)]
        data.append("--cache-min-free=1")  # how full the machine's disk is must not decide a test
        process = self._spawn("supervisor", *self._common, *data, *self._flags, *flags)
        self.supervisors.append(process)
        return process

    def ready_file(self, process: subprocess.Popen[bytes]) -> Path:
        """Exists when that supervisor needs nothing of the one before it."""
        return self.directory / f"ready-{self.supervisors.index(process)}"

    def stop(self) -> None:
        """SIGTERM to every process that runs, the keeper last; what it does not end goes with the mounts."""
        if self._channel is not None:
            with contextlib.suppress(grpc.RpcError, ControlError):
                self.unpublish_all()
            self._channel.close()
            self._channel = None
        for process in (*reversed(self.supervisors), *reversed(self._others)):
            process.poll()
            if process.returncode is None:
                process.terminate()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    raise AssertionError(f"process {process.pid} did not stop: {self.log()}") from None

    def supervisor_pid(self) -> int:
        """Of the one that answers."""
        return SupervisorClient(str(self.state_dir)).ping()

    def _spawn(self, verb: str, *arguments: str) -> subprocess.Popen[bytes]:
        with open(self.log_path, "ab") as log:
            return subprocess.Popen(
                [*COMMAND, verb, *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _wait_for(self, ask: Callable[[], object]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            try:
                ask()
                return
            except ControlError:
                assert time.monotonic() < deadline, self.log()
                time.sleep(0.02)


def mount_of(node: NodeProcess) -> dict[str, Any]:
    """The one mount's status, as soon as a supervisor answers."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        with contextlib.suppress(ControlError):
            (mount,) = node.status()
            return mount
        assert time.monotonic() < deadline, node.log()
        time.sleep(0.02)


def wait_for(node: NodeProcess, what: str, condition: Callable[[], bool]) -> None:
    """Until `condition` holds; the test fails with the node's log when it never does."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, f"{what}: {node.log()}"
        time.sleep(0.02)


def skip_without_resend(node: NodeProcess) -> None:
    """Where a mount that pyfuse3 serves loses what a dead worker had taken."""
    mount = KeeperClient(str(node.state_dir)).mounts()[0]
    if mount.backend == "pyfuse3" and not mount.can_resend:
        pytest.skip("this kernel has no FUSE_NOTIFY_RESEND (Linux 6.9), and pyfuse3 serves the mount")
