"""An OCI image-layout directory as a `ModelSource`: for demos, tests and places without a network.

Source: OCI image-spec, image-layout.md.
"""

from __future__ import annotations

import os

from csi.errors import (
    DigestMismatchError,
    ModelNotFoundError,
    RegistryUnavailableError,
    SizeMismatchError,
    UnsupportedModelError,
)
from csi.oci import manifest as oci
from csi.oci.digest import Digest
from csi.oci.strict_json import loads_strict
from csi.stream.ports import ManifestBytes, RangeReader

_MAX_INDEX_BYTES = 16 * 1024 * 1024
_REF_NAME = "org.opencontainers.image.ref.name"


class LayoutSource:
    """Opened relative to `directory_fd` (owned from now on), so no right on the directories above it is needed."""

    def __init__(self, directory_fd: int, shown_path: str) -> None:
        self._fd = directory_fd
        self._shown = shown_path

    @property
    def origin(self) -> str:
        """`oci-layout:/directory`."""
        return f"oci-layout:{self._shown}"

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def fetch_manifest(self, tag: str | None, digest: Digest | None, timeout_s: float) -> ManifestBytes:
        """See `ModelSource.fetch_manifest`. Neither tag nor digest: the layout must hold one manifest."""
        media_type = ""
        if digest is None:
            digest, media_type = self._choose(tag)
        data = self._read(
            f"blobs/{digest.algorithm}/{digest.hex}", oci.MAX_MANIFEST_BYTES, f"manifest {digest.short()}"
        )
        found = Digest.of(data, digest.algorithm)
        if found != digest:
            raise DigestMismatchError(
                f"{self.origin}: the file of manifest {digest.short()} hashes to {found.short()}; the layout is damaged",
                expected=str(digest),
                actual=str(found),
                subject=self.origin,
            )
        return ManifestBytes(data, media_type, digest)

    def referrers(self, digest: Digest, artifact_type: str, timeout_s: float) -> tuple[Digest, ...]:
        """See `ModelSource.referrers`. A layout has no such list."""
        return ()

    def open_range(self, digest: Digest, size_bytes: int, offset: int, length: int) -> RangeReader:
        """See `ModelSource.open_range`."""
        fd = self._open(f"blobs/{digest.algorithm}/{digest.hex}", f"blob {digest.short()}")
        actual = os.fstat(fd).st_size
        if actual != size_bytes:
            os.close(fd)
            raise SizeMismatchError(
                f"{self.origin}: blob {digest.short()} should have {size_bytes} bytes, its file has {actual}",
                expected=size_bytes,
                actual=actual,
                subject=str(digest),
            )
        return _FileRangeReader(fd, offset, self.origin)

    def _choose(self, tag: str | None) -> tuple[Digest, str]:
        index = loads_strict(
            self._read("index.json", _MAX_INDEX_BYTES, "index.json"), f"{self.origin} index.json", _MAX_INDEX_BYTES
        )
        entries = index.get("manifests")
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UnsupportedModelError(f"{self.origin}: index.json has no list of manifests")
        named = {str((entry.get("annotations") or {}).get(_REF_NAME, "")): entry for entry in entries}
        chosen = named.get(tag) if tag is not None else entries[0] if len(entries) == 1 else None
        if chosen is None:
            there = ", ".join(sorted(name for name in named if name)[:8]) or "none"
            raise ModelNotFoundError(
                f"{self.origin}: no manifest {f'tagged {tag!r}' if tag else 'chosen'} among {len(entries)}; tags there: {there}"
            )
        return Digest.parse(str(chosen.get("digest", ""))), str(chosen.get("mediaType", ""))

    def _open(self, name: str, what: str) -> int:
        try:
            return os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self._fd)
        except FileNotFoundError:
            raise ModelNotFoundError(f"{self.origin}: no {what} there; is it an OCI image layout?") from None
        except OSError as exc:
            raise RegistryUnavailableError(f"{self.origin}: {what}: {exc.strerror}") from exc

    def _read(self, name: str, limit_bytes: int, what: str) -> bytes:
        fd = self._open(name, what)
        with open(fd, "rb") as file:
            data = file.read(limit_bytes + 1)
        if len(data) > limit_bytes:
            raise SizeMismatchError(f"{self.origin}: {what} is larger than {limit_bytes} bytes", expected=limit_bytes)
        return data


class _FileRangeReader:
    """See `RangeReader`."""

    def __init__(self, fd: int, offset: int, origin: str) -> None:
        self._fd, self._offset, self._origin = fd, offset, origin

    def readinto(self, buffer: memoryview) -> None:
        while buffer:
            try:
                count = os.preadv(self._fd, [buffer], self._offset)
            except OSError as exc:
                raise RegistryUnavailableError(f"{self._origin}: {exc.strerror}") from exc
            if count == 0:
                raise RegistryUnavailableError(f"{self._origin}: a blob became shorter while it was read")
            self._offset += count
            buffer = buffer[count:]

    def reject(self) -> None:
        """There is nobody else who could be asked."""

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
