"""The models that are measured: one of random bytes, pushed as anybody would, and sparse ones of any size."""

from __future__ import annotations

import hashlib
import http.client
import os
import random
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from bench.machine import MIB
from registry_process import RegistryProcess
from support.node_process import COMMAND

from csi.integrity import index
from csi.integrity.index import BlobHashes
from csi.oci.digest import Digest
from csi.oci.modelpack import ModelDescription, SourceFile, pack
from csi.stream import blocks

WEIGHTS = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Model:
    """`path` of its manifest and weights below `registry/v2`; `size` in bytes."""

    repository: str
    manifest: str
    blob: str
    size: int

    def reference(self, host: str) -> str:
        """As a volume names it."""
        return f"{host}/{self.repository}@{self.manifest}"

    def url(self, host: str, scheme: str = "http") -> str:
        """Of its weights."""
        return f"{scheme}://{host}/v2/{self.repository}/blobs/{self.blob}"

    def stored(self, registry: RegistryProcess) -> Path:
        """The file that the registry keeps its weights in."""
        return _blob_path(registry, self.blob)


def push_random(registry: RegistryProcess, directory: Path, size: int) -> Model:
    """One weight file of random bytes, pushed with `modelmount push`."""
    directory.mkdir()
    generator = random.Random(size)
    hasher = hashlib.sha256()
    with open(directory / WEIGHTS, "wb") as file:
        for _ in range(size // (16 * MIB)):
            part = generator.randbytes(16 * MIB)
            hasher.update(part)
            file.write(part)
    name = f"{registry.host}/bench/model"
    pushed = subprocess.run(
        [*COMMAND, "push", str(directory), f"{name}:v1"], check=True, capture_output=True, text=True
    )
    shutil.rmtree(directory)
    return Model("bench/model", pushed.stdout.strip().partition("@")[2], f"sha256:{hasher.hexdigest()}", size)


def put_sparse(registry: RegistryProcess, size: int) -> Model:
    """One weight file of zeros that takes no room, put into the registry's storage as it would keep it. Its digest is made
    up, because nobody reads all of it; its block index is right, so that what is read is checked.
    """
    repository = f"bench/sparse-{size // MIB}"
    zeros = index.hash_of(bytes(blocks.BLOCK_BYTES))
    last = index.hash_of(bytes(blocks.block_length(size, blocks.block_count(size) - 1)))
    weights = Digest("sha256", hashlib.sha256(repository.encode()).hexdigest())
    hashes = BlobHashes(weights, size, zeros * (blocks.block_count(size) - 1) + last)
    packed = pack([SourceFile(WEIGHTS, weights, size)], ModelDescription(name="sparse"), index.dump([hashes]))
    path = _link(registry, repository, str(weights))
    path.touch()
    os.truncate(path, size)
    for content in (packed.config, packed.index):
        _link(registry, repository, str(Digest.of(content))).write_bytes(content)
    connection = http.client.HTTPConnection(registry.host)
    manifest = str(Digest.of(packed.manifest))
    headers = {"Content-Type": "application/vnd.oci.image.manifest.v1+json"}
    connection.request("PUT", f"/v2/{repository}/manifests/{manifest}", packed.manifest, headers)
    if (answer := connection.getresponse()).status != 201:
        raise SystemExit(f"the registry does not take a sparse model: {answer.read(500)!r}")
    connection.close()
    return Model(repository, manifest, str(weights), size)


def _blob_path(registry: RegistryProcess, digest: str) -> Path:
    name = digest.partition(":")[2]
    return registry.storage / "docker/registry/v2/blobs/sha256" / name[:2] / name / "data"


def _link(registry: RegistryProcess, repository: str, digest: str) -> Path:
    """Make a blob one of a repository; where its bytes go."""
    name = digest.partition(":")[2]
    link = registry.storage / "docker/registry/v2/repositories" / repository / "_layers/sha256" / name / "link"
    link.parent.mkdir(parents=True, exist_ok=True)
    link.write_text(digest)
    path = _blob_path(registry, digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
