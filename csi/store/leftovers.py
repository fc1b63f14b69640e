"""A cache of another layout, which an earlier or a later version has left: its bytes are of no use, but take room.

Mounts of a supervisor that is being replaced may still use theirs; what is locked stays for the next start.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator


def remove(version_fd: int) -> int:
    """Remove what we may and nobody uses, from `<domain>/blobs` and `<domain>/mounts/<id>`. Returns the bytes that were there.

    Directories that are not ours to remove stay, empty.
    """
    freed = 0
    for domain in os.listdir(version_fd):
        with _directory(version_fd, f"{domain}/blobs") as blobs_fd:
            freed += _empty(blobs_fd)
        with _directory(version_fd, f"{domain}/mounts") as mounts_fd:
            for name in os.listdir(mounts_fd) if mounts_fd >= 0 else ():
                with _directory(mounts_fd, name) as area_fd, contextlib.suppress(OSError):
                    fcntl.flock(area_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    freed += _empty(area_fd)
                    os.rmdir(name, dir_fd=mounts_fd)
    return freed


def _empty(directory_fd: int) -> int:
    if directory_fd < 0:
        return 0
    freed = 0
    for _, _, files, fd in os.fwalk(".", dir_fd=directory_fd):
        for file in files:
            with contextlib.suppress(OSError):
                freed += os.stat(file, dir_fd=fd, follow_symlinks=False).st_blocks * 512
                os.unlink(file, dir_fd=fd)
    for name in os.listdir(directory_fd):
        shutil.rmtree(name, dir_fd=directory_fd, ignore_errors=True)
    return freed


@contextlib.contextmanager
def _directory(parent_fd: int, path: str) -> Iterator[int]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=parent_fd)
    except OSError:
        yield -1
        return
    try:
        yield fd
    finally:
        os.close(fd)
