"""A real one-node Kubernetes without a container engine: etcd, kube-apiserver, kube-controller-manager, kube-scheduler,
containerd, runc and kubelet as child processes.

Run it in a mount name space whose root is shared and a network name space of its own (`make e2e` does): what kubelet
and containers mount stays inside, and no port of it can be reached from elsewhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
import uuid
from pathlib import Path
from typing import Any

import requests
from e2e.api import KubernetesApi, is_ready
from e2e.images import PROVISIONER_IMAGE, READER_IMAGE, busybox_image, image_of

from csi import mountinfo
from csi.keeper import syscalls

NODE = "e2e-node"
ADDRESS = "10.97.0.1"
"""Of the node; pods reach it, and through it the registries of the suite."""
_API_SERVICE = (
    "10.96.0.1"  # where pods look for the API; no kube-proxy is needed when the server itself has the address
)
_POD_SUBNET = "10.98.0.0/24"
_TOKEN = "e2e-token"
_CNI_BIN = "/usr/lib/cni"
_SHIMS = "/run/containerd"  # containerd's shims put their sockets there wherever its own state lies
_FEATURE_GATES = {"CSIVolumeHealth": True}  # alpha: what the driver says of a volume lies in the pod's status then
_ETCD = "http://127.0.0.1:2379"


class LocalCluster(KubernetesApi):
    """Everything lies below `directory`. `start` waits until the node is Ready."""

    is_local = True
    reader_image = READER_IMAGE
    pull_policy = "Never"

    def __init__(self, directory: Path, binaries: Path) -> None:
        super().__init__(f"https://{_API_SERVICE}", directory / "kubeconfig.json", str(binaries / "kubectl"))
        self._session.verify = str(directory / "certs" / "apiserver.crt")
        self._session.headers["Authorization"] = f"Bearer {_TOKEN}"
        self.directory = directory
        self.kubelet_dir = directory / "kubelet"
        self._binaries = binaries
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._shims_were_there = os.path.exists(_SHIMS)

        self.boot_id = str(uuid.uuid4())

    def start(self) -> None:
        """Raises: AssertionError with the log of what did not come up."""
        self.directory.mkdir(parents=True)
        for command in (
            ["ip", "link", "set", "lo", "up"],
            *(["ip", "address", "replace", f"{address}/32", "dev", "lo"] for address in (ADDRESS, _API_SERVICE)),
        ):
            subprocess.run(command, check=True, capture_output=True)
        self._write_kubeconfig()
        self._start_etcd()
        self._start_apiserver()
        self._start_controllers()
        self.start_containerd()
        self.import_image(busybox_image(Path("/bin/busybox").read_bytes()))
        provisioner = (self._binaries / "csi-provisioner").read_bytes()
        self.import_image(
            image_of(PROVISIONER_IMAGE, "csi-provisioner", provisioner, {"Entrypoint": ["/bin/csi-provisioner"]})
        )
        self.start_kubelet()
        self.wait("the node to be Ready", self.node_is_ready, 120)

    def stop(self) -> None:
        """Containers first, then what runs them; then every mount below the directory."""
        self.stop_process("kubelet")
        with contextlib.suppress(Exception):
            self.kill_containers()
        for name in ("containerd", "kube-scheduler", "kube-controller-manager", "kube-apiserver", "etcd"):
            self.stop_process(name)
        self._kill_shims()
        self.unmount_everything()
        if not self._shims_were_there:
            shutil.rmtree(_SHIMS, ignore_errors=True)

    def stop_process(self, name: str, number: signal.Signals = signal.SIGTERM) -> None:
        """Stop one of them, by its pid."""
        process = self._processes.pop(name, None)
        if process is not None:
            process.send_signal(number)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def reboot(self) -> None:
        """What a node loses at a reboot: every container and process of it, every mount, everything on a tmpfs.

        Containers see another boot id from then on.
        """
        self.stop_process("kubelet", signal.SIGKILL)
        self.kill_containers(remove=False)
        self.stop_process("containerd", signal.SIGKILL)
        self._kill_shims()
        self.unmount_everything()
        shutil.rmtree(self.state_dir, ignore_errors=True)
        shutil.rmtree(self.directory / "containerd-state", ignore_errors=True)
        self.boot_id = str(uuid.uuid4())
        self.start_containerd()
        self.start_kubelet()

    def log(self, name: str) -> str:
        """The end of a process's log."""
        return (self.directory / f"{name}.log").read_text(errors="replace")[-3000:]

    def explain(self) -> str:
        return f"{super().explain()}\nkubelet's log:\n{self.log('kubelet')}"

    @property
    def state_dir(self) -> str:
        return str(self.directory / "run")

    @property
    def data_dir(self) -> Path:
        """The driver's data directory."""
        return self.directory / "data"

    def node_is_ready(self) -> bool:
        """Whether kubelet says so."""
        try:
            node = self.request("GET", f"/api/v1/nodes/{NODE}")
        except requests.RequestException:
            return False
        return is_ready(node)

    # --- containers ---------------------------------------------------------------------------------------------

    def import_image(self, archive: bytes | Path) -> None:
        """Into containerd, for pods."""
        if isinstance(archive, bytes):
            path = self.directory / "image.tar"
            path.write_bytes(archive)
            archive = path
        done = self._ctr("images", "import", str(archive))
        assert done.returncode == 0, done.stderr

    def container_pids(self, component: str) -> list[int]:
        """The host's pids of PID 1 of every running container of that name."""
        return [pid for identity, pid in self._tasks().items() if self._container_name(identity) == component]

    def kill_containers(self, *, remove: bool = True) -> None:
        """SIGKILL to PID 1 of every container; `remove` takes their records away as well."""
        for identity in self._tasks():
            self._ctr("tasks", "kill", "-s", "SIGKILL", identity)
        deadline = time.monotonic() + 10
        while self._tasks() and time.monotonic() < deadline:
            time.sleep(0.1)
        if remove:
            for identity in self._ctr("containers", "list", "-q").stdout.split():
                self._ctr("tasks", "delete", "-f", identity)
                self._ctr("containers", "delete", identity)

    def _kill_shims(self) -> None:
        """Those of our containerd: they outlive it, and after a reboot nothing would ask for them any more."""
        address = os.fsencode(self._containerd_socket)
        for directory in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                arguments = (directory / "cmdline").read_bytes().split(b"\0")
                if arguments[0].endswith(b"/containerd-shim-runc-v2") and address in arguments:
                    os.kill(int(directory.name), signal.SIGKILL)

    @property
    def _containerd_socket(self) -> str:
        return str(self.directory / "containerd.sock")

    def models_mounted(self) -> list[str]:
        """Where models are mounted on the node, as the host sees it."""
        below = f"{self.directory}/"
        return [e.mount_point for e in mountinfo.read() if e.mount_point.startswith(below) and e.source == "modelmount"]

    def unmount_everything(self) -> None:
        """Every mount below the directory."""
        for entry in reversed(mountinfo.read()):
            if entry.mount_point.startswith(str(self.directory)):
                with contextlib.suppress(OSError):
                    syscalls.detach(entry.mount_point)

    def _tasks(self) -> dict[str, int]:
        lines = [line.split() for line in self._ctr("tasks", "list").stdout.splitlines()[1:]]
        return {line[0]: int(line[1]) for line in lines if len(line) == 3 and line[2] == "RUNNING"}

    def _container_name(self, identity: str) -> str:
        described = json.loads(self._ctr("containers", "info", identity).stdout or "{}")
        return str(described.get("Labels", {}).get("io.kubernetes.container.name", ""))

    def _ctr(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(self._binaries / "ctr"), "-a", self._containerd_socket, "-n", "k8s.io", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    # --- the processes ------------------------------------------------------------------------------------------

    def start_kubelet(self) -> None:
        """Also after `stop_process("kubelet")`. The network name space is ours alone, so anybody may call it."""
        config = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
            "authorization": {"mode": "AlwaysAllow"},
            "cgroupDriver": "cgroupfs",
            "cgroupsPerQOS": False,
            "containerRuntimeEndpoint": f"unix://{self.directory}/containerd.sock",
            "enforceNodeAllocatable": [],
            "evictionHard": {"memory.available": "1Mi", "nodefs.available": "1Mi", "imagefs.available": "1Mi"},
            "failCgroupV1": False,
            "failSwapOn": False,
            "featureGates": _FEATURE_GATES,
            "healthzPort": 0,
            "localStorageCapacityIsolation": False,
            "makeIPTablesUtilChains": False,
            "podLogsDir": str(self.directory / "pod-logs"),
            "readOnlyPort": 0,
            "resolvConf": "",
            "volumeStatsAggPeriod": "15s",
        }
        path = self._write("kubelet.json", json.dumps(config))
        self._spawn(
            "kubelet",
            [
                f"--config={path}",
                f"--kubeconfig={self.kubeconfig}",
                f"--root-dir={self.kubelet_dir}",
                f"--cert-dir={self.directory}/kubelet-certs",
                f"--hostname-override={NODE}",
                f"--node-ip={ADDRESS}",
            ],
        )

    def _start_etcd(self) -> None:
        peer = "http://127.0.0.1:2380"
        self._spawn(
            "etcd",
            [
                f"--data-dir={self.directory}/etcd",
                *(f"--listen-client-urls={_ETCD}", f"--advertise-client-urls={_ETCD}"),
                *(f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}"),
                f"--initial-cluster=default={peer}",
                "--unsafe-no-fsync",
            ],
            binary=shutil.which("etcd"),
        )

    def _start_apiserver(self) -> None:
        key = self.directory / "service-account.key"
        subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
        tokens = self._write("tokens.csv", f'{_TOKEN},admin,admin,"system:masters"\n')
        self._spawn(
            "kube-apiserver",
            [
                f"--etcd-servers={_ETCD}",
                "--secure-port=443",
                f"--advertise-address={ADDRESS}",
                f"--cert-dir={self.directory}/certs",
                f"--token-auth-file={tokens}",
                "--authorization-mode=RBAC",
                "--feature-gates=" + ",".join(f"{name}={on}" for name, on in _FEATURE_GATES.items()),
                "--allow-privileged=true",
                "--kubelet-preferred-address-types=InternalIP",
                "--service-cluster-ip-range=10.96.0.0/16",
                "--service-account-issuer=https://kubernetes.default.svc",
                f"--service-account-key-file={key}",
                f"--service-account-signing-key-file={key}",
            ],
        )

        def answers() -> bool:
            try:
                self.request("GET", "/api/v1/namespaces/default")
            except (requests.RequestException, OSError):
                return False
            return True

        deadline = time.monotonic() + 90
        while not answers():
            assert time.monotonic() < deadline, self.log("kube-apiserver")
            time.sleep(0.2)

    def _start_controllers(self) -> None:
        self._spawn(
            "kube-controller-manager",
            [
                f"--kubeconfig={self.kubeconfig}",
                "--leader-elect=false",
                "--secure-port=0",
                f"--root-ca-file={self.directory}/certs/apiserver.crt",
                f"--service-account-private-key-file={self.directory}/service-account.key",
            ],
        )
        self._spawn("kube-scheduler", [f"--kubeconfig={self.kubeconfig}", "--leader-elect=false", "--secure-port=0"])

    def start_containerd(self) -> None:
        """Wait until it answers."""
        cni = self.directory / "cni"
        cni.mkdir(exist_ok=True)
        network = {
            "type": "ptp",
            "ipam": {
                "type": "host-local",
                "dataDir": str(self.directory / "cni-leases"),
                "ranges": [[{"subnet": _POD_SUBNET}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        }
        (cni / "10-pods.conflist").write_text(json.dumps({"cniVersion": "0.4.0", "name": "pods", "plugins": [network]}))
        base_spec = self._write_base_spec()
        config = self._write(
            "containerd.toml",
            f"""version = 3
root = "{self.directory}/containerd"
state = "{self.directory}/containerd-state"
[grpc]
address = "{self.directory}/containerd.sock"
[plugins.'io.containerd.cri.v1.images'.pinned_images]
sandbox = "{READER_IMAGE}"
[plugins.'io.containerd.cri.v1.runtime']
disable_apparmor = true
restrict_oom_score_adj = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
bin_dirs = ["{_CNI_BIN}"]
conf_dir = "{cni}"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
base_runtime_spec = "{base_spec}"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
BinaryName = "{self._binaries}/runc"
SystemdCgroup = false
""",
        )
        self._spawn("containerd", [f"--config={config}"])
        deadline = time.monotonic() + 30
        while self._ctr("version").returncode:
            assert time.monotonic() < deadline, self.log("containerd")
            time.sleep(0.3)

    def _write_base_spec(self) -> Path:
        """What every container begins with: containerd's own, and a hook that binds our boot id over the machine's."""
        (self.directory / "boot-id").unlink(missing_ok=True)  # containers of the boot before keep theirs
        self._write("boot-id", f"{self.boot_id}\n")
        hook = self._write(
            "bind-boot-id",
            f"""#!/bin/sh
# Called in the container's mount name space before its root becomes `/`; its state comes as JSON. A pod with a user name space
# of its own is none of the driver's, and may not mount.
grep -q '^ *0 *0 *4294967295$' /proc/self/uid_map || exit 0
bundle=$(sed -n 's/.*"bundle":"\\([^"]*\\)".*/\\1/p')
mount --bind {self.directory}/boot-id "$bundle/rootfs/proc/sys/kernel/random/boot_id"
""",
        )
        hook.chmod(0o755)
        shown = subprocess.run([self._binaries / "ctr", "oci", "spec"], check=True, capture_output=True, text=True)
        spec = json.loads(shown.stdout)
        del spec["process"]["rlimits"]  # not what Kubernetes gives, and a pod with a user name space may not set them
        spec |= {"hooks": {"createContainer": [{"path": str(hook)}]}}
        return self._write("base-spec.json", json.dumps(spec))

    def _spawn(self, name: str, arguments: list[str], binary: str | None = None) -> None:
        environment = dict(os.environ, PATH=f"{self._binaries}:{os.environ['PATH']}")
        with open(self.directory / f"{name}.log", "ab") as log:
            self._processes[name] = subprocess.Popen(
                [binary or str(self._binaries / name), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
            )

    def _write_kubeconfig(self) -> None:
        config: dict[str, Any] = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {
                    "name": "e2e",
                    "cluster": {
                        "server": f"https://{_API_SERVICE}",
                        "certificate-authority": str(self.directory / "certs" / "apiserver.crt"),
                    },
                }
            ],
            "users": [{"name": "admin", "user": {"token": _TOKEN}}],
            "contexts": [{"name": "e2e", "context": {"cluster": "e2e", "user": "admin"}}],
            "current-context": "e2e",
        }
        self._write("kubeconfig.json", json.dumps(config))

    def _write(self, name: str, content: str) -> Path:
        path = self.directory / name
        path.write_text(content, encoding="utf-8")
        return path
