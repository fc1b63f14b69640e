"""Containers as the chart's DaemonSets describe them, run by runc.

Users, groups, capabilities, propagation, volumes and memory limits are read from the rendered manifests, so what
runs here is what a cluster runs. Instead of an image a container has the machine's /usr and /etc, the virtual
environment and the checkout, all read-only. Pid, mount, ipc, uts and cgroup name spaces are its own.

Not here: RuntimeDefault's seccomp profile (the end-to-end suite has it), and pods' networks.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from csi import mountinfo
from csi.keeper import syscalls
from csi.quantity import parse_size

ROOT = Path(__file__).resolve().parents[2]
MANIFESTS = ROOT / "deploy" / "manifests" / "modelmount.yaml"
TINI = "/usr/bin/tini"
_BUILT_RUNC = ROOT / ".tools" / "k8s" / "runc"
RUNC = str(_BUILT_RUNC) if _BUILT_RUNC.exists() else shutil.which("runc")
_CGROUP = f"/modelmount-survival-{os.getpid()}"
_START_TIMEOUT_S = 20.0
_PROPAGATION = {None: "rprivate", "None": "rprivate", "HostToContainer": "rslave", "Bidirectional": "rshared"}
# fmt: off
_CAPABILITY_NAMES = (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
    "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
    "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
    "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
    "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF",
    "CHECKPOINT_RESTORE",
)
# fmt: on


@dataclass(frozen=True, kw_only=True, slots=True)
class Volume:
    """A directory (or file) of the node in a container. `idmap`: shown with that first host id as its root."""

    source: Path
    path: str
    propagation: str = "rprivate"
    read_only: bool = False
    idmap: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """One container. `capabilities` None: privileged, with every capability, device and a writable /sys."""

    arguments: Sequence[str]
    volumes: Sequence[Volume] = ()
    capabilities: Sequence[str] | None = ()
    groups: Sequence[int] = ()
    empty_dirs: Sequence[str] = ()
    memory_bytes: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    user_namespace: int | None = None
    """The host id of its root; None: the host's user name space."""


def daemon_set(component: str, host_paths: Mapping[str, Path], checkout: Path = ROOT) -> Spec:
    """The container of a DaemonSet of the chart; `host_paths` says where its hostPath volumes really lie here."""
    with open(MANIFESTS, encoding="utf-8") as file:
        found = [
            one
            for one in yaml.safe_load_all(file)
            if one and one["kind"] == "DaemonSet" and one["metadata"]["name"] == f"modelmount-{component}"
        ]
    pod = found[0]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    context = container["securityContext"]
    for where, name in ((context, "runAsUser"), (pod.get("securityContext", {}), "runAsUser")):
        assert where.get(name, 0) == 0, "other users are not made here"
    assert context["readOnlyRootFilesystem"]
    own = {volume["name"] for volume in pod["volumes"] if "emptyDir" in volume}
    paths = {
        volume["name"]: host_paths[volume["hostPath"]["path"]] for volume in pod["volumes"] if "hostPath" in volume
    }
    limits = container["resources"]["limits"]
    return Spec(
        arguments=[argument.replace("$(NODE_NAME)", "survival-node") for argument in container["args"]],
        volumes=[
            *(
                Volume(
                    source=paths[mount["name"]],
                    path=mount["mountPath"],
                    propagation=_PROPAGATION[mount.get("mountPropagation")],
                    read_only=mount.get("readOnly", False),
                )
                for mount in container["volumeMounts"]
                if mount["name"] not in own
            ),
            *([Volume(source=checkout / "csi", path=str(ROOT / "csi"), read_only=True)] if checkout != ROOT else []),
        ],
        capabilities=None if context.get("privileged") else context["capabilities"].get("add", []),
        groups=pod.get("securityContext", {}).get("supplementalGroups", []),
        memory_bytes=parse_size(limits["memory"]),
        empty_dirs=[mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] in own],
    )


