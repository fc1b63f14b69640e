"""Errors for readers whom nobody can serve: no worker starts, and they have waited as long as a read may wait.

An error is the last resort (in a memory mapping it is SIGBUS), but better than processes that cannot be killed. The
connection stays: what is asked when a worker starts again is answered.
"""

from __future__ import annotations

import errno
import os
import select

from csi.errors import MountError
from csi.fuse import wire
from csi.fuse.handshake import RESEND_MESSAGE, BackendName
from csi.fuse.request_table import answer_all

_ROOM_BYTES = 256 * 1024
_AT_MOST = 10_000


def refuse_waiting(fuse_fd: int, table_fd: int, backend: BackendName, *, can_resend: bool) -> int:
    """Answer everything that waits with EIO; how many that were. Only while nobody serves the connection.

    Raises: MountError for another version's table; OSError when the connection has ended.
    """
    refused = answer_all(table_fd, fuse_fd, errno.EIO)
    if backend is BackendName.PYFUSE3 and can_resend:  # what a worker had taken is only in the kernel
        os.write(fuse_fd, RESEND_MESSAGE)
    # pyfuse3 cannot stand a connection that does not block; it is given back as it was.
    blocking = os.get_blocking(fuse_fd)
    os.set_blocking(fuse_fd, False)
    try:
        poll = select.poll()
        poll.register(fuse_fd, select.POLLIN)
        for _ in range(_AT_MOST):
            if not any(events & select.POLLIN for _, events in poll.poll(0)):
                break
            try:
                request = os.read(fuse_fd, _ROOM_BYTES)
            except (BlockingIOError, FileNotFoundError, InterruptedError):  # withdrawn meanwhile
                continue
            if len(request) < wire.IN_HEADER.size:
                raise MountError(f"the kernel sent a FUSE request of {len(request)} bytes")
            _, opcode, unique, *_ = wire.IN_HEADER.unpack_from(request)
            if opcode in wire.UNANSWERED:
                continue
            try:
                os.write(fuse_fd, wire.reply_header(unique, 0, errno.EIO))
                refused += 1
            except FileNotFoundError:
                continue
    finally:
        os.set_blocking(fuse_fd, blocking)
    return refused
