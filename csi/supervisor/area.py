"""A mount's own part of the cache, as the supervisor opens it for its children."""

from __future__ import annotations

import contextlib
import fcntl
import os

from csi.supervisor.ownership import give
from csi.supervisor.settings import SupervisorSettings


def open_area(path: str, settings: SupervisorSettings) -> int:
    """The mount's own part of the cache: the fetcher writes, the store links and removes, the worker reads. Locked as long
    as any of us has it open, so that the store knows that it is in use.
    """
    while True:
        os.makedirs(path, mode=0o755, exist_ok=True)
        give(os.path.dirname(path), os.geteuid(), settings.store_gid, 0o775)
        give(path, settings.fetcher_uid, settings.store_gid, 0o2775)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(fd, fcntl.LOCK_SH)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        os.close(fd)  # evicted between open and lock
