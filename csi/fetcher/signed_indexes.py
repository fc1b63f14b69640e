"""Block indexes that others attached to a model: found among its referrers, and taken only with the signature of a key that
this node accepts. Imported only by fetchers of nodes that accept one: the library behind it costs memory.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from csi.errors import ContentError, InvalidVolumeError, RegistryAuthError, RegistryError
from csi.integrity import signed_index
from csi.integrity.index import MAX_INDEX_BYTES
from csi.integrity.signed_index import PublicKey
from csi.oci.descriptor import Descriptor
from csi.oci.digest import Digest
from csi.oci.manifest import Manifest, parse_referrer
from csi.stream.ports import ModelSource

log = logging.getLogger(__name__)

_TIMEOUT_S = 20.0
_SIGNATURE_FILE = "index-signature"
_MAX_FILE_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class Endorsed:
    """An index that an accepted key has signed for the model."""

    index: Descriptor
    envelope: bytes
    key_id: str


@dataclass(frozen=True, slots=True)
class Search:
    """What was found, and why what was found besides is not used; empty where there was nothing."""

    endorsed: Endorsed | None
    ignored: str = ""


class SignedIndexes:
    """Thread-safe. `keys` are accepted."""

    def __init__(self, keys: Sequence[PublicKey]) -> None:
        self._keys = tuple(keys)

    @classmethod
    def from_paths(cls, paths: Sequence[str]) -> SignedIndexes:
        """Public keys in PEM, of files, and of the files in directories. One that is none is left out, and said so: the
        others may be good.
        """
        keys = []
        for path in paths:
            for file in sorted(Path(path).glob("[!.]*")) if os.path.isdir(path) else [Path(path)]:
                try:
                    keys.append(signed_index.public_key(file.read_bytes()))
                except (OSError, InvalidVolumeError) as exc:
                    log.error("--index-key %s: %s", file, exc)
        return cls(keys)

    def find(self, source: ModelSource, model: Digest) -> Search:
        """Among the model's referrers. Raises: RegistryUnavailableError; then nobody knows."""
        try:
            candidates = source.referrers(model, signed_index.ARTIFACT_TYPE, _TIMEOUT_S)
        except (RegistryAuthError, ContentError) as exc:
            return Search(None, f"the referrers of the model cannot be listed: {exc}")
        ignored: list[str] = []
        for digest in candidates:
            try:
                if (endorsed := self._checked(source, model, digest)) is not None:
                    return Search(endorsed)
            except (ContentError, RegistryError) as exc:
                if exc.retryable:
                    raise
                ignored.append(f"block index {digest.short()} is not used: {exc}")
        return Search(None, "; ".join(ignored[:3]))

    def kept(self, area_fd: int, model: Digest) -> Endorsed | None:
        """What `keep` left in the mount's area, if an accepted key has signed it (still)."""
        try:
            fd = os.open(_SIGNATURE_FILE, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=area_fd)
            with open(fd, "rb") as file:
                found = json.loads(file.read(_MAX_FILE_BYTES))
            index = Descriptor(signed_index.INDEX_TYPE, Digest.parse(found["index"]), int(found["size_bytes"]))
            envelope = str(found["envelope"]).encode()
            if not 0 <= index.size_bytes <= MAX_INDEX_BYTES:
                return None
            return Endorsed(index, envelope, signed_index.verify(envelope, model, index.digest, self._keys))
        except (OSError, ValueError, KeyError, TypeError, ContentError, InvalidVolumeError):
            return None

    def keep(self, area_fd: int, endorsed: Endorsed) -> None:
        """So that the mount comes back without the registry."""
        content = {
            "index": str(endorsed.index.digest),
            "size_bytes": endorsed.index.size_bytes,
            "envelope": endorsed.envelope.decode(),
        }
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        with contextlib.suppress(OSError), open(os.open(_SIGNATURE_FILE, flags, 0o640, dir_fd=area_fd), "wb") as file:
            file.write(json.dumps(content).encode())

    def _checked(self, source: ModelSource, model: Digest, digest: Digest) -> Endorsed | None:
        """None for a referrer of another kind. Raises: UnsupportedModelError for one that does not count."""
        referrer = source.fetch_manifest(None, digest, _TIMEOUT_S)
        parsed = parse_referrer(referrer.data, referrer.media_type)
        if not isinstance(parsed, Manifest) or parsed.artifact_type != signed_index.ARTIFACT_TYPE:
            return None
        index, envelope = signed_index.layers_of(parsed, model)
        data = bytearray(envelope.size_bytes)
        reader = source.open_range(envelope.digest, envelope.size_bytes, 0, envelope.size_bytes)
        try:
            reader.readinto(memoryview(data))
        finally:
            reader.close()
        # Not hashed against the descriptor: the signature says more.
        return Endorsed(index, bytes(data), signed_index.verify(bytes(data), model, index.digest, self._keys))
