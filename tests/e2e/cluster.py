"""A real one-node Kubernetes without a container engine: etcd, kube-apiserver, kube-controller-manager, containerd, runc
and kubelet as child processes. Pods are bound by nodeName, so there is no scheduler.

Run it in a mount name space of its own whose root is shared (`make e2e` does): what kubelet and containers mount then
stays inside.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests

from csi import mountinfo
from csi.keeper import syscalls

NODE = "e2e-node"
IMAGE = "localhost/e2e/busybox:1"
_TOKEN = "e2e-token"
_CNI_BIN = "/usr/lib/cni"
_SHIMS = "/run/containerd"  # containerd's shims put their sockets there wherever its own state lies


class Cluster:
    """Everything lies below `directory`. `start` waits until the node is Ready."""

    def __init__(self, directory: Path, binaries: Path) -> None:
        self.directory = directory
        self.kubelet_dir = directory / "kubelet"
        self._binaries = binaries
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._etcd_port, self._peer_port, self._api_port, self._kubelet_port = (_free_port() for _ in range(4))
        self._shims_were_there = os.path.exists(_SHIMS)
        self._session = requests.Session()
        self._session.trust_env = False

    def start(self) -> None:
        """Raises: AssertionError with the log of what did not come up."""
        self.directory.mkdir(parents=True)
        self._start_etcd()
        self._start_apiserver()
        self._start_controller_manager()
        self._start_containerd()
        self.start_kubelet()
        self.wait("the node to be Ready", self._node_is_ready, 120)

    def stop(self) -> None:
        """Containers first, then what runs them; then every mount below the directory."""
        with contextlib.suppress(Exception):
            self._remove_containers()
        for name in ("kubelet", "containerd", "kube-controller-manager", "kube-apiserver", "etcd"):
            self.stop_process(name)
        for entry in reversed(mountinfo.read()):
            if entry.mount_point.startswith(str(self.directory)):
                with contextlib.suppress(OSError):
                    syscalls.detach(entry.mount_point)
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

    def log(self, name: str) -> str:
        """The end of a process's log."""
        return (self.directory / f"{name}.log").read_text(errors="replace")[-4000:]

    # --- the API ------------------------------------------------------------------------------------------------

    def request(self, method: str, path: str, body: Any = None) -> Any:
        """One call of the Kubernetes API. Raises: requests.HTTPError."""
        response = self._session.request(
            method,
            f"https://127.0.0.1:{self._api_port}{path}",
            json=body,
            headers={"Authorization": f"Bearer {_TOKEN}"},
            verify=str(self.directory / "certs" / "apiserver.crt"),
            timeout=30,
        )
        if response.status_code >= 400:
            raise requests.HTTPError(
                f"{method} {path}: {response.status_code} {response.text[:500]}", response=response
            )
        return response.json()

    def pod(self, name: str) -> dict[str, Any]:
        """A pod of the default name space."""
        return dict(self.request("GET", f"/api/v1/namespaces/default/pods/{name}"))

    def run_pod(
        self, name: str, command: str, volumes: list[dict[str, Any]], mounts: list[dict[str, Any]], **spec: Any
    ) -> None:
        """Create a pod of one busybox container that runs a shell command."""
        self.request(
            "POST",
            "/api/v1/namespaces/default/pods",
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": name},
                "spec": {
                    "nodeName": NODE,
                    "hostNetwork": True,
                    "restartPolicy": "Never",
                    "automountServiceAccountToken": False,
                    "terminationGracePeriodSeconds": 1,
                    "volumes": volumes,
                    "containers": [
                        {
                            "name": "reader",
                            "image": IMAGE,
                            "imagePullPolicy": "Never",
                            "command": ["/bin/sh", "-c", command],
                            "volumeMounts": mounts,
                        }
                    ],
                    **spec,
                },
            },
        )

    def result(self, name: str, timeout_s: float = 90) -> tuple[int, str]:
        """Exit status and termination message of a pod's container, once it has ended."""
        state: dict[str, Any] = {}

        def ended() -> bool:
            statuses = self.pod(name).get("status", {}).get("containerStatuses") or [{}]
            state.update(statuses[0].get("state", {}).get("terminated") or {})
            return bool(state)

        self.wait(f"pod {name} to end", ended, timeout_s)
        return int(state["exitCode"]), str(state.get("message", "")).strip()

    def is_running(self, name: str) -> bool:
        """Whether the pod's container runs."""
        statuses = self.pod(name).get("status", {}).get("containerStatuses") or [{}]
        return "running" in statuses[0].get("state", {})

    def delete_pod(self, name: str, timeout_s: float = 60) -> float:
        """Delete and wait until it is gone. Returns the seconds."""
        started = time.monotonic()
        with contextlib.suppress(requests.HTTPError):  # gone already
            self.request("DELETE", f"/api/v1/namespaces/default/pods/{name}")
        self.wait_gone(name, timeout_s)
        return time.monotonic() - started

    def wait_gone(self, name: str, timeout_s: float) -> None:
        """Wait until a pod that is being deleted is gone."""

        def gone() -> bool:
            try:
                self.pod(name)
            except requests.HTTPError as exc:
                return exc.response is not None and exc.response.status_code == 404
            return False

        self.wait(f"pod {name} to be gone", gone, timeout_s)

    def events(self, name: str) -> list[str]:
        """Reason and message of a pod's events."""
        path = f"/api/v1/namespaces/default/events?fieldSelector=involvedObject.name={name}"
        return [f"{event['reason']}: {event['message']}" for event in self.request("GET", path)["items"]]

    def wait(self, what: str, condition: Callable[[], bool], timeout_s: float) -> None:
        """Poll until it holds. Raises: AssertionError with kubelet's log."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}\n{self.log('kubelet')}"
            time.sleep(0.1)

    # --- the processes ------------------------------------------------------------------------------------------

    def start_kubelet(self) -> None:
        """Also after `stop_process("kubelet")`."""
        config = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "authentication": {"anonymous": {"enabled": False}, "webhook": {"enabled": False}},
            "authorization": {"mode": "AlwaysAllow"},
            "cgroupDriver": "cgroupfs",
            "cgroupsPerQOS": False,
            "containerRuntimeEndpoint": f"unix://{self.directory}/containerd.sock",
            "enforceNodeAllocatable": [],
            "evictionHard": {"memory.available": "1Mi", "nodefs.available": "1Mi", "imagefs.available": "1Mi"},
            "failCgroupV1": False,
            "failSwapOn": False,
            "healthzPort": 0,
            "localStorageCapacityIsolation": False,
            "makeIPTablesUtilChains": False,
            "podLogsDir": str(self.directory / "pod-logs"),
            "port": self._kubelet_port,
            "readOnlyPort": 0,
            "resolvConf": "",
            "volumeStatsAggPeriod": "15s",
        }
        path = self._write("kubelet.json", json.dumps(config))
        self._spawn(
            "kubelet",
            [
                f"--config={path}",
                f"--kubeconfig={self._kubeconfig()}",
                f"--root-dir={self.kubelet_dir}",
                f"--cert-dir={self.directory}/kubelet-certs",
                f"--hostname-override={NODE}",
                "--node-ip=127.0.0.1",
            ],
        )

    def _start_etcd(self) -> None:
        client, peer = f"http://127.0.0.1:{self._etcd_port}", f"http://127.0.0.1:{self._peer_port}"
        self._spawn(
            "etcd",
            [
                f"--data-dir={self.directory}/etcd",
                *(f"--listen-client-urls={client}", f"--advertise-client-urls={client}"),
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
                f"--etcd-servers=http://127.0.0.1:{self._etcd_port}",
                f"--secure-port={self._api_port}",
                "--bind-address=127.0.0.1",
                f"--cert-dir={self.directory}/certs",
                f"--token-auth-file={tokens}",
                "--authorization-mode=AlwaysAllow",
                "--allow-privileged=true",
                "--service-cluster-ip-range=10.96.0.0/16",
                "--service-account-issuer=https://kubernetes.default.svc",
                f"--service-account-key-file={key}",
                f"--service-account-signing-key-file={key}",
                "--disable-admission-plugins=ServiceAccount",
            ],
        )

        def answers() -> bool:
            try:
                self.request("GET", "/api/v1/namespaces/default")
            except (requests.RequestException, OSError):
                return False
            return True

        deadline = time.monotonic() + 60
        while not answers():
            assert time.monotonic() < deadline, self.log("kube-apiserver")
            time.sleep(0.2)

    def _start_controller_manager(self) -> None:
        self._spawn(
            "kube-controller-manager",
            [
                f"--kubeconfig={self._kubeconfig()}",
                "--leader-elect=false",
                "--secure-port=0",
                f"--service-account-private-key-file={self.directory}/service-account.key",
            ],
        )

    def _start_containerd(self) -> None:
        cni = self.directory / "cni"
        cni.mkdir()
        (cni / "10-loopback.conflist").write_text(
            json.dumps({"cniVersion": "0.4.0", "name": "loopback", "plugins": [{"type": "loopback"}]})
        )
        address = self.directory / "containerd.sock"
        config = self._write(
            "containerd.toml",
            f"""version = 3
