"""An OCI registry in this process that misbehaves on order. Content in memory, faults as data, every request logged.

It speaks enough of the distribution-spec for pulls: manifests by tag and digest, blobs with single closed ranges.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl

from csi.integrity import index
from csi.integrity.index import BlobHashes

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"


@dataclass(frozen=True, slots=True)
class Seen:
    """One request as it arrived."""

    path: str
    range: str | None
    authorization: str | None
    form: str = ""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Fault:
    """What goes wrong with the next `times` requests whose path contains `match`. Unset fields do nothing."""

    match: str
    times: int = 1
    after: int = 0
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    cut_at: int | None = None
    flip_at: int | None = None
    stall_s: float = 0.0
    ignore_range: bool = False
    partial_as_200: bool = False
    content_range: str | None = None
    gzip: bool = False
    redirect: str | None = None


class FakeRegistry:
    """Use as a context manager. `host` is `127.0.0.1:port`."""

    def __init__(self, username: str | None = None, password: str | None = None, *, tokens: bool = False) -> None:
        """With a user: Basic, or with `tokens` a Bearer token that the path /token gives for Basic. `tokens` without a
        user: tokens for everybody.
        """
        self.tokens = tokens
        self.valid_tokens: set[str] = set()
        self.identity_tokens: set[str] = set()
        """Taken by the token service as refresh tokens."""
        self.users: set[str] = set()
        """Authorization headers of further users whom the token service knows."""
        self.only_oauth = False
        """The token service knows POST alone."""
        self.token_lifetime_s: float | None = 300
        self.realm: str | None = None
        """Named in the challenge; None for our own."""
        self.blobs: dict[str, bytes] = {}
        self.blob_readers: dict[str, tuple[int, Callable[[int, int], bytes]]] = {}
        """Blobs too large for memory: size, and a function of offset and length."""
        self.manifests: dict[str, tuple[str, bytes]] = {}
        self.faults: list[Fault] = []
        self.seen: list[Seen] = []
        self.digest_header: str | None = None
        self._expected: str | None = None
        if username is not None:
            self.expect(username, str(password))
        self._lock = threading.Lock()
        registry = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # headers and a small body would wait 40 ms for each other

            def do_GET(self) -> None:
                registry._answer(self)

            def do_POST(self) -> None:
                registry._answer(self)

            def do_HEAD(self) -> None:
                registry._answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                return

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                return  # clients that go away are part of many tests

        self._server = Server(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> FakeRegistry:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add_blob(self, content: bytes) -> str:
        """Its digest."""
        digest = "sha256:" + hashlib.sha256(content).hexdigest()
        self.blobs[digest] = content
        return digest

    def add_manifest(self, repository: str, tag: str, content: bytes, media_type: str = MANIFEST_TYPE) -> str:
        """Under its tag and its digest, which is returned."""
        digest = "sha256:" + hashlib.sha256(content).hexdigest()
        for name in (tag, digest):
            self.manifests[f"/v2/{repository}/manifests/{name}"] = (media_type, content)
        return digest

    def add_model(self, repository: str, tag: str, files: dict[str, bytes], *, indexed: bool = False) -> str:
        """A ModelPack artifact of raw layers, written out by hand so that it does not depend on our packer. `indexed`:
        with a block index.
        """
        layers = [
            {
                "mediaType": "application/vnd.cncf.model.weight.v1.raw",
                "digest": self.add_blob(content),
                "size": len(content),
                "annotations": {"org.cncf.model.filepath": path},
            }
            for path, content in files.items()
        ]
        if indexed:
            layers.append(self.add_index([index.hash_file(io.BytesIO(content)) for content in files.values()]))
        return self.add_manifest(repository, tag, model_manifest(layers, self.add_blob(b"{}")))

    def add_index(self, blobs: list[BlobHashes]) -> dict[str, Any]:
        """The layer of a block index of these blobs."""
        data = index.dump(blobs)
        return {
            "mediaType": "application/vnd.cncf.model.doc.v1.raw",
            "digest": self.add_blob(data),
            "size": len(data),
            "annotations": {"org.cncf.model.filepath": ".modelmount/index.v1.pb"},
        }

    def copy_from(self, other: FakeRegistry) -> None:
        """Everything the other one has, under the same names."""
        self.blobs |= other.blobs
        self.blob_readers |= other.blob_readers
        self.manifests |= other.manifests

    def expect(self, username: str, password: str) -> None:
        """This login and no other, from now on."""
        self._expected = "Basic " + base64.b64encode(f"{username}:{password}".encode()).decode()

    def requests(self, part: str) -> list[Seen]:
        """Those whose path contains `part`."""
        with self._lock:
            return [seen for seen in self.seen if part in seen.path]

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        form = request.rfile.read(int(request.headers.get("Content-Length") or 0)).decode()
        seen = Seen(
            request.path,
            request.headers.get("Range"),
            request.headers.get("Authorization"),
            form,
            dict(request.headers),
        )
        with self._lock:
            self.seen.append(seen)
            fault = self._fault_for(request.path)
        if fault.stall_s:
            time.sleep(fault.stall_s)
        if fault.status is not None:
            return self._send(request, fault.status, fault.headers, fault.body or b"", fault)
        away = {"Location": fault.redirect or ""}
        if request.path.startswith("/token"):
            if fault.redirect is not None:
                return self._send(request, 307, away, b"", fault)
            return self._give_token(request, seen, fault)
        if self.tokens:
            if (seen.authorization or "").removeprefix("Bearer ") not in self.valid_tokens:
                realm = f"http://{self.host}/token" if self.realm is None else self.realm
                scope = "repository:team/model:pull"
                challenge = f'Bearer realm="{realm}",service="fake registry",scope="{scope}"'
                return self._send(request, 401, {"WWW-Authenticate": challenge}, b"", fault)
        elif self._expected is not None and seen.authorization != self._expected:
            return self._send(request, 401, {"WWW-Authenticate": 'Basic realm="fake"'}, b"", fault)
        if fault.redirect is not None:
            return self._send(request, 307, away, b"", fault)
        path = request.path.partition("?")[0]
        if path in self.manifests:
            media_type, content = self.manifests[path]
            digest = self.digest_header or "sha256:" + hashlib.sha256(content).hexdigest()
            headers = {"Content-Type": media_type, "Docker-Content-Digest": digest}
            return self._send(request, 200, headers | fault.headers, fault.body or content, fault)
        digest = path.rpartition("/blobs/")[2]
        if digest in self.blobs:
            content = self.blobs[digest]
            return self._send_blob(request, len(content), lambda o, n: content[o : o + n], seen.range, fault)
        if digest in self.blob_readers:
            return self._send_blob(request, *self.blob_readers[digest], seen.range, fault)
        error = {"errors": [{"code": "NAME_UNKNOWN", "message": "repository or content unknown"}]}
        return self._send(request, 404, {}, json.dumps(error).encode(), fault)

    def _give_token(self, request: BaseHTTPRequestHandler, seen: Seen, fault: Fault) -> None:
        if request.command == "POST":  # OAuth2
            form = dict(parse_qsl(seen.form))
            login = f"{form.get('username')}:{form.get('password')}"
            is_right = (
                form.get("refresh_token") in self.identity_tokens
                if form["grant_type"] == "refresh_token"
                else (self._expected == "Basic " + base64.b64encode(login.encode()).decode())
            )
            if not is_right:
                return self._send(request, 400, {}, b'{"error":"invalid_grant"}', fault)
        elif self.only_oauth:
            return self._send(request, 405, {}, b"", fault)
        elif seen.authorization != self._expected and seen.authorization not in self.users:
            return self._send(request, 401, {}, b"", fault)
        with self._lock:
            token = f"token-{len([one for one in self.seen if one.path.startswith('/token')])}"
            self.valid_tokens.add(token)
        answer = {"access_token" if request.command == "POST" else "token": token}
        if self.token_lifetime_s is not None:
            answer |= {"expires_in": self.token_lifetime_s}  # type: ignore[dict-item]
        return self._send(request, 200, {"Content-Type": "application/json"}, json.dumps(answer).encode(), fault)

    def _send_blob(
        self,
        request: BaseHTTPRequestHandler,
        size: int,
        read: Callable[[int, int], bytes],
        wanted: str | None,
        fault: Fault,
    ) -> None:
        if wanted is None or fault.ignore_range:
            return self._send(request, 200, fault.headers, read(0, size), fault)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last), size - 1)
        body = read(start, end - start + 1)
        if fault.partial_as_200:
            return self._send(request, 200, fault.headers, body, fault)
        content_range = fault.content_range or f"bytes {start}-{end}/{size}"
        return self._send(request, 206, {"Content-Range": content_range} | fault.headers, body, fault)

    def _send(
        self, request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes, fault: Fault
    ) -> None:
        if fault.gzip:
            body, headers = gzip.compress(body), headers | {"Content-Encoding": "gzip"}
        if fault.flip_at is not None and fault.flip_at < len(body):
            body = body[: fault.flip_at] + bytes([body[fault.flip_at] ^ 1]) + body[fault.flip_at + 1 :]
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command == "HEAD":
            return
        if fault.cut_at is not None:
            request.wfile.write(body[: fault.cut_at])
            request.wfile.flush()
            request.connection.shutdown(socket.SHUT_RDWR)
            request.close_connection = True
            return
        request.wfile.write(body)

    def _fault_for(self, path: str) -> Fault:
        for fault in self.faults:
            if fault.match in path and fault.times > 0:
                if fault.after > 0:
                    fault.after -= 1
                    continue
                fault.times -= 1
                return fault
        return Fault(match="")


def model_manifest(layers: list[dict[str, Any]], config_digest: str, **extra: Any) -> bytes:
    """A ModelPack manifest with these layers."""
    return json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "artifactType": "application/vnd.cncf.model.manifest.v1+json",
            "config": {"mediaType": "application/vnd.cncf.model.config.v1+json", "digest": config_digest, "size": 2},
            "layers": layers,
            **extra,
        }
    ).encode()
