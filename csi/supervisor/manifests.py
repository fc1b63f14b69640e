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


@dataclass(frozen=True, slots=True)
class KeptManifest:
    """The very bytes that hash to `digest`, the media type they came with, and what was found out with them: whether a block
    index of the model could be had, and what it builds on.
    """

    digest: Digest
    media_type: str
    data: bytes
    indexed: bool = False
    parent: str | None = None


class KeptManifests:
    """Files below `directory`. Use from one thread. `clock` in seconds since the epoch."""

    def __init__(self, directory: str, life_s: float, clock: Callable[[], float] = time.time) -> None:
        self._directory, self._life_s, self._clock = directory, life_s, clock
        os.makedirs(directory, mode=0o700, exist_ok=True)
        self._drop_old()

    def get(self, domain: str, digest: Digest, variant: str = "") -> KeptManifest | None:
        """The manifest of that digest, if it is here and whole. `variant`: the one that was asked for, if it is an index."""
        try:
            with open(self._path(domain, digest, variant), "rb") as file:
                head, _, data = file.read(MAX_BYTES + 1).partition(b"\n")
            media_type, indexed, parent = json.loads(head)
        except (OSError, ValueError, TypeError):
            return None
        if Digest.of(data, digest.algorithm) != digest:
            log.warning("the kept manifest %s is damaged and counts as not there", digest.short())
            return None
        return KeptManifest(digest, str(media_type), data, bool(indexed), None if parent is None else str(parent))

    def keep(self, domain: str, manifest: KeptManifest, variant: str = "") -> None:
        """From now on for `life_s`. Best effort: without it the registry is asked again."""
        path = self._path(domain, manifest.digest, variant)
        head = json.dumps([manifest.media_type, manifest.indexed, manifest.parent])
        try:
            with open(f"{path}.tmp", "wb") as file:
                file.write(head.encode() + b"\n" + manifest.data)
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

    def _path(self, domain: str, digest: Digest, variant: str) -> str:
        text = json.dumps([domain, str(digest), *([variant] if variant else [])])
        return os.path.join(self._directory, hashlib.sha256(text.encode()).hexdigest())
