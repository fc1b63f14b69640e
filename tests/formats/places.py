"""Where artifacts of the collection are put: a real registry, or an image-layout directory. Written from the specs, so that
nothing of ours is between an artifact and its reader.
"""

from __future__ import annotations

import http.client
import json
from pathlib import Path

from formats.artifacts import DOCKER, DOCKER_LIST, OCI, OCI_INDEX, Artifact, digest_of


def push(found: Artifact, host: str, repository: str, tag: str = "latest") -> str:
    """Blobs, children, manifest; returns the reference pinned by digest. Source: distribution-spec, "Push"."""
    connection = http.client.HTTPConnection(host, timeout=30)
    try:
        for child in found.children:
            push(child, host, repository, child.digest.replace(":", "-"))
        for digest, data in found.blobs.items():
            _push_blob(connection, repository, digest, data)
        path = f"/v2/{repository}/manifests/{tag}"
        status, _, body = _send(connection, "PUT", path, found.data, {"Content-Type": found.media_type})
        assert status == 201, (status, body)
    finally:
        connection.close()
    return f"{host}/{repository}@{found.digest}"


def _push_blob(connection: http.client.HTTPConnection, repository: str, digest: str, data: bytes) -> None:
    status, headers, body = _send(connection, "POST", f"/v2/{repository}/blobs/uploads/", b"", {})
    assert status == 202, (status, body)
    location = headers["Location"]
    assert location is not None
    path = "/" + location.split("//", 1)[-1].split("/", 1)[1]
    status, _, body = _send(
        connection,
        "PUT",
        f"{path}&digest={digest}",
        data,
        {"Content-Type": "application/octet-stream"},
    )
    assert status == 201, (status, body)


def _send(
    connection: http.client.HTTPConnection, method: str, path: str, body: bytes, headers: dict[str, str]
) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    return response.status, response.headers, response.read()


def fetch(host: str, repository: str, name: str = "latest") -> Artifact:
    """What somebody else pushed, whole; an index with its manifests. Source: distribution-spec, "Pull"."""
    connection = http.client.HTTPConnection(host, timeout=30)
    try:
        accept = ", ".join((OCI, OCI_INDEX, DOCKER, DOCKER_LIST))
        status, headers, data = _send(connection, "GET", f"/v2/{repository}/manifests/{name}", b"", {"Accept": accept})
        assert status == 200, data
        manifest = json.loads(data)
        manifest.setdefault("mediaType", headers["Content-Type"])
        children = [fetch(host, repository, entry["digest"]) for entry in manifest.get("manifests", ())]
        blobs = {}
        for layer in [*manifest.get("layers", ()), *([manifest["config"]] if "config" in manifest else ())]:
            status, _, blobs[layer["digest"]] = _send(
                connection, "GET", f"/v2/{repository}/blobs/{layer['digest']}", b"", {}
            )
            assert status == 200
    finally:
        connection.close()
    return Artifact(manifest, blobs, {}, {}, children)


def read_layout(directory: Path) -> Artifact:
    """The first manifest of a layout."""

    def blob(digest: str) -> bytes:
        return (directory / "blobs" / "sha256" / digest.partition(":")[2]).read_bytes()

    entry = json.loads((directory / "index.json").read_text())["manifests"][0]
    manifest = json.loads(blob(entry["digest"]))
    manifest.setdefault("mediaType", entry["mediaType"])
    layers = [*manifest.get("layers", ()), manifest["config"]]
    return Artifact(manifest, {layer["digest"]: blob(layer["digest"]) for layer in layers}, {})


def write_layout(found: Artifact, directory: Path) -> str:
    """Returns the reference, pinned by digest. Source: image-spec, image-layout.md."""
    blobs = directory / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)
    (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    for artifact in (*found.children, found):
        for digest, data in {**artifact.blobs, artifact.digest: artifact.data}.items():
            assert digest == digest_of(data)
            (blobs / digest.partition(":")[2]).write_bytes(data)
    entry = {"mediaType": found.media_type, "digest": found.digest, "size": len(found.data)}
    (directory / "index.json").write_text(
        json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]})
    )
    return f"oci-layout:{directory}@{found.digest}"
