"""A mount that nobody reads has no worker, so that it costs almost nothing: the kernel's next request starts one."""

from __future__ import annotations

import asyncio
import os
import select

from csi.errors import MountError
from csi.fuse.request_table import pending


def is_asked(fuse_fd: int, table_fd: int) -> bool:
    """Whether a request waits for a worker: in the kernel, or taken by one that is gone. Also when the connection has ended."""
    poll = select.poll()
    poll.register(fuse_fd, select.POLLIN)
    if poll.poll(0):
        return True
    try:
        return bool(pending(table_fd))
    except MountError:  # another version's: a worker says what is wrong with it
        return True


async def until_asked(fuse_fd: int, table_fd: int, patience_s: float | None = None) -> bool:
    """Returns when `is_asked`, or False after `patience_s`. Reads nothing; while it waits nobody else may read the connection."""
    loop, asked = asyncio.get_running_loop(), asyncio.Event()
    watched = os.dup(fuse_fd)  # the caller may close its own before we hear that it gave up
    loop.add_reader(watched, asked.set)
    try:
        if not is_asked(watched, table_fd):
            async with asyncio.timeout(patience_s):
                await asked.wait()
        return True
    except TimeoutError:
        return is_asked(watched, table_fd)
    finally:
        loop.remove_reader(watched)
        os.close(watched)
