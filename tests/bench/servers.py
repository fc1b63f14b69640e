"""What stands between a registry and its readers: nginx (plain and TLS), a link of limited speed, a proxy that is late."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from registry_process import RegistryProcess
from support.registry_servers import Server, free_port, nginx

# Blobs as files, as registries do that redirect to an object store; everything else is the registry's own.
_NGINX = """daemon off; user root; worker_processes 2; pid {directory}/pid; error_log {directory}/error.log;
events {{}}
http {{
  access_log off; client_body_temp_path {directory}; proxy_temp_path {directory}; fastcgi_temp_path {directory};
  uwsgi_temp_path {directory}; scgi_temp_path {directory};
  sendfile on; tcp_nopush on; default_type application/octet-stream; keepalive_requests 100000;
  server {{
    listen 127.0.0.1:{port}; listen 127.0.0.1:{tls_port} ssl;
    ssl_certificate {certificate}; ssl_certificate_key {certificate}; ssl_protocols TLSv1.3;
    location ~ "^/v2/.*/blobs/sha256:(..)([0-9a-f]+)$" {{
      alias {storage}/docker/registry/v2/blobs/sha256/$1/$1$2/data;
    }}
    location /files/ {{ alias {files}/; autoindex on; }}
    location / {{ proxy_pass http://{upstream}; proxy_set_header Host $http_host; }}
  }}
}}
"""


class Front:
    """nginx before a registry. `host` speaks plain HTTP, `tls_host` TLS with `ca`; what lies in `files` is below /files/."""

    def __init__(self, tools: Path, directory: Path, registry: RegistryProcess) -> None:
        directory.mkdir(parents=True)
        self.files = directory / "files"
        self.files.mkdir()
        both = directory / "both.pem"
        self.ca = directory / "ca.pem"
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=bench"]
        names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(both), "-out", str(self.ca)]
        subprocess.run([*command, *names], check=True, capture_output=True)
        both.write_text(both.read_text() + self.ca.read_text())
        port, tls_port = free_port(), free_port()
        text = _NGINX.format(
            directory=directory,
            port=port,
            tls_port=tls_port,
            certificate=both,
            storage=registry.storage,
            files=self.files,
            upstream=registry.host,
        )
        (directory / "nginx.conf").write_text(text)
        self._server = Server(
            [str(nginx(tools)), "-p", str(directory), "-c", str(directory / "nginx.conf")], directory, port
        )
        self.host, self.tls_host = self._server.host, f"127.0.0.1:{tls_port}"
        self.registry_config = directory / "certs"
        hosts = self.registry_config / f"{self.tls_host.replace(':', '_')}_" / "hosts.toml"
        hosts.parent.mkdir(parents=True)
        hosts.write_text(f'server = "https://{self.tls_host}"\nca = "{self.ca}"\n')

    def stop(self) -> None:
        """End it."""
        self._server.stop()


@contextlib.contextmanager
def delaying_proxy(upstream: str, delay_ms: float, directory: Path) -> Iterator[str]:
    """A host that passes each request on `delay_ms` later."""
    command = [sys.executable, "-S", str(Path(__file__).with_name("delaying_proxy.py")), upstream, str(delay_ms)]
    directory.mkdir(parents=True, exist_ok=True)
    server = Server(command, directory, 0)
    try:
        yield server.host
    finally:
        server.stop()


@contextlib.contextmanager
def capped_registry(binary: Path, registry: RegistryProcess, directory: Path, rate: str) -> Iterator[RegistryProcess]:
    """A second registry on the same storage, in a network name space at the other end of a pair of links; what it sends
    passes a token bucket of `rate`, as tc writes it.
    """
    space = f"mm-bench-{os.getpid()}"
    near, far = f"mmb{os.getpid() % 100000}n", f"mmb{os.getpid() % 100000}f"
    directory.mkdir(parents=True, exist_ok=True)
    wrapped = directory / "registry-in-its-network"
    wrapped.write_text(f'#!/bin/sh\nexec ip netns exec {space} {binary} "$@"\n')
    wrapped.chmod(0o755)
    inside = ["ip", "netns", "exec", space]
    subprocess.run(["ip", "netns", "add", space], check=True)
    try:
        for command in (
            ["ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", space],
            ["ip", "address", "add", "10.250.77.1/30", "dev", near],
            ["ip", "link", "set", near, "up"],
            [*inside, "ip", "address", "add", "10.250.77.2/30", "dev", far],
            [*inside, "ip", "link", "set", far, "up"],
            [*inside, "ip", "link", "set", "lo", "up"],
            [*inside, "tc", "qdisc", "add", "dev", far, "root", "tbf", "rate", rate, "burst", "2mb", "latency", "50ms"],
        ):
            subprocess.run(command, check=True, capture_output=True)
        behind = RegistryProcess(wrapped, directory / "registry")
        (directory / "registry").mkdir(exist_ok=True)
        (directory / "registry" / "storage").symlink_to(registry.storage)
        behind.start("10.250.77.2:5000")
        try:
            yield behind
        finally:
            behind.stop()
    finally:
        subprocess.run(["ip", "netns", "delete", space], check=False)
