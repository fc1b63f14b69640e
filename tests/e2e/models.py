"""Models in a registry, with what a reader must find in them."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
from pathlib import Path
from typing import Any

import requests
from e2e.api import DRIVER
from registry_process import PASSWORD, RegistryProcess
from support.node_process import COMMAND

_MIB = 1 << 20
_CONFIG = b"{}"


class Model:
    """Versions v1 and v2 of one repository. `digests`: sha256 of the weights; `references`: pinned by digest."""

    def __init__(
        self, host: str, directory: Path, repository: str, login: tuple[str, ...] = (), size_mib: int = 24
    ) -> None:
        self.repository = f"{host}/{repository}"
        self.references: dict[str, str] = {}
        self.digests: dict[str, str] = {}
        for version in ("v1", "v2"):
            source = directory / repository / version
            (source / "weights").mkdir(parents=True)
            weights = random.Random(f"{repository}:{version}")
            blocks = [weights.randbytes(_MIB) for _ in range(size_mib)]
            content = b"".join(blocks)
            (source / "weights" / "model.safetensors").write_bytes(content)
            (source / "version.txt").write_text(version)
            (source / "hashes.txt").write_text("\n".join(hashlib.sha256(block).hexdigest() for block in blocks))
            self.digests[version] = hashlib.sha256(content).hexdigest()
            self.references[version] = push(source, f"{self.repository}:{version}", *login)


def push(source: Path, reference: str, *flags: str) -> str:
    """`modelmount push`; returns the reference by digest. Raises: AssertionError."""
    command = [*COMMAND, "push", str(source), reference, "--plain-http", *flags]
    done = subprocess.run(command, input=PASSWORD, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def sparse_model(registry: RegistryProcess, size_bytes: int) -> str:
    """A ModelPack of one file of zeros, put into the registry's storage as a hole: no disk has to hold it."""
    zeros = memoryview(bytes(8 << 20))
    digest = hashlib.sha256()
    for offset in range(0, size_bytes, len(zeros)):
        digest.update(zeros[: min(len(zeros), size_bytes - offset)])
    name = f"sparse/{size_bytes}"
    root = registry.storage / "docker" / "registry" / "v2"
    for content, hexdigest in ((None, digest.hexdigest()), (_CONFIG, hashlib.sha256(_CONFIG).hexdigest())):
        blob = root / "blobs" / "sha256" / hexdigest[:2] / hexdigest / "data"
        blob.parent.mkdir(parents=True, exist_ok=True)
        with open(blob, "wb") as file:
            file.write(content or b"")
            if content is None:
                file.truncate(size_bytes)
        link = root / "repositories" / name / "_layers" / "sha256" / hexdigest / "link"
        link.parent.mkdir(parents=True)
        link.write_text(f"sha256:{hexdigest}")
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "artifactType": "application/vnd.cncf.model.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.cncf.model.config.v1+json",
            "digest": f"sha256:{hashlib.sha256(_CONFIG).hexdigest()}",
            "size": len(_CONFIG),
        },
        "layers": [
            {
                "mediaType": "application/vnd.cncf.model.weight.v1.raw",
                "digest": f"sha256:{digest.hexdigest()}",
                "size": size_bytes,
                "annotations": {"org.cncf.model.filepath": "model.safetensors"},
            }
        ],
    }
    body = json.dumps(manifest).encode()
    headers = {"Content-Type": str(manifest["mediaType"])}
    answer = requests.put(f"http://{registry.host}/v2/{name}/manifests/v1", data=body, headers=headers, timeout=60)
    assert answer.status_code == 201, answer.text
    return f"{registry.host}/{name}@sha256:{hashlib.sha256(body).hexdigest()}"


MOUNTS = [{"name": "model", "mountPath": "/models", "readOnly": True}]
HASH = "sha256sum /models/weights/model.safetensors | cut -d' ' -f1 > /dev/termination-log"


def inline(reference: str, **more: Any) -> list[dict[str, Any]]:
    """The volumes of a pod with one inline model."""
    csi = {"driver": DRIVER, "readOnly": True, "volumeAttributes": {"reference": reference}, **more}
    return [{"name": "model", "csi": csi}]


def persistent_volume(name: str, attributes: dict[str, str], *, handle: str | None = None) -> dict[str, Any]:
    """A PersistentVolume of one model; every handle is its own, or a pod with two of them would hang."""
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name},
        "spec": {
            "capacity": {"storage": "1Gi"},
            "accessModes": ["ReadOnlyMany"],
            "storageClassName": "",
            "persistentVolumeReclaimPolicy": "Retain",
            "csi": {"driver": DRIVER, "volumeHandle": handle or name, "volumeAttributes": attributes},
        },
    }


def claim_of(volume: str) -> dict[str, Any]:
    """A claim for that volume, of the same name."""
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": volume},
        "spec": {
            "accessModes": ["ReadOnlyMany"],
            "storageClassName": "",
            "volumeName": volume,
            "resources": {"requests": {"storage": "1Gi"}},
        },
    }
