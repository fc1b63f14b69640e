"""kubelet as a CSI driver meets it: registration, the calls a pod's volumes cause, and what each answer makes it do.

It drives a real driver over its real sockets, keeps kubelet's own files (`vol_data.json`, the pods' directories), and
forgets everything else when it is restarted. Time is virtual: `advance` lets back-offs and periods pass, so no test waits
for them; operations that are due at once run at once, as kubelet's do.

What the real one would do harm with is noted in `harm`, which a test expects to be empty:

- a final error for a volume that is mounted (older kubelets take the live volume's directory away),
- a target directory that is still there after a final error or an unpublish that said OK.

Source: Kubernetes 1.37, pkg/volume/csi (csi_mounter.go, csi_client.go, csi_plugin.go), pkg/kubelet/pluginmanager,
pkg/kubelet/volumemanager/reconciler, pkg/volume/util/operationexecutor, pkg/volume/util/subpath.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import grpc

from csi import mountinfo
from csi.wire import csi_pb2, csi_pb2_grpc, registration_pb2, registration_pb2_grpc

TOKENS_KEY = "csi.storage.k8s.io/serviceAccount.tokens"
TRANSIENT = frozenset(
    {
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.ABORTED,
    }
)
_CALL_TIMEOUT_S = 120.0
_REGISTRATION_TIMEOUT_S = 10.0  # 1 s in the real one; no test fails on a time
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.5, 122.0
_SECOND_PUBLISH_S, _REPUBLISH_PERIOD_S = 1.0, 70.0
_MODES = {
    "ReadWriteOnce": csi_pb2.VolumeCapability.AccessMode.SINGLE_NODE_WRITER,
    "ReadWriteOncePod": csi_pb2.VolumeCapability.AccessMode.SINGLE_NODE_WRITER,
    "ReadOnlyMany": csi_pb2.VolumeCapability.AccessMode.MULTI_NODE_READER_ONLY,
    "ReadWriteMany": csi_pb2.VolumeCapability.AccessMode.MULTI_NODE_MULTI_WRITER,
}


@dataclass(frozen=True, kw_only=True)
class Inline:
    """`volumes[].csi` of a pod. `secret`: the name of a Secret in the pod's namespace."""

    name: str
    attributes: Mapping[str, str]
    read_only: bool = True
    secret: str | None = None


