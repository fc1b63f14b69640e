"""The file handles a connection has given out and not got back, in the same memory as its request table.

The kernel forbids two ways of reading one inode at a time: while a handle that reads through the page cache of the
mount is open (or mapped), an open that passes through to a file of the cache fails with EIO, and the other way round; and
all that pass through must name the same backing id. So every worker must know what those before it answered, and this is
what they leave behind. Source: linux fs/fuse/iomode.c; measured on Linux 6.18.

    entry 0   how many entries were ever used
    entry n   the `unique` of the OPEN that made the handle (0: free), the inode, the backing id (0: through the page cache)

An entry is written before OPEN is answered, its `unique` last, and cleared before RELEASE is. A worker that dies in between
leaves at most an entry too many: then an inode keeps its way of being read, which is always allowed. An OPEN that is
handled twice, by a worker and its successor, finds its own entry again.
"""

from __future__ import annotations

import heapq
import mmap
from dataclasses import dataclass

ENTRY_BYTES = 32
ENTRIES = 1 << 18
"""Handles that may be open at once; it costs no memory until they are."""
TABLE_BYTES = ENTRIES * ENTRY_BYTES
_WORDS = ENTRY_BYTES // 8
_FREE = 0
_INDEX_BITS = 20


@dataclass(frozen=True, slots=True)
class Handle:
    """`fh` is what the kernel knows it by. `backing_id` 0: through the page cache of the mount."""

    fh: int
    backing_id: int


class HandleTable:
    """One worker at a time."""

    def __init__(self, fd: int, offset: int) -> None:
        """Map the table at `offset` of the file and take over what is in it."""
        self._words = memoryview(mmap.mmap(fd, TABLE_BYTES, mmap.MAP_SHARED, offset=offset)).cast("Q")
        self._used = min(int(self._words[0]), ENTRIES - 1)
        self._free: list[int] = []
        self._of_inode: dict[int, set[int]] = {}
        self._of_unique: dict[int, int] = {}
        for entry in range(1, self._used + 1):
            unique, inode = self._words[entry * _WORDS], self._words[entry * _WORDS + 1]
            if unique == _FREE:
                self._free.append(entry)
            else:
                self._of_inode.setdefault(inode, set()).add(entry)
                self._of_unique[unique] = entry

    def of_inode(self, inode: int) -> list[int]:
        """The backing ids of an inode's handles, 0 for one through the page cache."""
        return [self._words[entry * _WORDS + 2] for entry in self._of_inode.get(inode, ())]

    def has(self, backing_id: int) -> bool:
        """Whether some handle is of that backing id."""
        return any(self._words[entry * _WORDS + 2] == backing_id for entry in self._of_unique.values())

    def of_open(self, unique: int) -> Handle | None:
        """What that OPEN was answered, or was to be."""
        entry = self._of_unique.get(unique)
        return None if entry is None else self._handle(entry)

    def add(self, unique: int, inode: int, backing_id: int) -> Handle | None:
        """Before OPEN is answered. None when there are as many handles as there may be."""
        if self._free:
            entry = heapq.heappop(self._free)
        elif self._used + 1 < ENTRIES:
            entry = self._used = self._used + 1
            self._words[0] = entry
        else:
            return None
        at = entry * _WORDS
        self._words[at + 1], self._words[at + 2] = inode, backing_id
        self._words[at] = unique
        self._of_inode.setdefault(inode, set()).add(entry)
        self._of_unique[unique] = entry
        return self._handle(entry)

    def remove(self, fh: int, inode: int) -> None:
        """Before RELEASE is answered. A handle that is not here (any more) is ignored."""
        entry = fh & ((1 << _INDEX_BITS) - 1)
        if not 0 < entry <= self._used:
            return
        at = entry * _WORDS
        unique = self._words[at]
        if unique == _FREE or self._words[at + 1] != inode or self._handle(entry).fh != fh:
            return
        self._words[at] = _FREE
        heapq.heappush(self._free, entry)
        del self._of_unique[unique]
        entries = self._of_inode[inode]
        entries.discard(entry)
        if not entries:
            del self._of_inode[inode]

    def _handle(self, entry: int) -> Handle:
        unique = self._words[entry * _WORDS]
        return Handle(unique << _INDEX_BITS & (1 << 64) - 1 | entry, self._words[entry * _WORDS + 2])
