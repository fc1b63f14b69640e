"""A Kubernetes API server in this process, as far as the driver uses one. Objects in memory, every request logged.

It checks what a real one would refuse here: unknown resources, names that are no DNS names, a second object of one name.
"""

from __future__ import annotations

import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_DNS_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
TOKEN = "kube-api-token"


@dataclass(frozen=True, slots=True)
class Asked:
    """One request as it arrived."""

    verb: str
    path: str
    body: Any


@dataclass(slots=True)
class Refusal:
    """What the next `times` requests whose path contains `match` get."""

    match: str
    status: int
    times: int = 1_000_000


@dataclass
class FakeKubeApi:
    """Use as a context manager. `resources` are the collections it has, such as `/api/v1/namespaces/a/events`."""

    resources: list[str] = field(
        default_factory=lambda: [
            r"/apis/csi\.modelmount\.dev/v1alpha1/modelvolumes",
            r"/api/v1/namespaces/[a-z0-9-]+/(persistentvolumeclaims|events|pods)",
        ]
    )
    objects: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By path."""
    asked: list[Asked] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> FakeKubeApi:
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                api._answer(self, "GET")

            def do_POST(self) -> None:
                api._answer(self, "POST")

            def do_PATCH(self) -> None:
                api._answer(self, "PATCH")

            def do_DELETE(self) -> None:
                api._answer(self, "DELETE")

            def log_message(self, format: str, *args: Any) -> None:
                return

        class Server(ThreadingHTTPServer):
            daemon_threads = True

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def kubeconfig(self, path: Path) -> Path:
        """A file that leads here, with a token."""
        host = f"http://127.0.0.1:{self._server.server_address[1]}"
        path.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [{"name": "c", "cluster": {"server": host}}],
                    "users": [{"name": "u", "user": {"token": TOKEN}}],
                    "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
                    "current-context": "x",
                }
            ),
            encoding="utf-8",
        )
        return path

    def add_claim(self, namespace: str, name: str, uid: str, annotations: dict[str, str]) -> None:
        """A PersistentVolumeClaim."""
        self.objects[f"/api/v1/namespaces/{namespace}/persistentvolumeclaims/{name}"] = {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": name, "namespace": namespace, "uid": uid, "annotations": annotations},
        }

    def below(self, part: str) -> list[dict[str, Any]]:
        """The objects whose path contains `part`."""
        with self._lock:
            return [value for path, value in self.objects.items() if part in path]

    def _answer(self, request: BaseHTTPRequestHandler, verb: str) -> None:
        length = int(request.headers.get("Content-Length") or 0)
        body = json.loads(request.rfile.read(length)) if length else None
        path = request.path.partition("?")[0]
        with self._lock:
            self.asked.append(Asked(verb, path, body))
            if request.headers.get("Authorization") != f"Bearer {TOKEN}":
                status, value = 401, _status(401, "Unauthorized")
            elif (refusal := next((one for one in self.refusals if one.match in path and one.times), None)) is not None:
                refusal.times -= 1
                status, value = refusal.status, _status(refusal.status, "refused by the test")
            else:
                status, value = self._handle(verb, path, body)
        data = json.dumps(value).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def _handle(self, verb: str, path: str, body: Any) -> tuple[int, dict[str, Any]]:
        collection, _, name = path.rpartition("/")
        if any(re.fullmatch(resource, path) for resource in self.resources):
            if verb == "GET":
                items = [value for key, value in self.objects.items() if key.startswith(f"{path}/")]
                return 200, {"apiVersion": "v1", "kind": "List", "metadata": {}, "items": items}
            if verb == "POST":
                return self._create(path, body)
        elif any(re.fullmatch(resource, collection) for resource in self.resources):
            found = self.objects.get(path)
            if found is None:
                return 404, _status(404, f"{name} not found")
            if verb == "GET":
                return 200, found
            if verb == "DELETE":
                del self.objects[path]
                return 200, _status(200, "deleted")
            if verb == "PATCH":
                found.update({key: value for key, value in body.items() if value is not None})
                return 200, found
        return 404, _status(404, "the server could not find the requested resource")

    def _create(self, path: str, body: Any) -> tuple[int, dict[str, Any]]:
        metadata = body["metadata"]
        name = metadata.get("name") or f"{metadata['generateName']}{len(self.objects)}"
        metadata["name"] = name
        if not _DNS_NAME.fullmatch(name):
            return 422, _status(422, f"metadata.name: {name} is not a DNS name")
        if f"{path}/{name}" in self.objects:
            return 409, _status(409, f"{name} already exists")
        metadata |= {"uid": f"uid-{len(self.objects)}", "resourceVersion": "1"}
        self.objects[f"{path}/{name}"] = body
        return 201, body


def _status(code: int, message: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Status", "code": code, "message": message, "reason": message}
