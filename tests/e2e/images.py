"""Images of one static binary, made here: no registry of images is needed."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import tarfile
from typing import Any

READER_IMAGE = "localhost/e2e/busybox:1"
PROVISIONER_IMAGE = "localhost/e2e/csi-provisioner:1"
_ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}
_APPLETS = ("sh", "cat", "sha256sum", "sleep", "ls", "cut", "stat", "test", "dd", "touch", "df", "grep", "id")


def busybox_image(binary: bytes, name: str = READER_IMAGE) -> bytes:
    """One static busybox called `name`; its default command sleeps, so it serves as the sandbox image too."""
    config = {"Cmd": ["/bin/sleep", "2147483647"], "Env": ["PATH=/bin"]}
    return image_of(name, "busybox", binary, config, links=_APPLETS)


def image_of(name: str, program: str, binary: bytes, config: dict[str, Any], links: tuple[str, ...] = ()) -> bytes:
    """An OCI image archive called `name`: the static `binary` as /bin/`program`, and `links` to it. `config`: what the image's
    configuration says of how it is run.
    """
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for directory in ("bin", "tmp", "models", "etc"):
            entry = tarfile.TarInfo(directory)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        entry = tarfile.TarInfo(f"bin/{program}")
        entry.mode, entry.size = 0o755, len(binary)
        tar.addfile(entry, io.BytesIO(binary))
        for link in links:
            entry = tarfile.TarInfo(f"bin/{link}")
            entry.type, entry.linkname = tarfile.SYMTYPE, program
            tar.addfile(entry)
    blobs: dict[str, bytes] = {}

    def add(content: bytes, media_type: str) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        blobs[digest] = content
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(content)}

    described = {
        "architecture": _ARCHITECTURE[platform.machine()],
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(layer.getvalue()).hexdigest()]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": add(json.dumps(described).encode(), "application/vnd.oci.image.config.v1+json"),
        "layers": [add(layer.getvalue(), "application/vnd.oci.image.layer.v1.tar")],
    }
    descriptor = add(json.dumps(manifest).encode(), "application/vnd.oci.image.manifest.v1+json")
    descriptor["annotations"] = {
        "io.containerd.image.name": name,
        "org.opencontainers.image.ref.name": name.rpartition(":")[2],
    }
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        files = {
            "oci-layout": b'{"imageLayoutVersion":"1.0.0"}',
            "index.json": json.dumps({"schemaVersion": 2, "manifests": [descriptor]}).encode(),
            **{f"blobs/sha256/{digest}": content for digest, content in blobs.items()},
        }
        for path, content in files.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return archive.getvalue()
