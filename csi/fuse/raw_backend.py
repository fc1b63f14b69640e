"""Serving a kept connection with our own small FUSE server: non-blocking, restartable without RESEND.

    receive   one readv per request, straight into a slot of the request table; several per wake-up
    handle    everything but a read that waits is answered at once; that one is a task of its own
    reply     one writev, from the reader's buffer without a copy; then the slot is free

What a dead worker had taken is in the table, so this one answers it first. Reads that wait do not hold that up.

A file whose bytes the kernel may read from the cache itself is opened so (`csi.fuse.backings`); what is open is in the handle
table, for whoever serves next.

INTERRUPT is taken and nothing is done about it: only reads ever wait here, and any signal of a reader interrupts
them (a timer, a language run-time's preemption), not only one that kills. An error in reply would mark the page as
failed, and in a memory mapping that is SIGBUS. A reader that is killed goes without our doing.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import mmap
import os
import time
from collections.abc import Callable

import trio

from csi.errors import ModelMountError
from csi.fuse import wire
from csi.fuse.backings import THROUGH_US, Backings, way_of
from csi.fuse.errno_map import read_errno
from csi.fuse.handle_table import HandleTable
from csi.fuse.port import (
    DEFAULT_DEADLINE_S,
    IO_BYTES,
    STABLE_TIMEOUT_S,
    Connection,
    ContentReader,
    Namespace,
    NoSuchEntryError,
    mode_of,
)
from csi.fuse.request_table import HANDLES_OFFSET, RequestTable
from csi.fuse.wire import Opcode, OpenFlag
from csi.tree.model import Entry, EntryKind

log = logging.getLogger(__name__)

_REQUESTS_PER_WAKE_UP = 32  # then other tasks get their turn; a guess, not measured
_SPILL_BYTES = 256 * 1024  # the kernel wants room for max_write and headers in every read
_TRIAL_S = 0.02  # a request that kills does so at once
_STABLE_S = int(STABLE_TIMEOUT_S)
_ENTRY_FLAGS = OpenFlag.KEEP_CACHE
_DIRECTORY_FLAGS = OpenFlag.KEEP_CACHE | OpenFlag.CACHE_DIR


class RawBackend:
    """One connection at a time. See `csi.fuse.port.Backend` for the contract. `backings` None: every file is read through us.
    `deadline_s`: how long a read may wait, however many workers it takes.
    """

    def __init__(
        self,
        namespace: Namespace,
        reader: ContentReader,
        backings: Backings | None = None,
        deadline_s: float = DEFAULT_DEADLINE_S,
    ) -> None:
        self._namespace = namespace
        self._reader = reader
        self._backings = Backings(namespace.tree) if backings is None else backings
        self._deadline_s = deadline_s
        self.counters = {"opens": 0, "passed_opens": 0}
        self._fd = -1
        self._asked_at = time.monotonic()
        self._waiting_reads = 0
        self._receiving: trio.CancelScope | None = None
        self._stopped = trio.Event()
        self._slot_freed = trio.Event()
        tree = namespace.tree
        self._statfs = wire.STATFS_OUT.pack(-(-tree.total_bytes // 4096), 0, 0, len(tree), 0, 4096, 255, 4096)
        self._answers: dict[int, Callable[[int, memoryview], bytes]] = {
            Opcode.LOOKUP: self._lookup,
            Opcode.GETATTR: self._getattr,
            Opcode.READLINK: self._readlink,
            Opcode.OPENDIR: self._opendir,
            Opcode.READDIRPLUS: self._readdirplus,
            Opcode.STATFS: self._statfs_answer,
            Opcode.RELEASE: self._release,
            Opcode.RELEASEDIR: _nothing,
        }

    async def serve(self, connection: Connection, on_serving: Callable[[], None]) -> None:
        """See `Backend.serve`."""
        self._fd = connection.fd
        try:
            self._table = RequestTable(connection.table_fd)
            self._handles = HandleTable(connection.table_fd, HANDLES_OFFSET)
            os.close(connection.table_fd)
            os.set_blocking(self._fd, False)
            spill = memoryview(mmap.mmap(-1, _SPILL_BYTES))
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                on_serving()
                with trio.CancelScope() as self._receiving:
                    await self._take_over()
                    await self._receive(spill)
        finally:
            self._receiving = None
            self._stopped.set()
            os.close(self._fd)

    def stop(self) -> None:
        """See `Backend.stop`."""
        if self._receiving is not None:
            self._receiving.cancel()

    async def wait_stopped(self) -> None:
        """See `Backend.wait_stopped`."""
        if self._receiving is not None:
            await self._stopped.wait()

    @property
    def idle_s(self) -> float:
        """See `Backend.idle_s`."""
        return 0.0 if self._waiting_reads else time.monotonic() - self._asked_at

    async def _receive(self, spill: memoryview) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._fd)
            self._asked_at = time.monotonic()
            for _ in range(_REQUESTS_PER_WAKE_UP):
                slot = self._table.acquire()
                if slot is None:
                    self._slot_freed = trio.Event()
                    await self._slot_freed.wait()
                    continue
                room = self._table.room(slot)
                try:
                    os.readv(self._fd, [room, spill])
                except BlockingIOError:
                    self._table.release(slot)
                    break
                except OSError as exc:
                    self._table.release(slot)
                    if exc.errno == errno.ENODEV:  # unmounted or aborted
                        return
                    if exc.errno not in (errno.ENOENT, errno.EINTR, errno.EIO):  # withdrawn while it was being read
                        raise
                    continue
                self._begin(slot, room)

    async def _take_over(self) -> None:
        """What earlier workers took: waiting reads become tasks, suspects are handled one at a time."""
        suspects = []
        for slot in self._table.left_behind:
            if (left_s := self._table.left_s(slot)) > self._deadline_s or self._table.is_convicted(slot):
                self._refuse(slot, left_s)
            elif self._table.is_suspect(slot):
                suspects.append(slot)
            else:
                self._begin(slot, self._table.room(slot))
        for slot in suspects:
            self._table.begin_trial(slot)
            answered = self._begin(slot, self._table.room(slot))
            if answered is not None:
                with trio.move_on_after(_TRIAL_S):
                    await answered.wait()
            self._table.end_trial(slot)

    def _refuse(self, slot: int, left_s: float) -> None:
        request = self._table.room(slot)
        _, opcode, unique, nodeid, *_ = wire.IN_HEADER.unpack_from(request)
        error = ModelMountError(
            f"one worker after the other has ended while it was to be answered, for {left_s:.0f} s; the log of the supervisor "
            "says how they ended"
        )
        log.error("a request is refused: opcode %d, inode %d: %s", opcode, nodeid, error)
        if opcode == Opcode.READ:
            _, offset, size, *_ = wire.READ_IN.unpack_from(request, wire.IN_HEADER.size)
            with contextlib.suppress(NoSuchEntryError):
                self._reader.refuse(self._namespace.entry(nodeid), offset, size, error)
        self._reply(slot, unique, b"", errno.EIO)

    def _begin(self, slot: int, request: memoryview) -> trio.Event | None:
        """Answer one request now, or start a task that will; the event says when."""
        _, opcode, unique, nodeid, *_ = wire.IN_HEADER.unpack_from(request)
        if opcode == Opcode.READ:
            _, offset, size, *_ = wire.READ_IN.unpack_from(request, wire.IN_HEADER.size)
            if self._read_now(slot, unique, nodeid, offset, size):
                return None
            answered = trio.Event()
            self._waiting_reads += 1
            self._nursery.start_soon(self._read, slot, unique, nodeid, offset, size, answered)
            return answered
        if opcode in wire.UNANSWERED:
            self._free(slot)
            return None
        answer = functools.partial(self._open, unique) if opcode == Opcode.OPEN else self._answers.get(opcode)
        try:
            if answer is None:
                self._reply(slot, unique, b"", errno.ENOSYS)
            else:
                self._reply(slot, unique, answer(nodeid, request[wire.IN_HEADER.size :]))
        except NoSuchEntryError as exc:
            self._reply(slot, unique, b"", exc.errno)
        except MemoryError:
            raise  # the limit of this process: it ends, and its successor answers
        except Exception:
            log.exception("request %d failed by a bug", opcode)
            self._reply(slot, unique, b"", errno.EIO)
        return None

    def _read_now(self, slot: int, unique: int, inode: int, offset: int, size: int) -> bool:
        """Whether the answer needed no waiting: most do not, and a task for each costs more than the answer."""
        try:
            view = self._reader.read_now(self._namespace.entry(inode), offset, size)
        except MemoryError:
            raise
        except Exception:  # the task finds out, and says, what is wrong
            return False
        if view is None:
            return False
        self._reply(slot, unique, view)
        return True

    async def _read(self, slot: int, unique: int, inode: int, offset: int, size: int, answered: trio.Event) -> None:
        error, view = 0, memoryview(b"")
        try:
            view = await self._reader.read(self._namespace.entry(inode), offset, size)
        except NoSuchEntryError as exc:
            error = exc.errno
        except ModelMountError as exc:
            log.debug("read failed: %s", exc)  # whoever made the reader says it, and not for every one
            error = read_errno(exc)
        except MemoryError:
            raise
        except Exception:
            log.exception("read failed by a bug")
            error = errno.EIO
        # No await up to here since the reader filled its buffer.
        self._reply(slot, unique, view, error)
        self._waiting_reads -= 1
        self._asked_at = time.monotonic()
        answered.set()

    def _reply(self, slot: int, unique: int, payload: bytes | memoryview, error: int = 0) -> None:
        try:
            os.writev(self._fd, [wire.reply_header(unique, len(payload), error), payload])
        except OSError as exc:
            if exc.errno not in (errno.ENOENT, errno.ENODEV):  # nobody waits any more; the connection ended
                log.error("reply of %d bytes refused: %s", len(payload), exc.strerror)
        self._free(slot)

    def _free(self, slot: int) -> None:
        self._table.release(slot)
        self._slot_freed.set()

    def _lookup(self, parent: int, body: memoryview) -> bytes:
        entry = self._namespace.lookup(parent, bytes(body).partition(b"\0")[0])
        if entry is None:  # inode 0: the kernel may remember that there is none
            return wire.ENTRY_OUT.pack(0, 0, _STABLE_S, 0, 0, 0, *([0] * 16))
        return _entry_out(entry)

    def _getattr(self, inode: int, body: memoryview) -> bytes:
        return wire.ATTR_OUT.pack(_STABLE_S, 0, 0, *_attributes(self._namespace.entry(inode)))

    def _readlink(self, inode: int, body: memoryview) -> bytes:
        return self._namespace.readlink(inode)

    def _open(self, unique: int, inode: int, body: memoryview) -> bytes:
        flags, _ = wire.OPEN_IN.unpack_from(body)
        entry = self._namespace.open(inode, flags)
        unique &= ~wire.RESEND_BIT
        handle = self._handles.of_open(unique)  # taken by a worker that died before, or after, it had answered
        if handle is None:
            backing_id = way_of(self._handles.of_inode(inode), self._backings.of(entry))
            handle = self._handles.add(unique, inode, backing_id)
        if handle is None:
            raise NoSuchEntryError(errno.ENFILE)
        self.counters["opens"] += 1
        if handle.backing_id == THROUGH_US:
            return wire.OPEN_OUT.pack(handle.fh, _ENTRY_FLAGS, 0)
        self.counters["passed_opens"] += 1
        return wire.OPEN_OUT.pack(handle.fh, OpenFlag.PASSTHROUGH, handle.backing_id)

    def _release(self, inode: int, body: memoryview) -> bytes:
        self._handles.remove(wire.RELEASE_IN.unpack_from(body)[0], inode)
        return b""

    def is_open_by(self, backing_id: int) -> bool:
        """Whether a file may still be open by that id."""
        return self._handles.has(backing_id)

    def _opendir(self, inode: int, body: memoryview) -> bytes:
        return wire.OPEN_OUT.pack(self._namespace.directory(inode).inode, _DIRECTORY_FLAGS, 0)

    def _readdirplus(self, inode: int, body: memoryview) -> bytes:
        _, position, room, *_ = wire.READ_IN.unpack_from(body)
        parts = []
        for entry in self._namespace.tree.children(self._namespace.directory(inode).inode, position):
            position += 1
            record = _entry_out(entry) + wire.dirent(entry.inode, position, mode_of(entry) >> 12, entry.name)
            room -= len(record)
            if room < 0:
                break
            parts.append(record)
        return b"".join(parts)

    def _statfs_answer(self, inode: int, body: memoryview) -> bytes:
        return self._statfs


def _nothing(inode: int, body: memoryview) -> bytes:
    return b""


def _entry_out(entry: Entry) -> bytes:
    return wire.ENTRY_OUT.pack(entry.inode, 0, _STABLE_S, _STABLE_S, 0, 0, *_attributes(entry))


def _attributes(entry: Entry) -> tuple[int, ...]:
    links = 2 if entry.kind is EntryKind.DIRECTORY else 1
    size, mtime = entry.size_bytes, entry.mtime_s
    return (
        entry.inode,
        size,
        -(-size // 512),
        mtime,
        mtime,
        mtime,
        0,
        0,
        0,
        mode_of(entry),
        links,
        0,
        0,
        0,
        IO_BYTES,
        0,
    )
