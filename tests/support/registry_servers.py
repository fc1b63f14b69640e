"""Real registries and a real nginx as processes on loopback. What cannot be had on this machine is a visible skip."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import shutil
import socket
import ssl
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

ROOT = Path(__file__).resolve().parents[2]
DISTRIBUTION = "github.com/distribution/distribution/v3/cmd/registry@v3.1.2"
_BUILD_TIMEOUT_S = 900


def distribution_v3(tools: Path) -> Path:
    """The registry of the distribution project, built once."""
    binary = tools / "distribution" / "registry"
    if not binary.exists():
        _go(["install", DISTRIBUTION], ROOT, GOBIN=str(binary.parent))
    return binary


def referrers_registry(tools: Path) -> Path:
    """tests/registries, built once."""
    binary = tools / "registry-with-referrers"
    if not binary.exists():
        _go(["build", "-o", str(binary), "."], ROOT / "tests" / "registries")
    return binary


def nginx(tools: Path) -> Path:
    """nginx of the PATH, or Debian's, unpacked below `tools`."""
    unpacked = tools / "nginx" / "usr" / "sbin" / "nginx"
    for candidate in (shutil.which("nginx"), str(unpacked)):
        if candidate and os.access(candidate, os.X_OK):
            return Path(candidate)
    if not shutil.which("apt-get") or not shutil.which("dpkg"):
        pytest.skip("nginx is not installed, and this is not Debian")
    tools.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=tools) as scratch:
        command = ["apt-get", "download", "nginx"]
        if subprocess.run(command, cwd=scratch, capture_output=True).returncode and os.geteuid() == 0:
            subprocess.run(["apt-get", "update", "-qq"], capture_output=True)
            subprocess.run(command, cwd=scratch, capture_output=True)
        packages = list(Path(scratch).glob("nginx_*.deb"))
        if not packages:
            pytest.skip("nginx is not installed, and its package cannot be downloaded")
        subprocess.run(["dpkg", "-x", str(packages[0]), str(tools / "nginx")], check=True)
    return unpacked


def _go(arguments: list[str], directory: Path, **environment: str) -> None:
    if shutil.which("go") is None:
        pytest.skip("no Go to build this registry with")
    done = subprocess.run(
        ["nice", "go", *arguments],
        cwd=directory,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=_BUILD_TIMEOUT_S,
    )
    if done.returncode:
        pytest.skip(f"go {arguments[0]} failed: {done.stderr.strip()[-300:]}")


class Server:
    """A child process that listens on loopback. `stop` ends it by its pid."""

    def __init__(self, command: list[str], directory: Path, port: int) -> None:
        self.host = f"127.0.0.1:{port}"
        with open(directory / "log", "ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE if not port else log, stderr=log
            )
        if not port:
            assert self._process.stdout is not None
            self.host = self._process.stdout.readline().decode().strip()
        address, _, at = self.host.rpartition(":")
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection((address, int(at)), 1.0).close()
                return
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self.stop()
                    pytest.fail(f"{command[0]} did not start: {(directory / 'log').read_text()[-500:]}")
                time.sleep(0.05)

    def stop(self) -> None:
        """Idempotent."""
        self._process.terminate()
        self._process.wait(10)
        if self._process.stdout is not None:
            self._process.stdout.close()


