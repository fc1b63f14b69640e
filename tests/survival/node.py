"""A node of a cluster: keeper, supervisor and node in a container each, and what kubelet does for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
from support.node_process import publish_request
from survival.containers import ROOT, Container, daemon_set, make_bundles, modelmount, unmount_below

from csi import mountinfo
from csi.control.keeper import KeeperClient
from csi.control.supervisor import SupervisorClient
from csi.errors import ControlError
from csi.wire import csi_pb2, csi_pb2_grpc

COMPONENTS = ("keeper", "supervisor", "node")
STATE_DIR, KUBELET_DIR, DATA_DIR = "/run/modelmount", "/var/lib/kubelet", "/var/lib/modelmount"
_PLUGIN_DIR = f"{KUBELET_DIR}/plugins/csi.modelmount.dev"
_UP_TIMEOUT_S = 40.0


class ContainerNode:
    """Use as a context manager. By component: `flags` are further arguments, `checkouts` what it runs instead of this one.

    Paths in calls are those inside the containers, below /var/lib/kubelet; `target.host` says where it is here.
    """

    def __init__(
        self,
        directory: Path,
        flags: Mapping[str, Sequence[str]] | None = None,
        checkouts: Mapping[str, Path] | None = None,
    ) -> None:
        self.directory = directory
        self.kubelet_dir, self.state_dir = directory / "kubelet", directory / "run"
        self.data_dir = directory / "data"
        for path in (self.state_dir, self.data_dir, self.kubelet_dir / "pods", self.kubelet_dir / "plugins_registry"):
            path.mkdir(parents=True)
        (self.kubelet_dir / "plugins" / "csi.modelmount.dev").mkdir(parents=True)
        self._flags, self._checkouts = flags or {}, checkouts or {}
        self._containers: dict[str, Container] = {}
        self._generation = 0
        self._published: dict[str, dict[str, Any]] = {}
        self.keeper, self.supervisor = KeeperClient(str(self.state_dir)), SupervisorClient(str(self.state_dir))

    def __enter__(self) -> ContainerNode:
        make_bundles(self.directory)
        try:
            for component in COMPONENTS:
                self.start(component)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for component in reversed(COMPONENTS):
            if component in self._containers:
                self._containers[component].kill()
        unmount_below(self.directory)

    def start(self, component: str, *, checkout: Path | None = None) -> Container:
        """A new container of that component, up when it answers; the one before it is forgotten, not stopped."""
        container = self.start_beside(component, checkout=checkout)
        self.wait_until(f"the {component} to answer", lambda: self.answers(component))
        return container

    def start_beside(self, component: str, *, checkout: Path | None = None) -> Container:
        """The same without waiting for its answer: while the one before it still runs, it may be that one's."""
        self._generation += 1
        host_paths = {
            STATE_DIR: self.state_dir,
            DATA_DIR: self.data_dir,
            f"{KUBELET_DIR}/pods": self.kubelet_dir / "pods",
            _PLUGIN_DIR: self.kubelet_dir / "plugins" / "csi.modelmount.dev",
            f"{KUBELET_DIR}/plugins_registry": self.kubelet_dir / "plugins_registry",
        }
        spec = modelmount(
            daemon_set(component, host_paths, checkout or self._checkouts.get(component, ROOT)),
            *self._flags.get(component, ()),
        )
        container = Container(f"{component}-{self._generation}", spec, self.directory)
        container.start()
        self._containers[component] = container
        return container

    def container(self, component: str) -> Container:
        """The newest of that component."""
        return self._containers[component]

    def use(self, component: str, container: Container) -> None:
        """That one is the newest again: the one after it was taken back."""
        self._containers[component] = container

    def kill(self, component: str) -> None:
        """SIGKILL to everything in its container."""
        self._containers[component].kill()

    def restart(self, component: str) -> None:
        """SIGKILL, and what kubelet does then."""
        self.kill(component)
        self.start(component)

    def answers(self, component: str) -> bool:
        """Whether its socket is served."""
        try:
            if component == "keeper":
                self.keeper.ping()
            elif component == "supervisor":
                self.supervisor.ping()
            else:
                with self._channel() as channel:
                    identity = csi_pb2_grpc.IdentityStub(channel)
                    return bool(identity.Probe(csi_pb2.ProbeRequest(), timeout=2).ready.value)
        except (ControlError, grpc.RpcError):
            return False
        return True

    def process(self, role: str, target: str | None = None) -> int:
        """The pid here of the worker or fetcher that serves a mount (the only one, or that of a target), or of the store.

        What the supervisor says is a pid of its container's name space.
        """
        container = self._containers["supervisor"]
        pids = container.pids_of(role)
        if role == "store":
            return pids[0]
        mounts = self.supervisor.status(target)
        inside = mounts[0][f"{role}_pid"]
        for pid in pids:
            if _inner_pid(pid) == inside:
                return pid
        raise ProcessLookupError(f"no {role} with pid {inside} in {container.name}")

    # --- what kubelet asks ----------------------------------------------------------------------------------------

    def target(self, name: str) -> tuple[str, Path]:
        """A new target path: as the containers see it, and here."""
        relative = f"pods/{name}/volumes/kubernetes.io~csi/model"
        (self.kubelet_dir / relative).mkdir(parents=True)
        return f"{KUBELET_DIR}/{relative}/mount", self.kubelet_dir / relative / "mount"

    def publish(self, reference: str, target: str, volume_id: str, **changes: Any) -> None:
        """NodePublishVolume; repeated by `republish`. Raises: grpc.RpcError."""
        self._published[target] = {"reference": reference, "volume_id": volume_id, **changes}
        self._publish(target)

    def unpublish(self, target: str) -> None:
        """NodeUnpublishVolume. Raises: grpc.RpcError."""
        volume_id = self._published.pop(target)["volume_id"]
        with self._channel() as channel:
            request = csi_pb2.NodeUnpublishVolumeRequest(volume_id=volume_id, target_path=target)
            csi_pb2_grpc.NodeStub(channel).NodeUnpublishVolume(request, timeout=60)

    def republish(self) -> None:
        """What kubelet does once a minute, and goes on with until it succeeds: every volume again."""

        def all_again() -> bool:
            try:
                for target in list(self._published):
                    self._publish(target)
            except grpc.RpcError as exc:
                if exc.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED):
                    return False
                raise
            return True

        self.wait_until("every volume to be published again", all_again)

    def stats(self, target: str) -> csi_pb2.NodeGetVolumeStatsResponse:
        """NodeGetVolumeStats."""
        with self._channel() as channel:
            request = csi_pb2.NodeGetVolumeStatsRequest(
                volume_id=self._published[target]["volume_id"], volume_path=target
            )
            answer: csi_pb2.NodeGetVolumeStatsResponse = csi_pb2_grpc.NodeStub(channel).NodeGetVolumeStats(
                request, timeout=10
            )
            return answer

    def status(self, target: str) -> dict[str, Any]:
        """What `modelmount status` shows of the mount at that target."""
        (mount,) = self.supervisor.status(target)
        return mount

    def mounted(self) -> list[str]:
        """Where models are mounted, as the host sees it."""
        entries = mountinfo.read()
        below = f"{self.directory}/"
        return [one.mount_point for one in entries if one.mount_point.startswith(below) and one.source == "modelmount"]

    def wait_until(self, what: str, is_so: Callable[[], object], timeout_s: float = _UP_TIMEOUT_S) -> None:
        """Raises: AssertionError with every component's log."""
        deadline = time.monotonic() + timeout_s
        while not is_so():
            assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}\n{self.logs()}"
            time.sleep(0.02)

    def logs(self) -> str:
        """The end of every component's log."""
        return "\n".join(f"--- {one.name}\n{one.log()}" for one in self._containers.values())

    def _publish(self, target: str) -> None:
        arguments = dict(self._published[target])
        request = publish_request(arguments.pop("reference"), Path(target), arguments.pop("volume_id"), **arguments)
        with self._channel() as channel:
            csi_pb2_grpc.NodeStub(channel).NodePublishVolume(request, timeout=120)

    def _channel(self) -> grpc.Channel:
        """A new one for each call: one that has seen its server die waits before it tries again."""
        return grpc.insecure_channel(f"unix:{self.kubelet_dir}/plugins/csi.modelmount.dev/csi.sock")


def _inner_pid(pid: int) -> int:
    """The pid that a process has in its own name space. Source: proc_pid_status(5), NSpid."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return -1
    return next(int(line.split()[-1]) for line in status.splitlines() if line.startswith("NSpid:"))
