"""Writes a model into an OCI image-layout directory. Source: OCI image-spec, image-layout.md."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from typing import Any

from csi.errors import DigestMismatchError, RegistryError
from csi.oci.digest import Digest
from csi.oci.manifest import OCI_MANIFEST
from csi.oci.modelpack import PackedModel
from csi.oci.reference import Reference
from csi.registry.upload import UploadState

_REF_NAME = "org.opencontainers.image.ref.name"


class LayoutWriter:
    """A directory that may exist already, with other models in it. Every file appears whole or not at all."""

    def __init__(self, reference: Reference) -> None:
        self._directory = reference.layout_dir
        self._tag = reference.tag
        try:
            os.makedirs(os.path.join(self._directory, "blobs", "sha256"), exist_ok=True)
        except OSError as exc:
            raise RegistryError(f"oci-layout:{self._directory}: {exc.strerror}") from exc

    def add_file(self, digest: Digest, path: str) -> UploadState:
        """Copy a file in. Raises: DigestMismatchError when it is not what was hashed."""
        target = self._blob_path(digest)
        if os.path.exists(target):
            return UploadState.EXISTS
        temporary = f"{target}.{os.getpid()}"
        try:
            shutil.copyfile(path, temporary)
            with open(temporary, "rb") as file:
                actual = hashlib.file_digest(file, digest.algorithm).hexdigest()
            if actual != digest.hex:
                raise DigestMismatchError(
                    f"{path}: changed while it was pushed; push again", expected=str(digest), subject=path
                )
            os.replace(temporary, target)
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)
        return UploadState.UPLOADED

    def finish(self, model: PackedModel) -> None:
        """Config, manifest, and last the index that names it."""
        self._write(self._blob_path(model.config_descriptor.digest), model.config)
        self._write(self._blob_path(model.digest), model.manifest)
        self._write(os.path.join(self._directory, "oci-layout"), b'{"imageLayoutVersion":"1.0.0"}')
        index = self._read_index()
        entry: dict[str, Any] = {"mediaType": OCI_MANIFEST, "digest": str(model.digest), "size": len(model.manifest)}
        if self._tag:
            entry["annotations"] = {_REF_NAME: self._tag}
        kept = [old for old in index["manifests"] if not _replaced(old, entry, self._tag)]
        index["manifests"] = [*kept, entry]
        self._write(os.path.join(self._directory, "index.json"), json.dumps(index, indent=2, sort_keys=True).encode())

    def _read_index(self) -> dict[str, Any]:
        try:
            with open(os.path.join(self._directory, "index.json"), "rb") as file:
                index = json.load(file)
        except FileNotFoundError:
            return {"schemaVersion": 2, "manifests": []}
        except ValueError as exc:
            raise RegistryError(f"oci-layout:{self._directory}: its index.json is not JSON; not touched") from exc
        if not isinstance(index, dict) or not isinstance(index.get("manifests"), list):
            raise RegistryError(f"oci-layout:{self._directory}: its index.json lists no manifests; not touched")
        return index

    def _blob_path(self, digest: Digest) -> str:
        return os.path.join(self._directory, "blobs", digest.algorithm, digest.hex)

    @staticmethod
    def _write(path: str, content: bytes) -> None:
        temporary = f"{path}.{os.getpid()}"
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def _replaced(old: Any, new: dict[str, Any], tag: str | None) -> bool:
    name = (old.get("annotations") or {}).get(_REF_NAME) if isinstance(old, dict) else None
    return bool(tag and name == tag) or (not name and isinstance(old, dict) and old.get("digest") == new["digest"])
