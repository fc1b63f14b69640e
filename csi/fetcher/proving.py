"""Checks of what is on the disk already: blocks that an earlier process left, against their hashes, and whole blobs
against their digest.
"""

from __future__ import annotations

import logging
import mmap
import threading
from collections.abc import Callable, Sequence
from enum import Enum, auto

from csi.cache.blob import BlobWriter
from csi.cache.format import BlobState
from csi.errors import CacheError
from csi.integrity.index import BlobHashes, hash_of
from csi.stream import blocks
from csi.tree.model import BlobSpec

log = logging.getLogger(__name__)


class Found(Enum):
    """What was found where a block should be."""

    NOTHING = auto()
    """Nothing to check, or another file took the place of what was read."""
    RIGHT = auto()
    """It is marked now."""
    DAMAGED = auto()
    """It is still to be dropped."""


def look_at_kept(writer: BlobWriter, hashes: BlobHashes | None, block: int, buffer: memoryview) -> Found:
    """Check a block that was there when the writer began. `buffer` holds a block."""
    if hashes is None or not writer.is_kept(block):
        return Found.NOTHING
    content = buffer[: blocks.block_length(writer.size_bytes, block)]
    generation = writer.generation
    try:
        read_stored(writer, block, content)
        right = hashes.is_right(block, content)
    except (OSError, CacheError):
        right = False
    if writer.generation != generation or (right and not writer.mark_checked(block, generation)):
        return Found.NOTHING
    return Found.RIGHT if right else Found.DAMAGED


def read_stored(writer: BlobWriter, block: int, view: memoryview) -> None:
    """The whole block. Raises: CacheError, OSError."""
    offset = block * blocks.BLOCK_BYTES
    while view:
        count = writer.read_into([view], offset)
        if count == 0:
            raise CacheError("a cache file is shorter than its blob")
        view, offset = view[count:], offset + count


def block_buffer() -> memoryview:
    """Page-aligned and to be reused: fresh memory and unaligned copies each cost more than the network does."""
    return memoryview(mmap.mmap(-1, blocks.BLOCK_BYTES))


class DigestCheck:
    """Checks each blob that has no hashes of its blocks once it is complete: reads its blocks in order, as they come and while
    they are in the page cache.

    `stand_back` is called under `lock` before each block and may wait on it, `on_right(blob, hashes)` and `on_wrong(blob, hex)`
    say what was found: with the first come the hashes of the blob's blocks, which are known to be right from then on.
    `on_damaged(blob, block)` says that a marked block cannot be read. `hashes[i]` may be filled in meanwhile: then somebody
    else has proven that blob.
    """

    def __init__(
        self,
        specs: Sequence[BlobSpec],
        writers: Sequence[BlobWriter],
        hashes: Sequence[BlobHashes | None],
        lock: threading.Condition,
        *,
        is_stopping: Callable[[], bool],
        stand_back: Callable[[], None],
        on_right: Callable[[int, bytes], None],
        on_damaged: Callable[[int, int], None],
        on_wrong: Callable[[int, str], None],
    ) -> None:
        self._specs, self._writers, self._hashes, self._lock = specs, writers, hashes, lock
        self._is_stopping, self._stand_back = is_stopping, stand_back
        self._on_right, self._on_damaged, self._on_wrong = on_right, on_damaged, on_wrong

    def run(self) -> None:
        """Until every blob is checked or `is_stopping`: for a thread of its own."""
        buffer = block_buffer()
        for blob in range(len(self._specs)):
            while self._hashes[blob] is None and self._writers[blob].state is BlobState.FILLING:
                if not self._check(blob, buffer):
                    return

    def _check(self, blob: int, buffer: memoryview) -> bool:
        """One pass over a blob; False to stop. After a pass in which a file of it was replaced, its state is what it was."""
        spec, writer = self._specs[blob], self._writers[blob]
        hasher, generation, drops = spec.digest.hasher(), writer.generation, writer.drops
        hashes = bytearray()
        for block in range(writer.block_count):
            with self._lock:
                while not writer.has(block) and not self._is_stopping() and self._hashes[blob] is None:
                    self._lock.wait()
                if self._is_stopping():
                    return False
                if self._hashes[blob] is not None:
                    return True
                self._stand_back()
            view = buffer[: blocks.block_length(spec.size_bytes, block)]
            try:
                read_stored(writer, block, view)
            except (OSError, CacheError):
                self._on_damaged(blob, block)
                return True
            hasher.update(view)
            hashes += hash_of(view)
        if writer.generation != generation:
            return True
        if hasher.hexdigest() == spec.digest.hex:
            self._on_right(blob, bytes(hashes))
            if writer.drops != drops:  # what was fetched again after it was read here was checked by nobody
                writer.recheck()
            try:
                writer.mark_verified(generation, bytes(hashes))
            except CacheError as exc:
                log.warning("blob %s is right, but cannot be kept: %s", spec.digest.short(), exc)
        elif writer.drops == drops:  # else a block may have been read while it was written again
            writer.poison()
            self._on_wrong(blob, hasher.hexdigest())
        return True
