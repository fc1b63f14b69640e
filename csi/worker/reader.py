"""Answers reads: from the cache where the blocks are there, else after asking the fetcher for them.

Single-threaded (trio). The fast path, bytes in the page cache, is one preadv into one reused page-aligned buffer;
bytes on disk are read in a thread, because a page fault here would hold up every other reader of the mount.

What the cache's disk does not take comes in memory that the fetcher lends (`csi.cache.ring`), and what it does not give
back is asked for again: a reader never sees an error of the disk.

Messages between worker and fetcher may be lost (a fetcher dies, a socket is full), so nothing depends on one: a
waiting read looks at the shared block map, and asks again, every second.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import trio

from csi.cache.blob import BlobReader
from csi.cache.format import BlobState
from csi.cache.ring import BorrowedBlocks
from csi.errors import CacheError, DigestMismatchError, ModelMountError, RegistryUnavailableError
from csi.fuse.port import DEFAULT_DEADLINE_S
from csi.stream import blocks
from csi.stream.readahead import ReadAhead
from csi.stream.scheduler import Block, Priority
from csi.tree.file_format import Tree
from csi.tree.model import Entry

log = logging.getLogger(__name__)

_BUFFER_BYTES = 1024 * 1024  # to begin with: it grows to the largest request the kernel makes
_LARGEST_READ = 16 * 1024 * 1024
READS_AT_ONCE = 32
"""From the disk, each with a buffer and a thread; the others wait."""
_SPARE_BUFFERS = 8  # kept for reads from the disk: fresh memory costs more than such a read
_ASK_AGAIN_S = 1.0
_TRY_AGAIN_S = 0.05
_ASKED_TWICE_S = 0.25
"""Where an error answers a read-ahead, the kernel asks at once for the reader's own bytes again: that one has waited already."""


class FetcherPort(Protocol):
    """What the reader says to the fetcher. Losing any of it is fine, and nothing blocks."""

    def ask(self, blob: int, first: int, count: int, priority: Priority) -> None:
        """These blocks are wanted."""

    def report_damaged(self, blob: int, block: int) -> None:
        """The block is marked as present, and cannot be read."""

    def give_back(self, slots: list[int]) -> bool:
        """These slots are not ours any more. False: could not be said, say it again with the next ones."""


