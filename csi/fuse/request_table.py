"""The requests a worker has taken and not answered yet, in memory that outlives the worker.

A request read from /dev/fuse is gone from the kernel's queue; if its reader dies, nobody answers it, unless the
kernel is asked to give it out again (RESEND, Linux 6.9). So a worker reads each request straight into a slot of
this table, a memfd that the keeper made with the connection, and frees the slot after the reply. Whoever serves
next finds in it exactly what is still owed. Reading elsewhere first and recording then would lose those that a
kill catches in between (0.8 % of kills, measured); straight into the slot loses none.

    header   magic, version, slot size, number of slots, the slot on trial (+1; 0: none)
    slot     the request as the kernel wrote it (its first word is its length, never 0: occupied), cut after
             its first 480 bytes, which holds all of every request we answer with more than ENOSYS;
             then two counters: how many workers died owing it, and how many of them while it was on trial; then since when
             it is owed by workers that are gone, and which request that is about
    handles  what was opened and is not closed yet, see `csi.fuse.handle_table`

A second reply to a request is harmless: the kernel numbers requests once and answers ENOENT to a number it does not
wait for. A table of another connection would not be, as numbers begin anew there: one table per connection.

Trials: a request that kills its worker would kill the next one too. What two workers died owing is suspect; the
next worker handles suspects one at a time, says which is on trial, and one that three workers died over is
convicted and answered with EIO. One that waits for the network is let go after a moment: it waits, it does not kill.
One that kills later than that moment is found by the clock: what one worker after the other has left is refused when it
has been so for as long as a read may wait.

Nothing here trusts the content: it was written by a process that died. Two views: `RequestTable` maps it (the
worker); `pending` and `answer_all` read it with pread (the supervisor, when there is no worker at all).
"""

from __future__ import annotations

import fcntl
import heapq
import mmap
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass

from csi.errors import MountError
from csi.fuse import handle_table, wire

VERSION = 2
SLOTS = 8192
"""Requests that may be owed at once; when all are taken, the rest stays in the kernel's queue."""
SLOT_BYTES = 512
REQUEST_BYTES = 480
SUSPECT_AFTER = 2
"""Workers that died owing a request before it is handled alone."""
CONVICTED_AFTER = 3
"""Workers that died over it, one after the other, while it was alone."""

_MAGIC = b"MMREQTAB"
_HEADER = struct.Struct("<8sHHII")
_TRIAL_OFFSET = 16
_HEADER_BYTES = 4096
_COUNTERS = struct.Struct("<II")  # tries, deaths on trial
_LEFT = struct.Struct("<QQ")  # unique, monotonic clock in ns: of no other request, whoever cleared the slot
_LEFT_OFFSET = REQUEST_BYTES + _COUNTERS.size
_WORD = struct.Struct("<I")
HANDLES_OFFSET = _HEADER_BYTES + SLOTS * SLOT_BYTES
_FILE_BYTES = HANDLES_OFFSET + handle_table.TABLE_BYTES


@dataclass(frozen=True, slots=True)
class Taken:
    """A request somebody took. `tries`: workers that died owing it; `convicted`: it killed them."""

    slot: int
    opcode: int
    unique: int
    nodeid: int
    tries: int
    convicted: bool


def create() -> int:
    """The memfd of an empty table, of fixed size. Costs no memory until slots are used."""
    fd = os.memfd_create("modelmount-requests", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, _FILE_BYTES)
    os.pwrite(fd, _HEADER.pack(_MAGIC, VERSION, SLOT_BYTES, SLOTS, 0), 0)
    # A worker that shrank it would take whoever maps it down with SIGBUS.
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