class Container:
    """A running container. `pid` is its init's (tini's), as the suite sees it."""

    def __init__(self, name: str, spec: Spec, directory: Path) -> None:
        self.name = name
        self.arguments = spec.arguments
        self._directory = directory
        self._identity = f"{directory.name}-{name}"
        self.log_path = directory / f"{name}.log"
        bundle = directory / "bundles" / name
        for path in (bundle / "rootfs" / "etc", bundle / "rootfs" / "usr"):
            path.mkdir(parents=True, exist_ok=True)
        for link in ("bin", "sbin", "lib", "lib64"):
            if os.path.islink(f"/{link}") and not (bundle / "rootfs" / link).is_symlink():
                (bundle / "rootfs" / link).symlink_to(f"usr/{link}")
        if spec.user_namespace is not None:  # its root makes the mount points
            for path in (bundle / "rootfs", bundle / "rootfs" / "etc", bundle / "rootfs" / "usr"):
                os.chown(path, spec.user_namespace, spec.user_namespace)
        (bundle / "config.json").write_text(json.dumps(_configuration(spec, self._identity)))
        self._bundle = bundle
        self._process: subprocess.Popen[bytes] | None = None
        self.pid = 0

    def start(self) -> None:
        """Raises: AssertionError with its log when it does not come up."""
        pid_file = self._bundle / "pid"
        pid_file.unlink(missing_ok=True)
        with open(self.log_path, "ab") as log:
            self._process = subprocess.Popen(
                [*self._runc, "run", "--bundle", str(self._bundle), "--pid-file", str(pid_file), self._identity],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not (pid_file.exists() and pid_file.read_text().strip()):
            assert self._process.poll() is None, f"{self.name} did not start: {self.log()}"
            assert time.monotonic() < deadline, f"{self.name} did not start: {self.log()}"
            time.sleep(0.005)
        self.pid = int(pid_file.read_text())

    @property
    def running(self) -> bool:
        """Whether its init has not ended."""
        return self._process is not None and self._process.poll() is None

    def processes(self) -> dict[int, list[str]]:
        """Command lines by pid, of everything in it that is no zombie."""
        found = {}
        for pid in self._pids():
            with contextlib.suppress(OSError):
                if command := Path(f"/proc/{pid}/cmdline").read_bytes():
                    found[pid] = command.decode(errors="replace").split("\0")
        return found

    def pids_of(self, verb: str) -> list[int]:
        """The processes in it that run `modelmount <verb>` (not tini, which carries the same words)."""
        return [
            pid
            for pid, command in self.processes().items()
            if verb in command[:5] and command[0] != TINI and "csi.cli.main" in command
        ]

    def kill(self) -> None:
        """SIGKILL to its init: the kernel ends everything in it. Returns when all of it is gone."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        self.wait(30)

    def stop(self, grace_s: float) -> None:
        """As kubelet does: SIGTERM, then SIGKILL."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)
        try:
            self.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.kill()

    def wait(self, timeout_s: float) -> int:
        """Its exit status. Raises: subprocess.TimeoutExpired."""
        assert self._process is not None
        status = self._process.wait(timeout_s)
        # A runc that was too late to see the end of an init leaves its record.
        subprocess.run([*self._runc, "delete", "--force", self._identity], capture_output=True)
        return status

    def has_file(self, path: str) -> bool:
        """Whether that path is there inside."""
        return os.path.exists(f"/proc/{self.pid}/root{path}")

    def limit(self, *, cpus: float | None = None, memory_bytes: int | None = None) -> None:
        """Change its cgroup's limits while it runs. `cpus` 0: no limit."""
        wanted: list[str] = []
        if cpus is not None:
            wanted += ["--cpu-period", "100000", "--cpu-quota", str(int(cpus * 100_000) or -1)]
        if memory_bytes is not None:
            wanted += ["--memory", str(memory_bytes)]
        subprocess.run([*self._runc, "update", *wanted, self._identity], check=True, capture_output=True)

    def log(self) -> str:
        """The end of what it wrote."""
        return self.log_path.read_text(errors="replace")[-4000:]

    @property
    def _runc(self) -> list[str]:
        assert RUNC is not None
        return [RUNC, "--root", str(self._directory / "runc")]

    def _pids(self) -> list[int]:
        """By name space, not by cgroup: it is the same on every cgroup layout."""
        try:
            inside = os.readlink(f"/proc/{self.pid}/ns/pid")
        except OSError:
            return []
        found = []
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/{entry}/ns/pid") == inside:
                        found.append(int(entry))
        return found


def make_bundles(directory: Path) -> None:
    """Where containers of that directory have their roots: a mount of its own, as an image's root is.

    runc makes the mount private that a root lies on; were it the volumes' too, nothing of them would be shared any more.
    """
    bundles = directory / "bundles"
    bundles.mkdir()
    subprocess.run(["mount", "--bind", str(bundles), str(bundles)], check=True)


def unmount_below(directory: Path) -> list[str]:
    """Detach every mount below a directory; returns where there were any."""
    found = [entry.mount_point for entry in mountinfo.read() if entry.mount_point.startswith(f"{directory}/")]
    for mount_point in reversed(found):
        with contextlib.suppress(OSError):
            syscalls.detach(mount_point)
    return found


def _configuration(spec: Spec, identity: str) -> dict[str, Any]:
    """The bundle's config.json. Source: opencontainers/runtime-spec, config.md and config-linux.md."""
    privileged = spec.capabilities is None
    names = _all_capabilities() if spec.capabilities is None else spec.capabilities
    capabilities = [f"CAP_{name}" for name in names]
    sets = ("bounding", "effective", "permitted")
    shared = any(volume.propagation == "rshared" for volume in spec.volumes)
    slave = any(volume.propagation == "rslave" for volume in spec.volumes)
    resources: dict[str, Any] = {"devices": [{"allow": privileged, "access": "rwm"}]}
    if spec.memory_bytes is not None:
        resources["memory"] = {"limit": spec.memory_bytes}
    linux: dict[str, Any] = {
        "namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts", "cgroup")],
        "cgroupsPath": f"{_CGROUP}/{identity}",
        "resources": resources,
        "rootfsPropagation": "rshared" if shared else "rslave" if slave else "rprivate",
    }
    if privileged:
        linux["devices"] = [{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o666}]
    else:
        linux["maskedPaths"] = ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"]
        linux["readonlyPaths"] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
    if spec.user_namespace is not None:
        linux["namespaces"].append({"type": "user"})
        linux["uidMappings"] = linux["gidMappings"] = _mapping(spec.user_namespace)
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0, "additionalGids": list(spec.groups)},
            "args": [TINI, "--", *spec.arguments],
            "env": [
                "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                "PYTHONDONTWRITEBYTECODE=1",
                *(f"{name}={value}" for name, value in spec.environment.items()),
            ],
            "cwd": "/",
            "capabilities": dict.fromkeys(sets, capabilities),
            "noNewPrivileges": not privileged,
        },
        "root": {"path": "rootfs", "readonly": True},
        "hostname": "survival",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            _tmpfs("/dev", "nosuid", "strictatime", "mode=755", "size=65536k"),
            _tmpfs("/dev/shm", "nosuid", "noexec", "nodev", "mode=1777", "size=65536k"),
            {
                "destination": "/sys",
                "type": "sysfs",
                "source": "sysfs",
                "options": ["nosuid", "noexec", "nodev", *([] if privileged else ["ro"])],
            }
            if spec.user_namespace is None
            else _bind(Volume(source=Path("/sys"), path="/sys", read_only=True)),
            *(_bind(Volume(source=Path(path), path=path, read_only=True)) for path in _image()),
            *(_bind(volume) for volume in spec.volumes),
            *(_tmpfs(path, "nosuid", "nodev", "mode=777") for path in spec.empty_dirs),
        ],
        "linux": linux,
    }


