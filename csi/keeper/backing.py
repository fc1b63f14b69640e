"""FUSE passthrough: a file of the cache is registered with a connection, and the kernel reads it without asking a worker.

The kernel lets nobody do that who has no CAP_SYS_ADMIN in the first user name space, so the keeper does it. It does not take
any descriptor for it: what a mount shows in this way must be a file that the store has proven and nobody else can have
made or changed. The keeper sees no data directory, so it goes by what the descriptor itself says: a regular file of the
store's user, writable by nobody, open for reading and for nothing else.

Source: linux Documentation/filesystems/fuse-passthrough.rst, include/uapi/linux/fuse.h.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct

from csi.errors import MountError

_BACKING_OPEN, _BACKING_CLOSE = 0x4010E501, 0x4004E502
_BACKING_MAP = struct.Struct("<iIQ")  # fd flags padding
_MEANING = {
    errno.ELOOP: "the cache lies on a stacked file system, such as an overlay; passthrough needs a plain one",
    errno.EPERM: "the kernel refuses it: the keeper needs CAP_SYS_ADMIN, the mount FUSE_PASSTHROUGH",
    errno.EOPNOTSUPP: "the cache's file system, or the kernel, does not support it",
    errno.ENOTTY: "this kernel has no FUSE passthrough (Linux 6.9)",
}


def register(fuse_fd: int, file_fd: int) -> int:
    """A backing id for the file, good for as long as the connection lives. Raises: MountError when the kernel refuses."""
    request = bytearray(_BACKING_MAP.pack(file_fd, 0, 0))  # an immutable one would lose the id
    try:
        return int(fcntl.ioctl(fuse_fd, _BACKING_OPEN, request))
    except OSError as exc:
        raise MountError(f"passthrough: {_MEANING.get(exc.errno or 0, exc.strerror)}", errno=exc.errno) from exc


def unregister(fuse_fd: int, backing_id: int) -> None:
    """No file is opened by that id any more; those that are open go on. Raises: OSError."""
    fcntl.ioctl(fuse_fd, _BACKING_CLOSE, struct.pack("<I", backing_id))


def refusal_of(file_fd: int, owner_uid: int) -> str | None:
    """Why a descriptor is not that of a proven file; None when it is. Flags first: they ask no file system."""
    flags = fcntl.fcntl(file_fd, fcntl.F_GETFL)
    if flags & os.O_PATH or flags & os.O_ACCMODE != os.O_RDONLY:
        return "the descriptor is not open for reading alone"
    status = os.fstat(file_fd)
    if not stat.S_ISREG(status.st_mode):
        return "the descriptor is not of a regular file"
    if status.st_uid != owner_uid or status.st_mode & 0o222:
        return f"the file is not one of the store's (uid {owner_uid}, writable by nobody)"
    return None


def name_of(file_fd: int) -> str:
    """The same for every descriptor of one file."""
    status = os.fstat(file_fd)
    return f"{status.st_dev:x}:{status.st_ino:x}"