@dataclass(frozen=True, kw_only=True)
class Claimed:
    """`volumes[].persistentVolumeClaim`, with what the PersistentVolume says. kubelet uses the first access mode alone, and
    never passes on the PersistentVolume's own `csi.readOnly`. `secret`: namespace and name.
    """

    name: str
    persistent_volume: str
    handle: str
    attributes: Mapping[str, str]
    access_modes: Sequence[str] = ("ReadOnlyMany",)
    mount_options: Sequence[str] = ()
    fs_type: str = ""
    read_only: bool = False
    secret: tuple[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class Pod:
    """A pod bound to this node."""

    name: str
    volumes: Sequence[Inline | Claimed]
    namespace: str = "default"
    service_account: str = "default"
    uid: str = field(default_factory=lambda: str(uuid.uuid4()))


@dataclass(frozen=True, kw_only=True)
class CSIDriver:
    """The object of that kind, by default as the chart makes it."""

    pod_info_on_mount: bool = True
    requires_republish: bool = True
    token_requests: Sequence[str] = ()
    tokens_in_secrets: bool = False


CHART_DRIVER = CSIDriver()


@dataclass(frozen=True)
class Call:
    """A call as it was made. `code` OK or what came back."""

    rpc: str
    request: Any
    code: grpc.StatusCode
    details: str


class _State(Enum):
    MOUNTED = "mounted"
    UNCERTAIN = "uncertain"  # may be mounted: it will be unpublished some time


@dataclass
class _Mount:
    """What kubelet remembers of a volume of a pod, by its directory."""

    directory: Path
    state: _State | None = None
    publishes: int = 0
    wanted: bool = True
    due: float = 0.0
    delay_s: float = 0.0

    def want(self, wanted: bool) -> None:
        """Another operation than the last one does not wait for that one's back-off or period."""
        if wanted != self.wanted:
            self.wanted, self.delay_s, self.due = wanted, 0.0, 0.0

    def failed(self, now: float) -> None:
        self.delay_s = min(_LONGEST_DELAY_S, self.delay_s * 2 or _FIRST_DELAY_S)
        self.due = now + self.delay_s

    def done(self, due: float) -> None:
        self.delay_s, self.due = 0.0, due


@dataclass(frozen=True)
class _Plugin:
    """A registered driver: `born` tells a new socket of one name from the old one."""

    name: str
    endpoint: str
    born: tuple[int, int]


class FakeKubelet:
    """`root` is kubelet's directory. `pods` is the API's word: it survives a restart, as `secrets` (by namespace and name) do."""

    def __init__(self, root: Path, driver: CSIDriver = CHART_DRIVER, driver_name: str = "csi.modelmount.dev") -> None:
        self.root, self.driver, self.driver_name = root, driver, driver_name
        self.plugins_registry = root / "plugins_registry"
        self.pods: dict[str, Pod] = {}
        self.secrets: dict[tuple[str, str], dict[str, str]] = {}
        self.token: Callable[[Pod, str], str] = lambda pod, audience: f"token-of-{pod.service_account}-for-{audience}"
        self.now = 0.0
        self.calls: list[Call] = []
        self.events: list[tuple[str, str]] = []
        """Pod and message, as `kubectl describe pod` shows them."""
        self.harm: list[str] = []
        self.node_id: str | None = None
        self._plugins: dict[str, _Plugin] = {}
        self._mounts: dict[Path, _Mount] = {}
        self._lock = threading.Lock()
        for directory in (self.plugins_registry, root / "pods"):
            directory.mkdir(parents=True, exist_ok=True)

    # --- plugins

    def sync_plugins(self) -> None:
        """Look into `plugins_registry` and below: register what is new or was refused, forget what is gone. Hidden files and
        what is no socket are passed over.
        """
        found = {str(path): path for path in self.plugins_registry.rglob("[!.]*") if path.is_socket()}
        for path in [path for path in self._plugins if path not in found]:
            del self._plugins[path]
        for path, socket in sorted(found.items()):
            try:
                born = (socket.stat().st_ino, socket.stat().st_mtime_ns)
            except FileNotFoundError:
                continue
            known = self._plugins.get(path)
            if known is not None and known.born == born:
                continue
            self._plugins.pop(path, None)  # a new socket of that name: the old plugin is gone
            self._register(path, born)

    def _register(self, path: str, born: tuple[int, int]) -> None:
        with grpc.insecure_channel(f"unix:{path}", options=_options(path)) as channel:
            stub = registration_pb2_grpc.RegistrationStub(channel)
            try:
                info = stub.GetInfo(registration_pb2.InfoRequest(), timeout=_REGISTRATION_TIMEOUT_S)
            except grpc.RpcError as exc:
                self._note("GetInfo", None, exc)
                return
            self._note("GetInfo", info)
            error = self._validate(info) or self._install(path, info, born)
            status = registration_pb2.RegistrationStatus(plugin_registered=not error, error=error)
            try:
                stub.NotifyRegistrationStatus(status, timeout=_REGISTRATION_TIMEOUT_S)
            except grpc.RpcError as exc:
                self._note("NotifyRegistrationStatus", status, exc)
            else:
                self._note("NotifyRegistrationStatus", status)

    def _validate(self, info: registration_pb2.PluginInfo) -> str:
        if info.type != "CSIPlugin":
            return f"no handler registered for plugin type: {info.type}"
        if not any(version.lstrip("v").startswith(("0.", "1.")) for version in info.supported_versions):
            return f"none of the versions {list(info.supported_versions)} are supported"
        if any(plugin.name == info.name for plugin in self._plugins.values()):
            return "Another driver with the same name is already registered with a higher supported version"
        return ""

    def _install(self, path: str, info: registration_pb2.PluginInfo, born: tuple[int, int]) -> str:
        endpoint = info.endpoint or path
        try:
            answer = self._call(endpoint, "NodeGetInfo", csi_pb2.NodeGetInfoRequest())
        except grpc.RpcError as exc:
            return f"error calling CSI NodeGetInfo(): {exc.details()}"
        self.node_id = answer.node_id
        self._plugins[path] = _Plugin(info.name, endpoint, born)
        return ""

    @property
    def registered(self) -> bool:
        """Whether the driver is."""
        return any(plugin.name == self.driver_name for plugin in self._plugins.values())

    def wait_registered(self) -> None:
        """Look until the driver is registered."""
        deadline = time.monotonic() + 60
        while not self.registered:
            self.sync_plugins()
            assert time.monotonic() < deadline, self.calls[-5:]
            time.sleep(0.02)

    # --- pods

    def run(self, *pods: Pod) -> None:
        """The scheduler has bound them here."""
        self.pods |= {pod.uid: pod for pod in pods}
        self.sync()

    def delete(self, *pods: Pod) -> None:
        """The API says they are going; their containers have ended already."""
        for pod in pods:
            del self.pods[pod.uid]
        self.sync()

    def advance(self, seconds: float) -> None:
        """Let that much time pass, doing what becomes due, when it is due."""
        end = self.now + seconds
        while True:
            upcoming = [mount.due for mount in self._mounts.values() if self.now < mount.due <= end]
            self.now = min(upcoming, default=end)
            self.sync_plugins()
            self.sync()
            if not upcoming:
                return

    def sync(self) -> None:
        """Everything that is due now, each volume in a thread of its own."""
        wanted = {self._directory(pod, one): (pod, one) for pod in self.pods.values() for one in pod.volumes}
        for directory in wanted:
            self._mounts.setdefault(directory, _Mount(directory))
        for mount in self._mounts.values():
            mount.want(mount.directory in wanted)
        due = [mount for mount in self._mounts.values() if mount.due <= self.now and self._has_work(mount, wanted)]
        if due:
            with ThreadPoolExecutor(max_workers=len(due)) as threads:
                list(threads.map(lambda mount: self._operate(mount, wanted.get(mount.directory)), due))
        for directory, mount in list(self._mounts.items()):
            if directory not in wanted and mount.state is None:
                del self._mounts[directory]
        self._remove_pod_directories()

    def _has_work(self, mount: _Mount, wanted: Mapping[Path, object]) -> bool:
        if mount.directory not in wanted:
            return mount.state is not None
        return mount.state is not _State.MOUNTED or self.driver.requires_republish

    def _operate(self, mount: _Mount, wanted: tuple[Pod, Inline | Claimed] | None) -> None:
        if wanted is not None:
            self._publish(mount, *wanted)
        else:
            self._unpublish(mount)

    def restart(self) -> None:
        """kubelet's process is replaced: what it knows then is what lies on disk, and what the API says."""
        self._plugins.clear()
        self._mounts = {
            data.parent: _Mount(data.parent, _State.UNCERTAIN)
            for data in self.root.glob("pods/*/volumes/kubernetes.io~csi/*/vol_data.json")
        }

    def target(self, pod: Pod, volume: str) -> Path:
        """Where that volume of the pod is published."""
        (found,) = [one for one in pod.volumes if one.name == volume]
        return self._directory(pod, found) / "mount"

    def is_mounted(self, pod: Pod) -> bool:
        """Whether all its volumes are, as far as kubelet knows: its containers may start."""
        mounts = [self._mounts.get(self._directory(pod, one)) for one in pod.volumes]
        return all(mount is not None and mount.state is _State.MOUNTED for mount in mounts)

    def is_gone(self, pod: Pod) -> bool:
        """Whether nothing of it is left on the node."""
        return pod.uid not in self.pods and not (self.root / "pods" / pod.uid).exists()

    def events_of(self, pod: Pod) -> list[str]:
        """What `kubectl describe` shows its owner."""
        return [message for name, message in self.events if name == pod.name]

    def calls_of(self, rpc: str) -> list[Call]:
        """Those that were made, in order."""
        return [call for call in self.calls if call.rpc == rpc]

    def stats(self, pod: Pod, volume: str) -> csi_pb2.NodeGetVolumeStatsResponse:
        """As kubelet asks about once a minute. Raises: grpc.RpcError."""
        endpoint = self._endpoint()
        assert endpoint is not None
        self._call(endpoint, "NodeGetCapabilities", csi_pb2.NodeGetCapabilitiesRequest())
        target = self.target(pod, volume)
        volume_id = json.loads((target.parent / "vol_data.json").read_text())["volumeHandle"]
        request = csi_pb2.NodeGetVolumeStatsRequest(volume_id=volume_id, volume_path=str(target))
        answer: csi_pb2.NodeGetVolumeStatsResponse = self._call(endpoint, "NodeGetVolumeStats", request)
        return answer

    # --- one volume

    def _publish(self, mount: _Mount, pod: Pod, volume: Inline | Claimed) -> None:
        target = mount.directory / "mount"
        endpoint = self._endpoint()
        if endpoint is None:
            self._failed_publish(
                mount, pod, volume, f"driver name {self.driver_name} not found in the list of registered CSI drivers"
            )
            return
        try:
            request = self._publish_request(pod, volume, target)
        except LookupError as exc:
            self._failed_publish(mount, pod, volume, f"fetching NodePublishSecretRef failed: {exc}")
            return
        capabilities = 2 if isinstance(volume, Inline) else 3  # stage? volume mount group? single node writers?
        mount.directory.mkdir(parents=True, mode=0o750, exist_ok=True)
        existed = os.path.lexists(target)
        _store(
            mount.directory / "vol_data.json", _volume_data(request.volume_id, volume, self.driver_name, self.node_id)
        )
        try:
            for _ in range(capabilities):
                self._call(endpoint, "NodeGetCapabilities", csi_pb2.NodeGetCapabilitiesRequest())
            self._call(endpoint, "NodePublishVolume", request)
        except grpc.RpcError as exc:
            self._publish_error(mount, pod, volume, exc, existed)
            return
        mount.publishes += 1
        mount.state = _State.MOUNTED
        mount.done(self.now + (_SECOND_PUBLISH_S if mount.publishes == 1 else _REPUBLISH_PERIOD_S))

    def _publish_error(
        self, mount: _Mount, pod: Pod, volume: Inline | Claimed, exc: grpc.RpcError, existed: bool
    ) -> None:
        message = f"rpc error: code = {exc.code().name} desc = {exc.details()}"
        self._failed_publish(mount, pod, volume, message)
        if exc.code() in TRANSIENT:
            mount.state = mount.state or _State.UNCERTAIN
            return
        target = mount.directory / "mount"
        if mountinfo.at(mountinfo.read(), str(target)):
            self._harm(f"{target}: final {exc.code().name} for a volume that is mounted: {exc.details()}")
            return
        if not existed and os.path.lexists(target):
            self._harm(f"{target}: left behind by a publish that ended with {exc.code().name}")
        mount.state = None  # and NodeUnpublishVolume will never be called
        self._remove_volume_directory(mount.directory)

    def _failed_publish(self, mount: _Mount, pod: Pod, volume: Inline | Claimed, message: str) -> None:
        with self._lock:
            self.events.append((pod.name, f'MountVolume.SetUp failed for volume "{volume.name}" : {message}'))
        mount.failed(self.now)

    def _unpublish(self, mount: _Mount) -> None:
        endpoint = self._endpoint()
        data = json.loads((mount.directory / "vol_data.json").read_text(encoding="utf-8"))
        target = mount.directory / "mount"
        if endpoint is None:
            mount.failed(self.now)
            return
        request = csi_pb2.NodeUnpublishVolumeRequest(volume_id=data["volumeHandle"], target_path=str(target))
        try:
            self._clean_sub_paths(mount.directory)
            self._call(endpoint, "NodeUnpublishVolume", request)
        except grpc.RpcError:
            mount.failed(self.now)
            return
        if os.path.lexists(target):
            self._harm(f"{target}: still there after NodeUnpublishVolume said OK")
        try:
            self._remove_volume_directory(mount.directory)
        except OSError:
            mount.failed(self.now)
            return
        mount.state = None

    def _publish_request(self, pod: Pod, volume: Inline | Claimed, target: Path) -> csi_pb2.NodePublishVolumeRequest:
        """Raises: LookupError when the Secret does not exist."""
        context, secrets = dict(volume.attributes), self._secret(pod, volume)
        if self.driver.pod_info_on_mount:
            context |= {
                "csi.storage.k8s.io/pod.name": pod.name,
                "csi.storage.k8s.io/pod.namespace": pod.namespace,
                "csi.storage.k8s.io/pod.uid": pod.uid,
                "csi.storage.k8s.io/serviceAccount.name": pod.service_account,
                "csi.storage.k8s.io/ephemeral": "true" if isinstance(volume, Inline) else "false",
            }
        if self.driver.token_requests:
            tokens = json.dumps(
                {
                    audience: {"token": self.token(pod, audience), "expirationTimestamp": "2031-01-01T00:00:00Z"}
                    for audience in self.driver.token_requests
                }
            )
            (secrets if self.driver.tokens_in_secrets else context)[TOKENS_KEY] = tokens
        request = csi_pb2.NodePublishVolumeRequest(
            volume_id=volume_handle(pod, volume),
            target_path=str(target),
            readonly=volume.read_only,
            volume_context=context,
            secrets=secrets,
        )
        request.volume_capability.mount.SetInParent()
        mode = "ReadWriteOnce" if isinstance(volume, Inline) else volume.access_modes[0]
        request.volume_capability.access_mode.mode = _MODES[mode]
        if isinstance(volume, Claimed):
            request.volume_capability.mount.fs_type = volume.fs_type
            request.volume_capability.mount.mount_flags.extend(volume.mount_options)
        return request

    def _secret(self, pod: Pod, volume: Inline | Claimed) -> dict[str, str]:
        if volume.secret is None:
            return {}
        name = (pod.namespace, volume.secret) if isinstance(volume.secret, str) else volume.secret
        if name not in self.secrets:
            raise LookupError(f'secrets "{name[1]}" not found')
        return dict(self.secrets[name])

    # --- directories

    def _directory(self, pod: Pod, volume: Inline | Claimed) -> Path:
        name = volume.name if isinstance(volume, Inline) else volume.persistent_volume
        return self.root / "pods" / pod.uid / "volumes" / "kubernetes.io~csi" / name

    @staticmethod
    def _remove_volume_directory(directory: Path) -> None:
        """kubelet's removeMountDir: the target only when it is empty and no mount point; never anything recursively."""
        target = directory / "mount"
        if os.path.lexists(target):
            target.rmdir()
        (directory / "vol_data.json").unlink(missing_ok=True)
        directory.rmdir()

    def _remove_pod_directories(self) -> None:
        for pod_directory in (self.root / "pods").iterdir():
            volumes = pod_directory / "volumes" / "kubernetes.io~csi"
            if pod_directory.name in self.pods or (volumes.exists() and any(volumes.iterdir())):
                continue
            for directory in (volumes, volumes.parent, pod_directory / "volume-subpaths", pod_directory):
                if directory.exists():
                    directory.rmdir()

    # --- subPath

    def prepare_sub_path(self, pod: Pod, volume: str, sub_path: str, container: str, index: int) -> Path:
        """Bind a part of a volume for a container, following no link, and asking the file system what kubelet asks.

        Raises: OSError, CalledProcessError.
        """
        target = self.target(pod, volume)
        fd = os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            for part in Path(sub_path).parts:
                below = os.open(part, os.O_PATH | os.O_NOFOLLOW, dir_fd=fd)
                os.close(fd)
                fd = below
            is_directory = os.path.isdir(f"/proc/self/fd/{fd}")
            place = self.root / "pods" / pod.uid / "volume-subpaths" / target.parent.name / container / str(index)
            place.parent.mkdir(parents=True, exist_ok=True)
            if is_directory:
                place.mkdir()
            else:
                place.touch()
            os.statvfs(f"/proc/self/fd/{fd}")  # the flags a bind's remount keeps
            subprocess.run(
                ["mount", "--no-canonicalize", "--bind", f"/proc/self/fd/{fd}", place], pass_fds=[fd], check=True
            )
        finally:
            os.close(fd)
        return place

    def _clean_sub_paths(self, directory: Path) -> None:
        base = directory.parents[2] / "volume-subpaths" / directory.name
        for place in sorted(base.glob("*/*")):
            subprocess.run(["umount", place], check=True)
            if place.is_dir():
                place.rmdir()
            else:
                place.unlink()
        for made in (*base.glob("*"), base):
            if made.exists():
                made.rmdir()

    # --- calls

    def _endpoint(self) -> str | None:
        return next((one.endpoint for one in self._plugins.values() if one.name == self.driver_name), None)

    def _call(self, endpoint: str, rpc: str, request: Any) -> Any:
        """A connection per call, as kubelet makes them. Raises: grpc.RpcError."""
        with grpc.insecure_channel(f"unix:{endpoint}", options=_options(endpoint)) as channel:
            try:
                answer = getattr(csi_pb2_grpc.NodeStub(channel), rpc)(request, timeout=_CALL_TIMEOUT_S)
            except grpc.RpcError as exc:
                self._note(rpc, request, exc)
                raise
        self._note(rpc, request)
        return answer

    def _note(self, rpc: str, request: Any, error: grpc.RpcError | None = None) -> None:
        code, details = (error.code(), error.details()) if error is not None else (grpc.StatusCode.OK, "")
        with self._lock:
            self.calls.append(Call(rpc, request, code, details))

    def _harm(self, text: str) -> None:
        with self._lock:
            self.harm.append(text)


def volume_handle(pod: Pod, volume: Inline | Claimed) -> str:
    """The volume's id in CSI calls."""
    if isinstance(volume, Claimed):
        return volume.handle
    return "csi-" + hashlib.sha256(f"{pod.namespace}{pod.name}{pod.uid}{volume.name}".encode()).hexdigest()


def _volume_data(volume_id: str, volume: Inline | Claimed, driver: str, node_id: str | None) -> dict[str, str]:
    inline = isinstance(volume, Inline)
    return {
        "driverName": driver,
        "nodeName": node_id or "",
        "specVolID": volume.name if inline else volume.persistent_volume,  # type: ignore[union-attr]
        "volumeHandle": volume_id,
        "volumeLifecycleMode": "Ephemeral" if inline else "Persistent",
    }


def _store(path: Path, data: Mapping[str, str]) -> None:
    path.write_text(json.dumps(data), encoding="utf-8")


def _options(path: str) -> Iterable[tuple[str, Any]]:
    """As a Go client calls: the socket's path, percent-encoded, is the authority. Nothing is shared between connections."""
    return [
        ("grpc.default_authority", urllib.parse.quote(path, safe="")),
        ("grpc.use_local_subchannel_pool", 1),
    ]
