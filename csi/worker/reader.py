"""Answers reads: from the cache where the blocks are there, else after asking the fetcher for them.

Single-threaded (trio). The fast path, bytes in the page cache, is one preadv into one reused page-aligned buffer;
bytes on disk are read in a thread, because a page fault here would hold up every other reader of the mount.

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

import trio

from csi.cache.blob import BlobReader
from csi.cache.format import BlobState
from csi.errors import CacheError, DigestMismatchError, ModelMountError, RegistryUnavailableError
from csi.stream import blocks
from csi.stream.readahead import ReadAhead
from csi.stream.scheduler import Block, Priority
from csi.tree.file_format import Tree
from csi.tree.model import Entry

log = logging.getLogger(__name__)

_BUFFER_BYTES = 1024 * 1024  # to begin with: it grows to the largest request the kernel makes
_LARGEST_READ = 16 * 1024 * 1024
_ASK_AGAIN_S = 1.0
DEFAULT_DEADLINE_S = 120.0
"""How long a read waits for its bytes, through every retry. A failed page fault kills the reader, so: long."""


class CachedReader:
    """Implements `csi.fuse.port.ContentReader`. `ask(blob, first, count, priority)` must not block."""

    def __init__(
        self,
        tree: Tree,
        area_fd: int,
        ask: Callable[[int, int, int, Priority], None],
        deadline_s: float = DEFAULT_DEADLINE_S,
    ) -> None:
        self._tree = tree
        self._area_fd = area_fd
        self._ask = ask
        self._deadline_s = deadline_s
        self._readers: dict[int, BlobReader] = {}
        self._read_ahead: dict[int, ReadAhead] = {}
        self._waiting: dict[Block, list[trio.Event]] = {}
        self._failures: dict[Block, ModelMountError] = {}
        self._last_error: ModelMountError | None = None
        self._buffer = memoryview(mmap.mmap(-1, _BUFFER_BYTES))
        self.counters = {"reads": 0, "read_bytes": 0, "waited_reads": 0, "failed_reads": 0}

    async def read(self, entry: Entry, offset: int, size: int) -> memoryview:
        """See `ContentReader.read`."""
        length = min(size, entry.size_bytes - offset, _LARGEST_READ)
        if length <= 0:
            return memoryview(b"")
        self.counters["reads"] += 1
        start = entry.blob_offset + offset
        try:
            missed = await self._wait_for(entry.blob, start, length)
            self._ask_ahead(entry, offset, length, missed)
            view = await self._copy(entry.blob, start, length)
        except ModelMountError:
            self.counters["failed_reads"] += 1
            raise
        self.counters["read_bytes"] += length
        return view

    def block_arrived(self, blob: int, block: int) -> None:
        """The fetcher says that the block is there."""
        for event in self._waiting.get((blob, block), ()):
            event.set()

    def block_failed(self, blob: int, block: int, error: ModelMountError) -> None:
        """The fetcher says that the block will not come."""
        if (blob, block) in self._waiting:
            self._failures[blob, block] = error
            self.block_arrived(blob, block)

    def note_error(self, error: ModelMountError) -> None:
        """What the fetcher last complained of: the reason a read gives when its deadline passes."""
        self._last_error = error

    def fail_waiting(self, error: ModelMountError) -> None:
        """End every waiting read with `error` (the mount is going away)."""
        for blob, block in list(self._waiting):
            self.block_failed(blob, block, error)

    def ask_again(self) -> None:
        """A new fetcher is there: tell it what is waited for."""
        for blob, block in list(self._waiting):
            self._ask(blob, block, 1, Priority.DEMAND)

    async def _wait_for(self, blob: int, start: int, length: int) -> bool:
        """Wait until the bytes are there. True when they were not at once."""
        reader = self._reader(blob)
        needed = blocks.blocks_of(start, length)
        if reader is not None and reader.state is not BlobState.POISONED and all(map(reader.has, needed)):
            return False
        self.counters["waited_reads"] += 1
        with trio.move_on_after(self._deadline_s) as scope:
            for block in needed:
                await self._wait_for_block(blob, block, needed)
        if scope.cancelled_caught:
            reason = f": {self._last_error}" if self._last_error else "; the fetcher gave no reason"
            raise RegistryUnavailableError(
                f"blob {self._tree.blobs[blob].digest.short()}: bytes {start} to {start + length} did not come within "
                f"{self._deadline_s:g} s{reason}"
            )
        return True

    async def _wait_for_block(self, blob: int, block: int, needed: range) -> None:
        while True:
            reader = self._reader(blob)
            if reader is not None and reader.state is BlobState.POISONED:
                raise DigestMismatchError(
                    f"blob {self._tree.blobs[blob].digest.short()}: its bytes do not hash to its digest; "
                    "it is not served any more",
                    expected=str(self._tree.blobs[blob].digest),
                )
            if reader is not None and reader.has(block):
                return
            with self._waiter(blob, block) as event:
                if (blob, block) not in self._failures:
                    self._ask(blob, block, needed.stop - block, Priority.DEMAND)
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
            self._ask(entry.blob, absent[0], absent[-1] - absent[0] + 1, Priority.AHEAD)

    async def _copy(self, blob: int, start: int, length: int) -> memoryview:
        """The bytes, in the shared buffer: no await after they are in it."""
        reader = self._reader(blob)
        if reader is None:
            raise CacheError(f"blob {self._tree.blobs[blob].digest.short()} vanished from the cache")
        if length > len(self._buffer):
            self._buffer = memoryview(mmap.mmap(-1, length))
        try:
            return self._fill(reader, self._buffer, start, length, os.RWF_NOWAIT)
        except BlockingIOError:
            own = memoryview(mmap.mmap(-1, length))
            return await trio.to_thread.run_sync(self._fill, reader, own, start, length, 0)

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
                raise CacheError("a cache segment is shorter than its blob; unpublish and publish to fetch it again")
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