class RequestTable:
    """A worker's view. One worker at a time."""

    def __init__(self, fd: int) -> None:
        """Map the table and take over what is in it. `fd` may be closed afterwards. Raises: MountError."""
        _check(os.pread(fd, _HEADER.size, 0), os.fstat(fd).st_size)
        self._map = mmap.mmap(fd, HANDLES_OFFSET, mmap.MAP_SHARED)
        self._view = memoryview(self._map)
        self._touched = 0
        self._recycled: list[int] = []
        self.left_behind = [slot for slot in range(SLOTS) if self._length(slot)]
        """What earlier workers took and did not answer, oldest slot first."""
        occupied = set(self.left_behind)
        highest = self.left_behind[-1] + 1 if occupied else 0
        self._touch(highest)
        self._recycled = [slot for slot in range(highest) if slot not in occupied]
        for slot in self.left_behind:
            tries, deaths = self._counters(slot)
            self._set_counters(slot, min(tries + 1, 1 << 30), deaths)
            self._note_left(slot)
        self._settle_trial()

    def acquire(self) -> int | None:
        """A free slot, the lowest there is, in memory that is there: a page fault inside the kernel's copy that a
        kill interrupts would cost the request. None when all are taken.
        """
        if self._recycled:
            return heapq.heappop(self._recycled)
        if self._touched == SLOTS:
            return None
        slot = self._touched
        self._touch(slot + 1)
        return slot

    def room(self, slot: int) -> memoryview:
        """Where the kernel writes the request."""
        start = _HEADER_BYTES + slot * SLOT_BYTES
        return self._view[start : start + REQUEST_BYTES]

    def release(self, slot: int) -> None:
        """The request is answered (or none came): the slot is free."""
        start = _HEADER_BYTES + slot * SLOT_BYTES
        _WORD.pack_into(self._view, start, 0)
        self._set_counters(slot, 0, 0)
        heapq.heappush(self._recycled, slot)

    def left_s(self, slot: int) -> float:
        """For how long a request that was left behind is owed by workers that are gone: 0.0 when the last one was the first."""
        return (time.monotonic_ns() - int(_LEFT.unpack_from(self._view, self._left_offset(slot))[1])) / 1e9

    def is_suspect(self, slot: int) -> bool:
        """Whether it is handled alone."""
        return self._counters(slot)[0] >= SUSPECT_AFTER

    def is_convicted(self, slot: int) -> bool:
        """Whether it is not handled any more."""
        return self._counters(slot)[1] >= CONVICTED_AFTER

    def begin_trial(self, slot: int) -> None:
        """From now on a death is this request's."""
        _WORD.pack_into(self._view, _TRIAL_OFFSET, slot + 1)

    def end_trial(self, slot: int) -> None:
        """It was answered, or it waits: neither kills."""
        _WORD.pack_into(self._view, _TRIAL_OFFSET, 0)
        tries, _ = self._counters(slot)
        self._set_counters(slot, tries, 0)

    def _settle_trial(self) -> None:
        slot = _WORD.unpack_from(self._view, _TRIAL_OFFSET)[0] - 1
        _WORD.pack_into(self._view, _TRIAL_OFFSET, 0)
        if 0 <= slot < SLOTS and self._length(slot):
            tries, deaths = self._counters(slot)
            self._set_counters(slot, tries, min(deaths + 1, CONVICTED_AFTER))

    def _note_left(self, slot: int) -> None:
        unique = wire.IN_HEADER.unpack_from(self.room(slot))[2]
        if _LEFT.unpack_from(self._view, self._left_offset(slot))[0] != unique:
            _LEFT.pack_into(self._view, self._left_offset(slot), unique, time.monotonic_ns())

    @staticmethod
    def _left_offset(slot: int) -> int:
        return _HEADER_BYTES + slot * SLOT_BYTES + _LEFT_OFFSET

    def _touch(self, end: int) -> None:
        """Write to every page up to slot `end`, without changing anything."""
        for slot in range(self._touched, end):
            start = _HEADER_BYTES + slot * SLOT_BYTES
            self._view[start] = self._view[start]
        self._touched = max(self._touched, end)

    def _length(self, slot: int) -> int:
        return int(_WORD.unpack_from(self._view, _HEADER_BYTES + slot * SLOT_BYTES)[0])

    def _counters(self, slot: int) -> tuple[int, int]:
        tries, deaths = _COUNTERS.unpack_from(self._view, _HEADER_BYTES + slot * SLOT_BYTES + REQUEST_BYTES)
        return tries, deaths

    def _set_counters(self, slot: int, tries: int, deaths: int) -> None:
        _COUNTERS.pack_into(self._view, _HEADER_BYTES + slot * SLOT_BYTES + REQUEST_BYTES, tries, deaths)


def pending(table_fd: int) -> list[Taken]:
    """What is owed, without mapping the table. Raises: MountError when it is not one of ours."""
    return [taken for taken, _ in _slots(table_fd) if taken.opcode not in wire.UNANSWERED]


def answer_all(table_fd: int, fuse_fd: int, error: int) -> int:
    """Answer everything that is owed with an errno and empty the table; returns how many that were.

    Only while no worker serves the connection: when none can be started, an error is better than a reader that waits
    for ever. Raises: MountError; OSError when the connection has ended.
    """
    answered = 0
    for taken, offset in _slots(table_fd):
        if taken.opcode not in wire.UNANSWERED:
            try:
                os.write(fuse_fd, wire.reply_header(taken.unique, 0, error))
                answered += 1
            except FileNotFoundError:
                pass  # answered before, or its process was killed
        os.pwrite(table_fd, bytes(SLOT_BYTES), offset)
    return answered


def _slots(table_fd: int) -> Iterator[tuple[Taken, int]]:
    header = os.pread(table_fd, _HEADER.size, 0)
    _check(header, os.fstat(table_fd).st_size)
    trial = _HEADER.unpack(header)[4] - 1
    content = os.pread(table_fd, SLOTS * SLOT_BYTES, _HEADER_BYTES)
    for slot in range(SLOTS):
        length, opcode, unique, nodeid, *_ = wire.IN_HEADER.unpack_from(content, slot * SLOT_BYTES)
        if length:
            tries, deaths = _COUNTERS.unpack_from(content, slot * SLOT_BYTES + REQUEST_BYTES)
            convicted = deaths + (slot == trial) >= CONVICTED_AFTER
            yield Taken(slot, opcode, unique, nodeid, tries, convicted), _HEADER_BYTES + slot * SLOT_BYTES


def _check(header: bytes, size: int) -> None:
    if len(header) == _HEADER.size:
        magic, version, slot_bytes, slots, _ = _HEADER.unpack(header)
        layout = (magic, version, slot_bytes, slots, size)
        if layout == (_MAGIC, VERSION, SLOT_BYTES, SLOTS, _FILE_BYTES):
            return
    raise MountError(f"not a request table of version {VERSION}; was the mount made by another version?")
