"""A real OCI registry as a child process on loopback: Debian's docker-registry, unpacked, not installed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

_CONFIG = """version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {storage}}}, delete: {{enabled: true}}}}
http: {{addr: "{address}"}}
{auth}"""
USERNAME, PASSWORD = "demo", "correct horse"
# bcrypt of PASSWORD, cost 5
_HTPASSWD = "demo:$2b$05$abcdefghijklmnopqrstuuHNbAKRhpaujgo33bRWs.NLUTJO3lOy2\n"
_START_TIMEOUT_S = 20.0


class RegistryUnavailableHereError(Exception):
    """No registry binary on this machine, and none could be fetched. The message says what to do."""


def find_or_install_registry(tools_dir: Path) -> Path:
    """The docker-registry binary: MODELMOUNT_REGISTRY, the PATH, or Debian's package unpacked below `tools_dir`."""
    unpacked = tools_dir / "docker-registry" / "usr" / "bin" / "docker-registry"
    for candidate in (os.environ.get("MODELMOUNT_REGISTRY"), shutil.which("docker-registry"), str(unpacked)):
        if candidate and os.access(candidate, os.X_OK):
            return Path(candidate)
    if not shutil.which("apt-get") or not shutil.which("dpkg"):
        raise RegistryUnavailableHereError(
            "docker-registry is not installed and this is not Debian or Ubuntu; install it, or name it in MODELMOUNT_REGISTRY"
        )
    with tempfile.TemporaryDirectory(dir=_made(tools_dir)) as scratch:
        command = ["apt-get", "download", "docker-registry"]
        fetched = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
        if fetched.returncode and os.geteuid() == 0:  # a new machine knows no packages yet
            subprocess.run(["apt-get", "update", "-qq"], capture_output=True)
            fetched = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
        packages = list(Path(scratch).glob("docker-registry_*.deb"))
        if fetched.returncode or not packages:
            raise RegistryUnavailableHereError(
                f"apt-get download docker-registry failed: {fetched.stderr.strip()[-200:]}; run 'apt-get update' first"
            )
        subprocess.run(["dpkg", "-x", str(packages[0]), f"{scratch}/unpacked"], check=True)
        shutil.rmtree(tools_dir / "docker-registry", ignore_errors=True)
        os.rename(f"{scratch}/unpacked", tools_dir / "docker-registry")  # all of it, or nothing
    return unpacked


class RegistryProcess:
    """One registry with storage of its own below `directory`. `stop` ends it by its pid; the storage stays."""

    def __init__(self, binary: Path, directory: Path, *, htpasswd: bool = False) -> None:
        self._binary = binary
        self._directory = _made(directory)
        self._htpasswd = htpasswd
        self._process: subprocess.Popen[bytes] | None = None
        self.host = ""

    def start(self, host: str | None = None) -> None:
        """Listen on a free port (or on `host`, a former one), and wait until it answers."""
        self.host = host or f"127.0.0.1:{_free_port()}"
        auth = ""
        if self._htpasswd:
            passwords = self._directory / "htpasswd"
            passwords.write_text(_HTPASSWD, encoding="ascii")
            auth = f"auth: {{htpasswd: {{realm: demo, path: {passwords}}}}}\n"
        config = self._directory / "config.yml"
        config.write_text(
            _CONFIG.format(storage=self._directory / "storage", address=self.host, auth=auth), encoding="utf-8"
        )
        with open(self._directory / "log", "ab") as log:
            self._process = subprocess.Popen(
                [self._binary, "serve", config], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        address, port = self.host.split(":")
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                socket.create_connection((address, int(port)), 1.0).close()
                return
            except OSError as exc:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    said = (self._directory / "log").read_text(encoding="utf-8", errors="replace")[-500:]
                    self.stop()
                    raise RegistryUnavailableHereError(f"docker-registry did not start: {said}") from exc
                time.sleep(0.05)

    def stop(self) -> None:
        """Idempotent."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(10)
            self._process = None

    @property
    def storage(self) -> Path:
        """Where its blobs lie."""
        return self._directory / "storage"


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
