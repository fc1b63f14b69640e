"""Writes a model into an OCI image-layout directory. Source: OCI image-spec, image-layout.md."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from csi.errors import RegistryError
from csi.oci.descriptor import Descriptor
from csi.oci.digest import Digest
from csi.oci.manifest import OCI_MANIFEST
from csi.oci.modelpack import ARTIFACT_TYPE, PackedModel
from csi.oci.reference import Reference
from csi.oci.strict_json import loads_strict
from csi.registry.pushing import HashedFile, OnProgress, PushProgress, PushState

_LAYOUT_FILE = "oci-layout"
_VERSION = "1.0.0"
_REF_NAME = "org.opencontainers.image.ref.name"
_MAX_INDEX_BYTES = 16 * 1024 * 1024


class LayoutWriter:
    """A `ModelSink`. The directory may hold other models already; readers and other writers may work at the same time.

    Every file appears whole or not at all, and the index that names the model comes last.
    """

    def __init__(self, reference: Reference) -> None:
        """Makes an empty layout where there is none yet.

        Raises: RegistryError when the directory has other things in it, or cannot be written.
        """
        self._directory = reference.layout_dir
        self._origin = reference.origin
        with self._errors():
            os.makedirs(self._directory, exist_ok=True)
            with self._locked():
                self._check_or_start_layout()
            os.makedirs(self._path("blobs", "sha256"), exist_ok=True)

    def put_file(self, blob: Descriptor, path: str, on_progress: OnProgress) -> PushState:
        """See `ModelSink`."""

        def done(state: PushState) -> PushState:
            on_progress(PushProgress(blob.digest, path, blob.size_bytes, blob.size_bytes, state))
            return state

        target = self._blob_path(blob.digest)
        with self._errors(), HashedFile(blob, path, on_progress) as source:
            if _size_of(target) == blob.size_bytes:
                return done(PushState.EXISTS)
            os.makedirs(os.path.dirname(target), exist_ok=True)

            def copy(file: BinaryIO) -> None:
                for block in source:
                    file.write(block)

            _write_whole(target, copy)
        return done(PushState.UPLOADED)

    def finish(self, model: PackedModel, tag: str) -> None:
        """See `ModelSink`. Whatever was named `tag` before has no name afterwards."""
        with self._errors(), self._locked():
            index = self._read_index()
            self._write(self._blob_path(model.config_descriptor.digest), model.config)
            if model.index_layer is not None:
                self._write(self._blob_path(model.index_layer.digest), model.index)
            self._write(self._blob_path(model.digest), model.manifest)
            entry = {
                "mediaType": OCI_MANIFEST,
                "artifactType": ARTIFACT_TYPE,
                "digest": str(model.digest),
                "size": len(model.manifest),
                "annotations": {_REF_NAME: tag},
            }
            kept = [old for old in index["manifests"] if not _is_replaced(old, str(model.digest), tag)]
            index["manifests"] = [*kept, entry]
            self._write(self._path("index.json"), json.dumps(index, indent=2, sort_keys=True).encode())

    def close(self) -> None:
        """See `ModelSink`. Nothing is held between calls."""

    def _check_or_start_layout(self) -> None:
        try:
            with open(self._path(_LAYOUT_FILE), "rb") as file:
                found = loads_strict(file.read(4097), f"{self._origin}: {_LAYOUT_FILE}", 4096)
        except FileNotFoundError:
            if os.listdir(self._directory):
                raise RegistryError(
                    f"{self._origin}: the directory is not empty and is no OCI image layout (no file {_LAYOUT_FILE!r}); "
                    "name an empty or new directory"
                ) from None
            self._write(self._path(_LAYOUT_FILE), json.dumps({"imageLayoutVersion": _VERSION}).encode())
            return
        if found.get("imageLayoutVersion") != _VERSION:
            raise RegistryError(
                f"{self._origin}: is a layout of version {str(found.get('imageLayoutVersion'))[:40]!r}, "
                f"expected {_VERSION!r}; not touched"
            )

    def _read_index(self) -> dict[str, Any]:
        try:
            with open(self._path("index.json"), "rb") as file:
                data = file.read(_MAX_INDEX_BYTES + 1)
        except FileNotFoundError:
            return {"schemaVersion": 2, "manifests": []}
        index = loads_strict(data, f"{self._origin}: index.json", _MAX_INDEX_BYTES)
        if not isinstance(index.get("manifests"), list):
            raise RegistryError(f"{self._origin}: its index.json lists no manifests; not touched")
        return index

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Two pushes into one layout must not lose each other's index entry."""
        fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise RegistryError(
                f"{self._origin}: cannot be written: {exc.strerror or exc}; check the directory's rights and free space"
            ) from exc

    def _path(self, *names: str) -> str:
        return os.path.join(self._directory, *names)

    def _blob_path(self, digest: Digest) -> str:
        return self._path("blobs", digest.algorithm, digest.hex)

    @staticmethod
    def _write(path: str, content: bytes) -> None:
        _write_whole(path, lambda file: file.write(content))


def _write_whole(path: str, fill: Callable[[BinaryIO], object]) -> None:
    """Beside the target first, on disk before it gets its name, and gone when `fill` fails."""
    temporary = f"{path}.{secrets.token_hex(8)}.tmp"
    try:
        with open(temporary, "xb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _size_of(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return None


def _is_replaced(entry: Any, digest: str, tag: str) -> bool:
    """The entry that has the tag now, and a nameless one of the same manifest."""
    if not isinstance(entry, dict):
        return False
    annotations = entry.get("annotations")
    name = annotations.get(_REF_NAME) if isinstance(annotations, dict) else None
    return name == tag or (name is None and entry.get("digest") == digest)
