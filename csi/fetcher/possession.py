"""Whether a registry really has a model, or only repeats its manifest.

Where all bytes are verified, volumes from different registries share one mount, and its cache outlives them. Somebody who
knows the manifest of a model that is none of his could then put that manifest into a registry of his own and read the
blobs out of this node's cache, or wait there for somebody who has them. So before a volume from a registry shows such a
mount for the first time, that registry has to deliver a block chosen at random. Which ones did is remembered in the
mount's cache area.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import time
from collections.abc import Iterable

from csi.errors import DigestMismatchError, RegistryError
from csi.integrity.index import BlobHashes, BlockIndex
from csi.stream import blocks
from csi.stream.ports import ModelSource

_ORIGINS_FILE = "origins"
_MAX_ORIGINS_BYTES = 1 << 20
_TRIES = 3  # what goes wrong on the way is right the next time
_DELAY_S = 0.3


def known_origins(area_fd: int) -> list[str]:
    """Of the registries that have shown that they have what is cached there. None in an area nobody used yet."""
    try:
        fd = os.open(_ORIGINS_FILE, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=area_fd)
        with open(fd, "rb") as file:
            found = json.loads(file.read(_MAX_ORIGINS_BYTES))
    except (OSError, ValueError):
        return []
    return [origin for origin in found if isinstance(origin, str)] if isinstance(found, list) else []


def remember_origins(area_fd: int, origins: Iterable[str]) -> None:
    """These have shown it too. Where that cannot be kept they show it again at the next start."""
    known = known_origins(area_fd)
    if not (new := [origin for origin in dict.fromkeys(origins) if origin not in known]):
        return
    temporary = f"{_ORIGINS_FILE}.new"
    with contextlib.suppress(OSError):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        with open(os.open(temporary, flags, 0o640, dir_fd=area_fd), "wb") as file:
            file.write(json.dumps([*known, *new]).encode())
        os.rename(temporary, _ORIGINS_FILE, src_dir_fd=area_fd, dst_dir_fd=area_fd)


def prove_possession(source: ModelSource, index: BlockIndex) -> None:
    """Returns when the source has delivered a random block.

    Raises: DigestMismatchError when the block is another one; ModelNotFoundError and the like from the source.
    """
    for tries_left in reversed(range(_TRIES)):
        try:
            _show_block(source, index)
            return
        except (RegistryError, DigestMismatchError) as exc:
            if not tries_left or not (exc.retryable or isinstance(exc, DigestMismatchError)):
                raise
        time.sleep(_DELAY_S)


def _show_block(source: ModelSource, index: BlockIndex) -> None:
    blob, block = choose(list(index.values()), random.SystemRandom())
    if blob is None:
        return
    content = memoryview(bytearray(blocks.block_length(blob.size_bytes, block)))
    reader = source.open_range(blob.digest, blob.size_bytes, block * blocks.BLOCK_BYTES, len(content))
    try:
        reader.readinto(content)
        is_right = blob.is_right(block, content)
        if not is_right:
            reader.reject()
    finally:
        reader.close()
    if not is_right:
        raise DigestMismatchError(
            f"{source.origin}: has the manifest, but another content than it says for blob {blob.digest.short()}; "
            "copy the model there with a tool that copies its blobs too",
            subject=str(blob.digest),
        )


def choose(blobs: list[BlobHashes], random_source: random.Random) -> tuple[BlobHashes | None, int]:
    """Every block of the model is as likely as any other. (None, 0) for a model without a byte."""
    counts = [blocks.block_count(blob.size_bytes) for blob in blobs]
    if not any(counts):
        return None, 0
    chosen = random_source.randrange(sum(counts))
    for blob, count in zip(blobs, counts, strict=True):
        if chosen < count:
            return blob, chosen
        chosen -= count
    raise AssertionError("unreachable")
