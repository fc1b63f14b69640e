"""Serving a kept connection with pyfuse3, which knows nothing of kept connections.

libfuse accepts `/dev/fd/N` as an already mounted descriptor, and insists on reading INIT from it. So it gets one
end of a socket pair that holds the INIT bytes the keeper saved; when it has processed them, `Operations.init`
puts the real /dev/fuse descriptor over that number. libfuse's own INIT reply goes to the kernel with a unique that
was answered long ago, and is dropped (ENOENT, which libfuse ignores).

pyfuse3 keeps its session in module globals: one mount per process. A handler may raise only FUSEError; anything
else would end the session, so `_guard` turns every other exception into EIO and logs it.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import select
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, ParamSpec, TypeVar, cast

import pyfuse3
import trio

from csi.errors import ModelMountError
from csi.fuse.errno_map import read_errno
from csi.fuse.port import IO_BYTES, STABLE_TIMEOUT_S, Connection, ContentReader, Namespace, NoSuchEntryError, mode_of
from csi.tree.model import Entry, EntryKind

log = logging.getLogger(__name__)

_MAX_TASKS = 8192  # requests that may wait at once; a waiting read must never keep a cached one from being answered
_NS = 1_000_000_000


_P = ParamSpec("_P")
_R = TypeVar("_R")


class _Activity:
    """What is being answered, and when there was something last. One session per process."""

    def __init__(self) -> None:
        self.answering = 0
        self.last_at = time.monotonic()


_activity = _Activity()


def _guard(handler: Callable[_P, Awaitable[_R]]) -> Callable[_P, Coroutine[Any, Any, _R]]:
    @functools.wraps(handler)
    async def guarded(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        _activity.answering += 1
        try:
            return await handler(*args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except NoSuchEntryError as exc:
            raise pyfuse3.FUSEError(exc.errno) from None
        except ModelMountError as exc:
            log.debug("%s failed: %s", handler.__name__, exc)  # whoever made the reader says it, and not for every one
            raise pyfuse3.FUSEError(read_errno(exc)) from None
        except MemoryError:
            raise  # the limit of this process: it ends, and its successor answers
        except Exception:
            log.exception("%s failed by a bug", handler.__name__)
            raise pyfuse3.FUSEError(errno.EIO) from None
        finally:
            _activity.answering -= 1
            _activity.last_at = time.monotonic()

    return guarded


class Pyfuse3Operations(pyfuse3.Operations):
    """Requests in, tree look-ups and reads out. Writing operations keep pyfuse3's default (ENOSYS); the mount is
    read-only, so the kernel answers EROFS before they get here.
    """

    supports_dot_lookup = True
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, namespace: Namespace, reader: ContentReader, on_init: Callable[[], None]) -> None:
        super().__init__()
        self._namespace = namespace
        self._reader = reader
        self._on_init = on_init
        tree = namespace.tree
        self._statfs = (tree.total_bytes, len(tree))

    def init(self) -> None:
        """Called by libfuse when it has processed the replayed INIT."""
        self._on_init()

    @_guard
    async def lookup(self, parent_inode: int, name: bytes, ctx: Any = None) -> pyfuse3.EntryAttributes:
        entry = self._namespace.lookup(parent_inode, name)
        if entry is None:
            attributes = pyfuse3.EntryAttributes()
            attributes.st_ino = 0
            attributes.entry_timeout = STABLE_TIMEOUT_S
            return attributes
        return _attributes(entry)

    @_guard
    async def getattr(self, inode: int, ctx: Any = None) -> pyfuse3.EntryAttributes:
        return _attributes(self._namespace.entry(inode))

    @_guard
    async def readlink(self, inode: int, ctx: Any = None) -> bytes:
        return self._namespace.readlink(inode)

    @_guard
    async def open(self, inode: int, flags: int, ctx: Any = None) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=self._namespace.open(inode, flags).inode, keep_cache=True)

    @_guard
    async def read(self, fh: int, off: int, size: int) -> bytes:
        # pyfuse3 takes any buffer, whatever its annotation says; bytes would be one more copy.
        return cast(bytes, await self._reader.read(self._namespace.entry(fh), off, size))

    @_guard
    async def opendir(self, inode: int, ctx: Any = None) -> int:
        return self._namespace.directory(inode).inode

    @_guard
    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        position = start_id
        for entry in self._namespace.tree.children(fh, start_id):
            position += 1
            if not pyfuse3.readdir_reply(token, entry.name, _attributes(entry), position):
                return

    @_guard
    async def release(self, fh: int) -> None:
        return

    @_guard
    async def releasedir(self, fh: int) -> None:
        return

    async def forget(self, inode_list: Any) -> None:
        """Nothing is remembered, so nothing is forgotten."""

    @_guard
    async def statfs(self, ctx: Any = None) -> pyfuse3.StatvfsData:
        total_bytes, inodes = self._statfs
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_blocks = -(-total_bytes // 4096)
        data.f_bfree = data.f_bavail = 0
        data.f_files = inodes
        data.f_ffree = data.f_favail = 0
        data.f_namemax = 255
        return data


def _attributes(entry: Entry) -> pyfuse3.EntryAttributes:
    attributes = pyfuse3.EntryAttributes()
    attributes.st_ino = entry.inode
    attributes.generation = 0
    attributes.entry_timeout = attributes.attr_timeout = STABLE_TIMEOUT_S
    attributes.st_mode = mode_of(entry)
    attributes.st_nlink = 2 if entry.kind is EntryKind.DIRECTORY else 1
    attributes.st_uid = attributes.st_gid = attributes.st_rdev = 0
    attributes.st_size = entry.size_bytes
    attributes.st_blksize = IO_BYTES
    attributes.st_blocks = -(-entry.size_bytes // 512)
    attributes.st_atime_ns = attributes.st_mtime_ns = attributes.st_ctime_ns = entry.mtime_s * _NS
    return attributes


_QUIET_PATIENCE_S = 1.0
"""How long a session that is to end goes on where one request follows the other without a pause."""


class Pyfuse3Backend:
    """One session, once per process. See `csi.fuse.port.Backend` for the contract.

    The request table stays empty: libfuse reads requests where only it sees them.
    """

    def __init__(self, namespace: Namespace, reader: ContentReader) -> None:
        self._namespace = namespace
        self._reader = reader
        self._running = False
        self._session_fd = -1

    async def serve(self, connection: Connection, on_serving: Callable[[], None]) -> None:
        """See `Backend.serve`."""
        os.close(connection.table_fd)
        session_end, kernel_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        session_fd = self._session_fd = session_end.detach()
        kernel_end.send(connection.init)

        def switch_to_kernel() -> None:
            os.dup2(connection.fd, session_fd, inheritable=False)
            os.close(connection.fd)
            kernel_end.close()
            on_serving()

        operations = Pyfuse3Operations(self._namespace, self._reader, switch_to_kernel)
        pyfuse3.init(operations, f"/dev/fd/{session_fd}", {"fsname=modelmount"})
        self._running = True
        try:
            await pyfuse3.main(min_tasks=1, max_tasks=_MAX_TASKS)
        finally:
            self._running = False
            pyfuse3.close(unmount=False)

    def stop(self) -> None:
        """See `Backend.stop`."""
        if self._running:
            trio.lowlevel.spawn_system_task(self._terminate)

    async def _terminate(self) -> None:
        """Not while a request waits to be read: a task may have been woken for it, and libfuse looks after it has read whether the
        session has ended, and drops what it has read.
        """
        poll = select.poll()
        poll.register(self._session_fd, select.POLLIN)
        deadline = trio.current_time() + _QUIET_PATIENCE_S
        while self._running and poll.poll(0) and trio.current_time() < deadline:
            await trio.sleep(0.001)
        if self._running:
            pyfuse3.terminate()

    @property
    def idle_s(self) -> float:
        """See `Backend.idle_s`."""
        return 0.0 if _activity.answering else time.monotonic() - _activity.last_at

    async def wait_stopped(self) -> None:
        """See `Backend.wait_stopped`."""
        while self._running:
            await trio.sleep(0.005)
