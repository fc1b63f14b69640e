"""Manifests kept on the node, by trust domain and digest: what a digest names never changes, so a model that was here needs
no registry to be mounted again. Whether a caller may have it is the access records' business, not ours.

A manifest that no access record can stand for any more is of no use, so files are dropped `life_s` after they were last kept.
Nothing is parsed here; what is read is hashed, and anything else than the bytes of that digest counts as not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from csi.oci.digest import Digest

log = logging.getLogger(__name__)

MAX_BYTES = 5 * 1024 * 1024  # a manifest has 4 MiB at most, and its media type stands before it
_INDEXED = b"indexed"


@dataclass(frozen=True, slots=True)
class KeptManifest:
    """The very bytes that hash to `digest`, and the media type they came with. `indexed`: its block index could be had."""

    digest: Digest
    media_type: str
    data: bytes
    indexed: bool = False


class KeptManifests:
    """Files below `directory`. Use from one thread. `clock` in seconds since the epoch."""

    def __init__(self, directory: str, life_s: float, clock: Callable[[], float] = time.time) -> None:
        self._directory, self._life_s, self._clock = directory, life_s, clock
        os.makedirs(directory, mode=0o700, exist_ok=True)
        self._drop_old()

    def get(self, domain: str, digest: Digest) -> KeptManifest | None:
        """The manifest of that digest, if it is here and whole."""
        try:
            with open(self._path(domain, digest), "rb") as file:
                head, _, data = file.read(MAX_BYTES + 1).partition(b"\n")
        except OSError:
            return None
        if Digest.of(data, digest.algorithm) != digest:
            log.warning("the kept manifest %s is damaged and counts as not there", digest.short())
            return None
        media_type, _, indexed = head.partition(b"\t")
        return KeptManifest(digest, media_type.decode("ascii", "replace"), data, indexed == _INDEXED)

    def keep(self, domain: str, manifest: KeptManifest) -> None:
        """From now on for `life_s`. Best effort: without it the registry is asked again."""
        if {"\n", "\t"} & set(manifest.media_type) or not manifest.media_type.isascii():
            return
        path = self._path(domain, manifest.digest)
        try:
            with open(f"{path}.tmp", "wb") as file:
                indexed = b"\t" + _INDEXED if manifest.indexed else b""
                file.write(manifest.media_type.encode() + indexed + b"\n" + manifest.data)
            os.utime(f"{path}.tmp", (self._clock(), self._clock()))
            os.replace(f"{path}.tmp", path)
        except OSError as exc:
            log.warning("manifest %s cannot be kept: %s", manifest.digest.short(), exc)
        self._drop_old()

    def _drop_old(self) -> None:
        with contextlib.suppress(OSError):
            for entry in os.scandir(self._directory):
                if self._clock() - entry.stat().st_mtime > self._life_s:
                    os.unlink(entry.path)

    def _path(self, domain: str, digest: Digest) -> str:
        text = json.dumps([domain, str(digest)])
        return os.path.join(self._directory, hashlib.sha256(text.encode()).hexdigest())
