"""Where artifacts of the collection are put: a real registry, or an image-layout directory. Written from the specs, so that
nothing of ours is between an artifact and its reader.
"""

from __future__ import annotations

import base64
import http.client
import json
from pathlib import Path

from formats.artifacts import OCI_INDEX, Artifact, digest_of


def push(found: Artifact, host: str, repository: str, tag: str = "latest", login: tuple[str, str] | None = None) -> str:
    """Blobs, children, manifest; returns the reference pinned by digest. Source: distribution-spec, "Push"."""
    connection = http.client.HTTPConnection(host, timeout=30)
    headers = {"Authorization": "Basic " + base64.b64encode(":".join(login).encode()).decode()} if login else {}
    try:
        for child in found.children:
            push(child, host, repository, child.digest.replace(":", "-"), login)
        for digest, data in found.blobs.items():
            _push_blob(connection, repository, digest, data, headers)
        path = f"/v2/{repository}/manifests/{tag}"
        status, _, body = _send(connection, "PUT", path, found.data, headers | {"Content-Type": found.media_type})
        assert status == 201, (status, body)
    finally:
        connection.close()
    return f"{host}/{repository}@{found.digest}"


def _push_blob(
    connection: http.client.HTTPConnection, repository: str, digest: str, data: bytes, headers: dict[str, str]
) -> None:
    status, answered, body = _send(connection, "POST", f"/v2/{repository}/blobs/uploads/", b"", headers)
    assert status == 202, (status, body)
    location = answered["Location"]
    assert location is not None
    path = "/" + location.split("//", 1)[-1].split("/", 1)[1]
    status, _, body = _send(
        connection,
        "PUT",
        f"{path}{'&' if '?' in path else '?'}digest={digest}",
        data,
        headers | {"Content-Type": "application/octet-stream"},
    )
    assert status == 201, (status, body)


def _send(
    connection: http.client.HTTPConnection, method: str, path: str, body: bytes, headers: dict[str, str]
) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    return response.status, response.headers, response.read()


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