class CachedReader:
    """Implements `csi.fuse.port.ContentReader`. `fetcher` must not block. `on_failed` is told of every read that ends in an
    error.
    """

    def __init__(
        self,
        tree: Tree,
        area_fd: int,
        fetcher: FetcherPort,
        deadline_s: float = DEFAULT_DEADLINE_S,
        on_failed: Callable[[Entry, ModelMountError], None] = lambda entry, error: None,
        reads_at_once: int = READS_AT_ONCE,
    ) -> None:
        self._tree = tree
        self._area_fd = area_fd
        self._fetcher = fetcher
        self._deadline_s = deadline_s
        self._from_disk = trio.CapacityLimiter(reads_at_once)
        self._on_failed = on_failed
        self._readers: dict[int, BlobReader] = {}
        self._read_ahead: dict[int, ReadAhead] = {}
        self._waiting: dict[Block, list[trio.Event]] = {}
        self._failures: dict[Block, ModelMountError] = {}
        self._last_error = ""  # of the fetcher, since the last block came
        self._given_up: dict[Block, tuple[float, ModelMountError]] = {}
        self._buffer = _aligned(_BUFFER_BYTES)
        self._spare: list[memoryview] = []  # for reads in threads, which take a buffer each
        self._ring: BorrowedBlocks | None = None
        self._lent: dict[Block, int] = {}  # oldest first
        self._read_out: set[Block] = set()  # of those, the ones whose last byte was read
        self._to_give_back: list[int] = []
        self.counters = {"reads": 0, "read_bytes": 0, "waited_reads": 0, "failed_reads": 0, "lent_reads": 0}

    def read_now(self, entry: Entry, offset: int, size: int) -> memoryview | None:
        """See `ContentReader.read_now`."""
        length = min(size, entry.size_bytes - offset, _LARGEST_READ)
        if length <= 0:
            return memoryview(b"")
        start, reader = entry.blob_offset + offset, self._reader(entry.blob)
        if reader is not None and reader.state is BlobState.POISONED:
            return None
        view = self._borrowed(entry.blob, start, length) or self._copy_now(reader, start, length)
        if view is not None:
            self.counters["reads"] += 1
            self.counters["read_bytes"] += length
            self._ask_ahead(entry, offset, length, missed=False)
        return view

    async def read(self, entry: Entry, offset: int, size: int) -> memoryview:
        """See `ContentReader.read`."""
        length = min(size, entry.size_bytes - offset, _LARGEST_READ)
        if length <= 0:
            return memoryview(b"")
        self.counters["reads"] += 1
        start, until = entry.blob_offset + offset, trio.current_time() + self._deadline_s
        try:
            missed = await self._wait_for(entry.blob, start, length, until)
            self._ask_ahead(entry, offset, length, missed)
            view = self._borrowed(entry.blob, start, length) or await self._copy(entry.blob, start, length)
            if view is None:
                view = await self._copy_without_cache(entry.blob, start, length, until)
        except ModelMountError as exc:
            self.note_failed(entry, exc)
            raise
        self.counters["read_bytes"] += length
        return view

    def refuse(self, entry: Entry, offset: int, size: int, error: ModelMountError) -> None:
        """See `ContentReader.refuse`."""
        self.note_failed(entry, error)
        if (length := min(size, entry.size_bytes - offset)) > 0:
            self._give_up(entry.blob, blocks.blocks_of(entry.blob_offset + offset, length), error)

    async def read_stored(self, blob: int, start: int, length: int) -> bytes:
        """Bytes of a blob as the registry stores them. Raises: as `read`."""
        until = trio.current_time() + self._deadline_s
        await self._wait_for(blob, start, length, until)
        view = await self._copy(blob, start, length)
        return bytes(view if view is not None else await self._copy_without_cache(blob, start, length, until))

    def note_failed(self, entry: Entry, error: ModelMountError) -> None:
        """A read of that file ends in an error."""
        self.counters["failed_reads"] += 1
        self._on_failed(entry, error)

    def block_arrived(self, blob: int, block: int) -> None:
        """The fetcher says that the block is there."""
        self._last_error = ""
        if (blob, block) in self._lent:
            self._return_lent((blob, block))
        self._wake((blob, block))

    def block_lent(self, blob: int, block: int, slot: int) -> None:
        """The fetcher says that the block is in that slot of the ring, ours until we give it back."""
        key = (blob, block)
        if self._ring is None or not 0 <= slot < self._ring.slots:
            return
        self._last_error = ""
        if key in self._lent:
            self._return_lent(key)
        self._lent[key] = slot
        self._wake(key)
        while len(self._lent) > self._ring.slots // 2 and self._read_out:
            self._return_lent(next(key for key in self._lent if key in self._read_out))
        while len(self._lent) > self._ring.slots * 3 // 4:
            self._return_lent(next(iter(self._lent)))

    def use_ring(self, ring: BorrowedBlocks) -> None:
        """A (new) fetcher lends from there, or the same one from other memory; nothing that was lent before is lent any more."""
        self._ring = ring
        self._lent.clear()
        self._read_out.clear()
        self._to_give_back.clear()

    def block_failed(self, blob: int, block: int, error: ModelMountError) -> None:
        """The fetcher says that the block will not come."""
        if (blob, block) in self._waiting:
            self._failures[blob, block] = error
            self._wake((blob, block))

    def note_error(self, error: ModelMountError, tries: int) -> None:
        """What the fetcher last complained of, after so many tries: the reason a read gives when its deadline passes."""
        self._last_error = f"{error} (tried {tries} times)" if tries > 1 else str(error)

    def fail_waiting(self, error: ModelMountError) -> None:
        """End every waiting read with `error` (the mount is going away)."""
        for blob, block in list(self._waiting):
            self.block_failed(blob, block, error)

    def _wake(self, key: Block) -> None:
        for event in self._waiting.get(key, ()):
            event.set()

    def _return_lent(self, key: Block) -> None:
        self._to_give_back.append(self._lent.pop(key))
        self._read_out.discard(key)
        self._give_back()

    def _give_back(self) -> None:
        if self._to_give_back and self._fetcher.give_back(self._to_give_back):
            self._to_give_back = []

    def ask_again(self) -> None:
        """A new fetcher is there: tell it what is waited for."""
        for blob, block in list(self._waiting):
            self._fetcher.ask(blob, block, 1, Priority.DEMAND)

    async def _wait_for(self, blob: int, start: int, length: int, until: float) -> bool:
        """Wait until the bytes are there, at most `until`. True when they were not at once."""
        reader = self._reader(blob)
        needed = blocks.blocks_of(start, length)
        if reader is not None and reader.state is not BlobState.POISONED and all(map(reader.has, needed)):
            return False
        self.counters["waited_reads"] += 1
        with trio.move_on_at(until) as scope:
            for block in needed:
                if error := self._gave_up(blob, block):
                    raise error
                await self._wait_for_block(blob, block, needed)
        if scope.cancelled_caught:
            error = self._too_late(blob, start, length)
            self._give_up(blob, needed, error)
            raise error
        return True

    def _give_up(self, blob: int, needed: range, error: ModelMountError) -> None:
        now = trio.current_time()
        self._given_up = {key: seen for key, seen in self._given_up.items() if now - seen[0] < _ASKED_TWICE_S}
        self._given_up |= dict.fromkeys(((blob, block) for block in needed), (now, error))

    def _gave_up(self, blob: int, block: int) -> ModelMountError | None:
        """Why a read of that block has just been given up, unless the block has come meanwhile."""
        at, error = self._given_up.get((blob, block), (0.0, None))
        reader = self._reader(blob)
        if error is None or trio.current_time() - at > _ASKED_TWICE_S or (reader is not None and reader.has(block)):
            return None
        return error

    def _too_late(self, blob: int, start: int, length: int) -> RegistryUnavailableError:
        reason = self._last_error or (
            "the fetcher has no answer from the registry yet and no error either; 'modelmount status' shows whether it runs"
        )
        return RegistryUnavailableError(
            f"blob {self._tree.blobs[blob].digest.short()}: bytes {start} to {start + length} could be had neither from the "
            f"cache nor from the registry within {self._deadline_s:g} s: {reason}"
        )

    async def _wait_for_block(self, blob: int, block: int, needed: range) -> None:
        while True:
            reader = self._reader(blob)
            if reader is not None and reader.state is BlobState.POISONED:
                raise DigestMismatchError(
                    f"blob {self._tree.blobs[blob].digest.short()}: its bytes do not hash to its digest; "
                    "it is not served any more",
                    expected=str(self._tree.blobs[blob].digest),
                )
            if (blob, block) in self._lent or (reader is not None and reader.has(block)):
                return
            with self._waiter(blob, block) as event:
                if (blob, block) not in self._failures:
                    self._give_back()  # what the fetcher believes to be ours it does not fetch for us
                    self._fetcher.ask(blob, block, needed.stop - block, Priority.DEMAND)
                    with trio.move_on_after(_ASK_AGAIN_S):
                        await event.wait()
                if error := self._failures.get((blob, block)):
                    raise error

    @contextmanager
    def _waiter(self, blob: int, block: int) -> Iterator[trio.Event]:
        event = trio.Event()
        events = self._waiting.setdefault((blob, block), [])
        events.append(event)
        try:
            yield event
        finally:
            events.remove(event)
            if not events:
                self._waiting.pop((blob, block), None)
                self._failures.pop((blob, block), None)

    def _ask_ahead(self, entry: Entry, offset: int, length: int, missed: bool) -> None:
        read_ahead = self._read_ahead.get(entry.inode)
        if read_ahead is None:
            read_ahead = self._read_ahead[entry.inode] = ReadAhead(entry.size_bytes)
        if (wanted := read_ahead.observe(offset, length, missed=missed)) is None:
            return
        reader = self._reader(entry.blob)
        ahead = blocks.blocks_of(entry.blob_offset + wanted.start, len(wanted))
        absent = [block for block in ahead if reader is None or not reader.has(block)]
        if absent:
            self._fetcher.ask(entry.blob, absent[0], absent[-1] - absent[0] + 1, Priority.AHEAD)

    def _borrowed(self, blob: int, start: int, length: int) -> memoryview | None:
        """The bytes where they are, in a block that is lent to us: good until the next await, as it may be given back then.
        None when they are not in one such block.
        """
        needed = blocks.blocks_of(start, length)
        slot = self._lent.get((blob, needed.start)) if len(needed) == 1 else None
        if slot is None or self._ring is None:
            return None
        self.counters["lent_reads"] += 1
        at = start - needed.start * blocks.BLOCK_BYTES
        if at + length == blocks.block_length(self._tree.blobs[blob].size_bytes, needed.start):
            self._read_out.add((blob, needed.start))
        return self._ring.content(slot, at, length)

    def _copy_now(self, reader: BlobReader | None, start: int, length: int) -> memoryview | None:
        """As `_copy`, of what is in memory; None also for what is damaged, which is for `_copy` to find."""
        if reader is None:
            return None
        generation = reader.generation
        if not all(map(reader.has, blocks.blocks_of(start, length))):
            return None
        if length > len(self._buffer):
            self._buffer = _aligned(length)
        try:
            view = self._fill(reader, self._buffer, start, length, os.RWF_NOWAIT)
        except (BlockingIOError, CacheError):
            return None
        return view if reader.generation == generation else None

    async def _copy(self, blob: int, start: int, length: int) -> memoryview | None:
        """The bytes, in the shared buffer: no await after they are in it. None when the cache does not have (all of) them
        any more, or never had.
        """
        reader = self._reader(blob)
        if reader is None:
            return None
        generation = reader.generation
        if not all(map(reader.has, blocks.blocks_of(start, length))):
            return None
        if length > len(self._buffer):
            self._buffer = _aligned(length)
        try:
            try:
                view = self._fill(reader, self._buffer, start, length, os.RWF_NOWAIT)
            except BlockingIOError:
                view = await self._fill_in_thread(reader, start, length)
            # A segment's file may have been replaced since we looked at its marks.
            return view if reader.generation == generation else None
        except CacheError as exc:
            log.warning("blob %s: %s; the registry is asked instead", self._tree.blobs[blob].digest.short(), exc)
            reader.forget_segments()
            for block in blocks.blocks_of(start, length):
                if reader.has(block):
                    self._fetcher.report_damaged(blob, block)
            return None

    async def _fill_in_thread(self, reader: BlobReader, start: int, length: int) -> memoryview:
        """As `_fill`, from the disk. The buffer is another read's as soon as that read runs, so this one is answered first, as
        with the shared buffer.
        """
        buffer = self._spare.pop() if self._spare else _aligned(max(length, _BUFFER_BYTES))
        if len(buffer) < length:
            buffer = _aligned(length)
        try:
            return await trio.to_thread.run_sync(self._fill, reader, buffer, start, length, 0, limiter=self._from_disk)
        finally:
            if len(self._spare) < _SPARE_BUFFERS:
                self._spare.append(buffer)

    async def _copy_without_cache(self, blob: int, start: int, length: int, until: float) -> memoryview:
        """Block by block from wherever each is, at most `until`.

        Raises: RegistryUnavailableError, DigestMismatchError.
        """
        self.counters["lent_reads"] += 1
        own = _aligned(length)
        with trio.move_on_at(until):
            for block in blocks.blocks_of(start, length):
                first = max(start, block * blocks.BLOCK_BYTES)
                end = min(start + length, (block + 1) * blocks.BLOCK_BYTES)
                while not await self._copy_one(blob, block, first, own[first - start : end - start], until):
                    await trio.sleep(_TRY_AGAIN_S)  # a damaged block: the fetcher has heard of it
            return own
        raise self._too_late(blob, start, length)

    async def _copy_one(self, blob: int, block: int, first: int, into: memoryview, until: float) -> bool:
        """Bytes of one block from `first` of the blob. False when it was there and is not any more."""
        await self._wait_for(blob, first, len(into), until)
        if (slot := self._lent.get((blob, block))) is not None:
            assert self._ring is not None
            into[:] = self._ring.content(slot, first - block * blocks.BLOCK_BYTES, len(into))
            if (first + len(into)) % blocks.BLOCK_BYTES == 0:
                self._read_out.add((blob, block))
            return True
        view = await self._copy(blob, first, len(into))
        if view is None:
            return False
        into[:] = view
        return True

    @staticmethod
    def _fill(reader: BlobReader, buffer: memoryview, start: int, length: int, flags: int) -> memoryview:
        """A short preadv in mid-file means "not all in memory" with RWF_NOWAIT, and damage without it."""
        done = 0
        while done < length:
            segment_left = blocks.SEGMENT_BYTES - (start + done) % blocks.SEGMENT_BYTES
            want = min(length - done, segment_left)
            try:
                count = reader.read_into([buffer[done : done + want]], start + done, flags)
            except BlockingIOError:
                raise
            except OSError as exc:
                if flags and exc.errno == errno.EOPNOTSUPP:  # a cache file system without RWF_NOWAIT
                    raise BlockingIOError from exc
                raise CacheError(f"cache read failed: {exc.strerror}") from exc
            if count < want and flags:
                raise BlockingIOError
            if count == 0:
                raise CacheError("a cache file is shorter than its blob; unpublish and publish to fetch it again")
            done += count
        return buffer[:length]

    def _reader(self, blob: int) -> BlobReader | None:
        """The blob's cache, None until the fetcher has made it."""
        reader = self._readers.get(blob)
        if reader is None:
            spec = self._tree.blobs[blob]
            try:
                reader = self._readers[blob] = BlobReader.open(self._area_fd, spec.digest, spec.size_bytes)
            except CacheError:
                return None
        return reader


def _aligned(size_bytes: int) -> memoryview:
    """Page-aligned memory of our own: copies into it cost a fraction. Private, as shared memory is slower to come by."""
    return memoryview(mmap.mmap(-1, size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
