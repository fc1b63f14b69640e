"""One block from the network to where readers find it: hashed, written and marked, or lent in memory.

A block passes through memory in pieces, all through the same half megabyte, which stays in a core's cache: each is received,
hashed and written before the next one comes. So wrong bytes may be on the disk, but never under a mark, and nobody reads what is
not marked.

A reader never waits for the disk. Where a block cannot be written (full, broken, no room in the cache) or writing is
slow, what readers asked for is lent to the worker in memory, and written behind that or not at all; see `csi.cache.ring`.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from csi.cache.blob import BlobWriter, BlockWrite
from csi.cache.ring import LendingRing
from csi.errors import CacheError
from csi.fetcher.counters import Counters
from csi.integrity import index
from csi.integrity.index import BlobHashes, Hasher
from csi.stream import blocks
from csi.stream.ports import RangeReader

log = logging.getLogger(__name__)

_CACHE_REST_S = 5.0
"""How long nothing is written after the cache refused a write."""
_SLOW_WRITE_S, _QUICK_WRITE_S = 0.1, 0.01
"""Seconds for a block, averaged: from the first on the disk may be slow, below the second it is quick again."""
_LATE_WRITE_S = 0.008
"""What writing the first pieces of a block may take before its reader gets the rest through memory."""
_SLOW_PIECE_S, _STUCK_PIECE_S = 0.002, 0.04
"""A piece that takes the first is slow, and two of them are a slow disk; one may be a lost core, unless it takes the second."""


class Outcome(Enum):
    """What became of a block that was received."""

    TAKEN = auto()
    """Readers have it, on disk or in memory; or nobody waits for it, and it could not be kept."""
    DISPLACED = auto()
    """Something else took its place in the cache meanwhile."""
    WRONG = auto()
    """It is not what its hash says."""
    CUT_SHORT = auto()
    """The cache refused a part of it, and what was written before is not in memory any more: the rest of the range was not
    read, and the block has to be asked for again.
    """


@dataclass(frozen=True, slots=True)
class _Lent:
    """A block in memory that is to be written: all of it, or with `write` what comes after its first `written` bytes."""

    blob: int
    block: int
    slot: int
    write: BlockWrite | None = None
    written: int = 0


class _Pace:
    """Whether the pieces of one block show that its reader would wait for the disk, and not for a core: what is received in
    between would take as long then.
    """

    def __init__(self) -> None:
        self._began = time.monotonic()
        self.writing_s = 0.0
        self._slow_pieces, self._longest_s = 0, 0.0

    def observe(self, seconds: float) -> None:
        self.writing_s += seconds
        self._slow_pieces += seconds > _SLOW_PIECE_S
        self._longest_s = max(self._longest_s, seconds)

    @property
    def receiving_s(self) -> float:
        return time.monotonic() - self._began - self.writing_s

    @property
    def is_late(self) -> bool:
        slow = self._slow_pieces > 1 or self._longest_s > _STUCK_PIECE_S
        return slow and self.writing_s > max(_LATE_WRITE_S, 2 * self.receiving_s)


class _Average:
    """Of two of 0 and all that was observed, later of about the last eight: so one large value alone decides little, and the
    four blocks that come at once at the start are enough.
    """

    def __init__(self) -> None:
        self.value, self._count = 0.0, 2

    def observe(self, value: float) -> None:
        self._count = min(self._count + 1, 8)
        self.value += (value - self.value) / self._count


class Intake:
    """Thread-safe: one block is received by one thread. `lock` guards `counters` and what is said of each field here.

    `on_lent` is that of the engine, and `on_written(blob, block)` tells of a block that was written behind its reader.
    """

    def __init__(
        self,
        writers: Sequence[BlobWriter],
        ring: LendingRing | None,
        counters: Counters,
        lock: threading.Condition,
        *,
        on_lent: Callable[[int, int, int], bool],
        on_written: Callable[[int, int], None],
    ) -> None:
        self._writers, self._ring, self._counters, self._lock = writers, ring, counters, lock
        self._on_lent, self._on_written = on_lent, on_written
        self._being_written: set[tuple[int, int]] = set()  # lent, and on its way to the disk; under the lock
        self._behind: queue.SimpleQueue[_Lent | None] = queue.SimpleQueue()
        self._no_writes_until = 0.0
        self._write_time, self._receive_time = _Average(), _Average()  # seconds for a block
        self._disk_is_slow = False
        self.missed_writes = False
        """Something was not written that should be fetched again when there is nothing better to do. Under the lock."""

    @property
    def disk_is_slow(self) -> bool:
        """Readers would wait for it."""
        return self._disk_is_slow

    @property
    def rest_s(self) -> float:
        """How long nothing will be written yet, because the cache refused a write; 0 or less: it is tried."""
        return self._no_writes_until - time.monotonic()

    def write_again(self) -> None:
        """There is room in the cache (again)."""
        self._no_writes_until = 0.0

    def room(self, coming: int) -> int:
        """How many blocks more can be lent to somebody who does not wait for them yet, when `coming` are on their way."""
        return 0 if self._ring is None else max(0, self._ring.free_slots - coming - self._ring.slots // 4)

    def is_being_written(self, blob: int, block: int) -> bool:
        """Lent, and not on the disk yet."""
        return (blob, block) in self._being_written

    def receive(
        self,
        reader: RangeReader,
        blob: int,
        block: int,
        content: memoryview,
        hashes: BlobHashes | None,
        *,
        is_wanted: Callable[[], bool],
    ) -> Outcome:
        """Read the next block of a range by way of `content`, a buffer of its length, and pass it on. Without `hashes` nothing is
        checked here. `is_wanted`: somebody reads, and must not wait for a slow disk; that may change meanwhile.

        Raises: what `reader` raises; then nothing of the block is marked.
        """
        slot = self._ring.take() if self._disk_is_slow and is_wanted() and self._ring is not None else None
        if slot is None or self._ring is None:
            return self._to_disk(reader, blob, block, content, hashes, is_wanted)
        lent = False
        try:
            begun = time.monotonic()
            content = self._ring.content(slot, len(content))
            if not _receive(reader, content, hashes, block):
                return Outcome.WRONG
            self._note_times(None, time.monotonic() - begun, len(content))
            self._lend(blob, block, slot, _Lent(blob, block, slot))
            lent = True
        finally:
            if not lent:
                self._ring.release(slot)
        return Outcome.TAKEN

    def _to_disk(
        self,
        reader: RangeReader,
        blob: int,
        block: int,
        content: memoryview,
        hashes: BlobHashes | None,
        is_wanted: Callable[[], bool],
    ) -> Outcome:
        write, refused = self._begin(blob, block)
        if refused:
            if not _receive(reader, content, hashes, block):
                return Outcome.WRONG
            if self._ring is not None and (slot := self._ring.lend(content)) is not None:
                self._lend(blob, block, slot)
            return Outcome.TAKEN
        check = index.hasher() if hashes is not None else None
        pace = _Pace()
        for start in range(0, len(content), blocks.PIECE_BYTES):
            piece = content[: min(blocks.PIECE_BYTES, len(content) - start)]
            reader.readinto(piece)
            if check is not None:
                check.update(piece)
            if write is None:
                continue
            write_begun = time.monotonic()
            if not self._write_piece(write, start, piece):
                return Outcome.CUT_SHORT
            pace.observe(time.monotonic() - write_begun)
            written = start + len(piece)
            if (
                written < len(content)
                and pace.is_late
                and is_wanted()
                and self._ring is not None
                and (slot := self._ring.take()) is not None
            ):
                self._note_times(pace.writing_s * len(content) / written, None, len(content))
                return self._rest_in_memory(
                    reader, _Lent(blob, block, slot, write, written), len(content), check, hashes
                )
        if check is not None and hashes is not None and not hashes.is_hash(block, check.digest()):
            return Outcome.WRONG
        if write is None:
            return Outcome.DISPLACED
        self._note_times(pace.writing_s, pace.receiving_s, len(content))
        return Outcome.TAKEN if write.commit() else Outcome.DISPLACED

    def _rest_in_memory(
        self, reader: RangeReader, lent: _Lent, length: int, check: Hasher | None, hashes: BlobHashes | None
    ) -> Outcome:
        """The disk turned out slow while a block was written to it: its reader gets it through the slot that we hold."""
        assert self._ring is not None
        assert lent.write is not None
        content, given = self._ring.content(lent.slot, length), False
        try:
            try:
                lent.write.read_back(content[: lent.written])  # still in memory, as it was written just now
            except CacheError as exc:
                self._refused(exc)
                return Outcome.CUT_SHORT
            _read_pieces(reader, content[lent.written :], check)
            if check is not None and hashes is not None and not hashes.is_hash(lent.block, check.digest()):
                return Outcome.WRONG
            self._lend(lent.blob, lent.block, lent.slot, lent)
            given = True
        finally:
            if not given:
                self._ring.release(lent.slot)
        return Outcome.TAKEN

    def write_loop(self) -> None:
        """Write what was lent, until `stop`: for a thread of its own."""
        while (lent := self._behind.get()) is not None:
            is_written = False
            try:
                is_written = self._write_behind(lent)
            except CacheError as exc:
                self._refused(exc)
            finally:
                with self._lock:
                    self._being_written.discard((lent.blob, lent.block))
                    if not is_written:
                        self._counters.unwritten_blocks += 1
                        self.missed_writes = True
                        self._lock.notify_all()
                assert self._ring is not None
                self._ring.release(lent.slot)
            if is_written:
                self._on_written(lent.blob, lent.block)

    def _write_behind(self, lent: _Lent) -> bool:
        """Whether readers find the block on the disk now. Raises: CacheError."""
        assert self._ring is not None
        size = blocks.block_length(self._writers[lent.blob].size_bytes, lent.block)
        write = lent.write or self._writers[lent.blob].begin(lent.block)
        if write is None:
            return False
        begun = time.monotonic()
        write.write(lent.written, self._ring.content(lent.slot, size)[lent.written :])
        self._note_times((time.monotonic() - begun) * size / (size - lent.written), None, size)
        return write.commit()

    def stop(self) -> None:
        """`write_loop` ends once it has written what was lent before."""
        self._behind.put(None)

    def _begin(self, blob: int, block: int) -> tuple[BlockWrite | None, bool]:
        """A write, or None and whether the cache refused it (else another took the block's place)."""
        try:
            if self.rest_s > 0:
                raise CacheError("the cache takes no writes at the moment")
            return self._writers[blob].begin(block), False
        except CacheError as exc:
            self._refused(exc)
            return None, True

    def _write_piece(self, write: BlockWrite, start: int, piece: memoryview) -> bool:
        try:
            write.write(start, piece)
        except CacheError as exc:
            self._refused(exc)
            return False
        return True

    def _lend(self, blob: int, block: int, slot: int, write: _Lent | None = None) -> None:
        """Give a block in a slot that we hold to the worker, and `write` it behind its back if there is time."""
        assert self._ring is not None
        behind = write is not None and self._ring.free_slots > self._ring.slots // 2
        if behind:
            self._ring.hold(slot)
        with self._lock:
            self._counters.lent_blocks += 1
            if behind:
                self._being_written.add((blob, block))
            else:
                self._counters.unwritten_blocks += 1
        if behind:
            self._behind.put(write)
        if not self._on_lent(blob, block, slot):
            self._ring.release(slot)

    def _refused(self, error: CacheError) -> None:
        with self._lock:
            self.missed_writes = True
            now = time.monotonic()
            if now < self._no_writes_until:
                return
            self._no_writes_until = now + _CACHE_REST_S
            self._counters.cache_errors += 1
            self._counters.note_error(error)
        log.warning("%s; blocks go to readers without it for %g s", error, _CACHE_REST_S)

    def _note_times(self, write_s: float | None, receive_s: float | None, size_bytes: int) -> None:
        """Slow is a disk that holds up readers: slower than the network, and not for want of a core, which both feel."""
        if size_bytes < blocks.BLOCK_BYTES:  # says more about the system calls than about the disk
            return
        if receive_s is not None:
            self._receive_time.observe(receive_s)
        if write_s is None:
            return
        self._write_time.observe(write_s)
        written, received = self._write_time.value, self._receive_time.value
        if self._disk_is_slow:
            slow = written > _QUICK_WRITE_S and written > received
        else:
            slow = written > max(_SLOW_WRITE_S, 2 * received)
        if self._disk_is_slow != slow:
            self._disk_is_slow = slow
            log.info(
                "the cache's disk is %s: %.0f ms a block, the network takes %.0f ms",
                "slow" if slow else "quick again",
                written * 1000,
                received * 1000,
            )


def _receive(reader: RangeReader, content: memoryview, hashes: BlobHashes | None, block: int) -> bool:
    """A whole block in memory. Whether it is right, as far as that is known."""
    check = index.hasher() if hashes is not None else None
    _read_pieces(reader, content, check)
    return check is None or hashes is None or hashes.is_hash(block, check.digest())


def _read_pieces(reader: RangeReader, content: memoryview, check: Hasher | None) -> None:
    """Fill `content`, and hash it while it is in a core's cache."""
    for start in range(0, len(content), blocks.PIECE_BYTES):
        piece = content[start : start + blocks.PIECE_BYTES]
        reader.readinto(piece)
        if check is not None:
            check.update(piece)