root = "{self.directory}/containerd"
state = "{self.directory}/containerd-state"
[grpc]
address = "{address}"
[plugins.'io.containerd.cri.v1.images'.pinned_images]
sandbox = "{IMAGE}"
[plugins.'io.containerd.cri.v1.runtime']
disable_apparmor = true
restrict_oom_score_adj = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
bin_dirs = ["{_CNI_BIN}"]
conf_dir = "{cni}"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
BinaryName = "{self._binaries}/runc"
SystemdCgroup = false
""",
        )
        self._spawn("containerd", [f"--config={config}"])
        archive = self.directory / "busybox.tar"
        archive.write_bytes(busybox_image(Path("/bin/busybox").read_bytes()))
        deadline = time.monotonic() + 30
        while self._ctr("images", "import", str(archive)).returncode:
            assert time.monotonic() < deadline, self.log("containerd")
            time.sleep(0.3)

    def _remove_containers(self) -> None:
        for line in self._ctr("tasks", "list", "-q").stdout.split():
            self._ctr("tasks", "kill", "-s", "SIGKILL", line)
        time.sleep(0.5)
        for line in self._ctr("containers", "list", "-q").stdout.split():
            self._ctr("tasks", "delete", "-f", line)
            self._ctr("containers", "delete", line)

    def _ctr(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        address = str(self.directory / "containerd.sock")
        command = [str(self._binaries / "ctr"), "-a", address, "-n", "k8s.io", *arguments]
        return subprocess.run(command, capture_output=True, text=True)

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

    def _kubeconfig(self) -> Path:
        server = f"https://127.0.0.1:{self._api_port}"
        certificate = str(self.directory / "certs" / "apiserver.crt")
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "e2e", "cluster": {"server": server, "certificate-authority": certificate}}],
            "users": [{"name": "admin", "user": {"token": _TOKEN}}],
            "contexts": [{"name": "e2e", "context": {"cluster": "e2e", "user": "admin"}}],
            "current-context": "e2e",
        }
        return self._write("kubeconfig.json", json.dumps(config))

    def _write(self, name: str, content: str) -> Path:
        path = self.directory / name
        path.write_text(content, encoding="utf-8")
        return path

    def _node_is_ready(self) -> bool:
        try:
            node = self.request("GET", f"/api/v1/nodes/{NODE}")
        except requests.HTTPError:
            return False
        conditions = node.get("status", {}).get("conditions", [])
        return any(entry["type"] == "Ready" and entry["status"] == "True" for entry in conditions)


def busybox_image(binary: bytes) -> bytes:
    """An OCI image archive of one static busybox; its default command sleeps, so it serves as the sandbox image too."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for directory in ("bin", "tmp", "models", "etc"):
            entry = tarfile.TarInfo(directory)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        entry = tarfile.TarInfo("bin/busybox")
        entry.mode, entry.size = 0o755, len(binary)
        tar.addfile(entry, io.BytesIO(binary))
        for applet in ("sh", "cat", "sha256sum", "sleep", "ls", "cut", "stat", "test", "dd", "touch"):
            entry = tarfile.TarInfo(f"bin/{applet}")
            entry.type, entry.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(entry)
    blobs: dict[str, bytes] = {}

    def add(content: bytes, media_type: str) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        blobs[digest] = content
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(content)}

    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Cmd": ["/bin/sleep", "2147483647"], "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(layer.getvalue()).hexdigest()]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": add(json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json"),
        "layers": [add(layer.getvalue(), "application/vnd.oci.image.layer.v1.tar")],
    }
    descriptor = add(json.dumps(manifest).encode(), "application/vnd.oci.image.manifest.v1+json")
    descriptor["annotations"] = {"io.containerd.image.name": IMAGE, "org.opencontainers.image.ref.name": "1"}
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        files = {
            "oci-layout": b'{"imageLayoutVersion":"1.0.0"}',
            "index.json": json.dumps({"schemaVersion": 2, "manifests": [descriptor]}).encode(),
            **{f"blobs/sha256/{digest}": content for digest, content in blobs.items()},
        }
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return archive.getvalue()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