def free_port() -> int:
    """A port nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


_NGINX = """daemon off; user root; worker_processes 1; pid {directory}/pid; error_log {directory}/error.log;
events {{}}
http {{
  access_log off; client_body_temp_path {directory}; proxy_temp_path {directory}; fastcgi_temp_path {directory};
  uwsgi_temp_path {directory}; scgi_temp_path {directory};
  limit_req_zone $binary_remote_addr zone=one:1m rate=2r/s;
  server {{
    listen 127.0.0.1:{port} ssl; ssl_certificate {certificate}; ssl_certificate_key {certificate};
    location / {{
      proxy_pass http://{upstream}; proxy_set_header Host $http_host; proxy_set_header X-Forwarded-Proto $scheme;
      client_max_body_size 0; proxy_request_buffering off; proxy_http_version 1.1;
    }}
    location /limited/ {{
      limit_req zone=one; limit_req_status 429; add_header Retry-After 1 always;
      proxy_pass http://{upstream}/;
    }}
    location /signed/ {{
      secure_link $arg_md5,$arg_expires; secure_link_md5 "$secure_link_expires$uri {secret}";
      if ($secure_link = "") {{ return 403; }}
      if ($secure_link = "0") {{ return 410; }}
      proxy_set_header Authorization ""; proxy_pass http://{upstream}/;
    }}
  }}
}}
"""
SECRET = "canary-signing-key"


def start_nginx(binary: Path, directory: Path, certificate: Path, upstream: str) -> Server:
    """TLS before `upstream`; two requests a second below /limited/; only with a fresh signature below /signed/."""
    port = free_port()
    text = _NGINX.format(directory=directory, port=port, certificate=certificate, upstream=upstream, secret=SECRET)
    (directory / "nginx.conf").write_text(text)
    return Server([str(binary), "-p", str(directory), "-c", str(directory / "nginx.conf")], directory, port)


class SigningFront:
    """A registry that redirects blobs to signed addresses of an object store (nginx), good for `life_s`."""

    def __init__(self, upstream: str, store: str, life_s: float) -> None:
        self.signed = 0
        self.life_s = life_s
        front = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if "/blobs/" in self.path:
                    expires = int(time.time() + front.life_s)
                    path = f"/signed{self.path}"
                    signature = hashlib.md5(f"{expires}{path} {SECRET}".encode()).digest()
                    md5 = base64.urlsafe_b64encode(signature).decode().rstrip("=")
                    front.signed += 1
                    self._answer(307, {"Location": f"https://{store}{path}?md5={md5}&expires={expires}"}, b"")
                    return
                asked = urllib.request.Request(f"http://{upstream}{self.path}", headers=dict(self.headers))
                try:
                    with urllib.request.urlopen(asked, timeout=10) as answer:
                        self._answer(200, {"Content-Type": answer.headers["Content-Type"]}, answer.read())
                except urllib.error.HTTPError as exc:
                    self._answer(exc.code, {}, exc.read())

            def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                return

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.host = f"127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End it."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class TokenIssuer:
    """A token service (GET with Basic, OAuth2 POST with a refresh token) whose JWTs a real registry checks."""

    def __init__(self, certificate: Path, service: str, life_s: float = 60) -> None:
        self.life_s = life_s
        self.asked: list[tuple[str, str]] = []
        """Method and scope of each request."""
        self.service, self._certificate = service, certificate
        issuer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                basic = "Basic " + base64.b64encode(b"ann:pa55word").decode()
                self._give(self.path.partition("?")[2], self.headers.get("Authorization") == basic)

            def do_POST(self) -> None:
                form = self.rfile.read(int(self.headers["Content-Length"])).decode()
                self._give(form, parse_qs(form).get("refresh_token") == ["refresh"])

            def _give(self, query: str, is_ann: bool) -> None:
                scope = parse_qs(query).get("scope", [""])[0]
                issuer.asked.append((self.command, scope))
                body = json.dumps(issuer.answer(scope) if is_ann else {"error": "invalid_grant"}).encode()
                self.send_response(200 if is_ann else 401)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                return

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.realm = f"http://127.0.0.1:{self._server.server_address[1]}/token"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def answer(self, scope: str) -> dict[str, Any]:
        """A token for that scope, signed by openssl."""
        kind, name, actions = scope.split(":")
        now = int(time.time())
        der = ssl.PEM_cert_to_DER_cert(Path(f"{self._certificate}.crt").read_text())
        header = {"typ": "JWT", "alg": "RS256", "x5c": [base64.b64encode(der).decode()]}
        access = [{"type": kind, "name": name, "actions": actions.split(",")}]
        claims = {"iss": "test", "sub": "ann", "aud": self.service, "exp": now + int(self.life_s), "nbf": now - 60,
                  "iat": now, "jti": str(now), "access": access}  # fmt: skip
        signed = b".".join(_base64url(json.dumps(part).encode()) for part in (header, claims))
        command = ["openssl", "dgst", "-sha256", "-sign", str(self._certificate)]
        signature = subprocess.run(command, input=signed, check=True, capture_output=True).stdout
        return {"token": (signed + b"." + _base64url(signature)).decode(), "expires_in": self.life_s}

    def stop(self) -> None:
        """End it."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _base64url(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")