def modelmount(spec: Spec, *more: str) -> Spec:
    """The same container, its arguments being those of `modelmount`, with `more` after them."""
    return replace(spec, arguments=[sys.executable, "-m", "csi.cli.main", *spec.arguments, *more])


def _all_capabilities() -> list[str]:
    """Those the suite has itself: more it cannot give."""
    status = Path("/proc/self/status").read_text()
    held = int(next(line.split()[1] for line in status.splitlines() if line.startswith("CapBnd:")), 16)
    return [name for number, name in enumerate(_CAPABILITY_NAMES) if held >> number & 1]


def _image() -> list[str]:
    """What stands for the image: the system, the interpreter, its packages, the checkout."""
    paths = ["/usr", "/etc", sys.prefix, str(ROOT / "csi"), str(ROOT / "tests" / "survival")]
    paths += [f"/{name}" for name in ("bin", "sbin", "lib", "lib64") if not os.path.islink(f"/{name}")]
    if not sys.base_prefix.startswith("/usr"):
        paths.append(sys.base_prefix)
    return [path for path in paths if os.path.exists(path)]


def _bind(volume: Volume) -> dict[str, Any]:
    mount: dict[str, Any] = {
        "destination": volume.path,
        "type": "bind",
        "source": str(volume.source),
        "options": ["rbind", volume.propagation, "ro" if volume.read_only else "rw"],
    }
    if volume.idmap is not None:
        mount["options"] = ["bind", volume.propagation, "idmap", "ro" if volume.read_only else "rw"]
        mount["uidMappings"] = mount["gidMappings"] = _mapping(volume.idmap)
    return mount


def _mapping(first: int) -> list[dict[str, int]]:
    return [{"containerID": 0, "hostID": first, "size": 65536}]


def _tmpfs(path: str, *options: str) -> dict[str, Any]:
    return {"destination": path, "type": "tmpfs", "source": "tmpfs", "options": list(options)}
