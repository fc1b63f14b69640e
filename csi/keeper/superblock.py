"""One FUSE superblock: opened, mounted and answered (INIT, first FLUSH) by the keeper itself.

Answering INIT here means that no worker has to live while the mount is made, and that what was negotiated does
not depend on the worker that happens to serve first.

The FLUSH latch: until the kernel has seen ENOSYS for one FLUSH, every close() waits for the server, and a close()
without a server hangs in state D, SIGKILL or not. So a throw-away child opens and closes one made-up file while
the keeper answers; the kernel then never sends FLUSH again on this connection.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import signal
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from csi import mountinfo
from csi.errors import MountError
from csi.fuse import handshake, request_table, wire
from csi.fuse.handshake import BackendName
from csi.fuse.wire import Opcode
from csi.keeper import syscalls

FUSE_DEVICE = "/dev/fuse"
_FLAGS = syscalls.MS_RDONLY | syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC | syscalls.MS_NOATIME
_REQUEST_BYTES = 128 * 1024 + 4096  # max_write + headers; smaller buffers get EINVAL
_HANDSHAKE_TIMEOUT_S = 5.0

_LATCH_NAME = b".modelmount-flush-latch"
_LATCH_INODE = (1 << 62) + 1  # no tree has that many entries
_ROOT_INODE = 1


@dataclass(slots=True)
class Slot:
    """Descriptors the supervisor left here under a name, and what it wrote beside them."""

    note: dict[str, Any]
    fds: list[int]

    def close(self) -> None:
        """Let go of the descriptors."""
        for fd in self.fds:
            os.close(fd)
        self.fds = []


@dataclass(slots=True)
class Superblock:
    """A mounted FUSE superblock whose connection `fd` keeps alive. `device` is `major:minor`.

    `table_fd`: the requests that workers have taken and still owe. It and `fd` are -1 in a keeper that was restarted,
    until a supervisor brings them back. `root_fd` (O_PATH) names the root of the mount for whoever does not see it.
    """

    init: handshake.InitRequest
    backend: BackendName
    device: str
    mount_point: str
    root_fd: int
    fd: int
    table_fd: int
    slots: dict[str, Slot] = field(default_factory=dict)
    backings: dict[str, int] = field(default_factory=dict)
    """Backing ids by the name of their file."""

    @property
    def connected(self) -> bool:
        """Whether the connection is here."""
        return self.fd >= 0

    def close(self) -> None:
        """Let go of every descriptor. Idempotent."""
        for fd in (self.fd, self.table_fd, self.root_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self.table_fd = self.root_fd = -1
        for slot in self.slots.values():
            slot.close()
        self.slots.clear()


def open_superblock(
    mount_point: str,
    read_ahead_kb: int,
    backend: BackendName,
    on_complete: Callable[[str, handshake.InitRequest], object] = lambda device, init: None,
) -> Superblock:
    """Mount a new superblock at the empty directory `mount_point` and make it ready for its first worker.

    `on_complete` is told device and INIT when the mount could outlive this process.

    Raises: MountError (no /dev/fuse, mount(2) refused, the kernel too old); then nothing stays mounted.
    """
    fd = _open_device()
    try:
        options = f"fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"
        try:
            syscalls.mount_fuse(mount_point, "modelmount", _FLAGS, options)
        except OSError as exc:
            raise MountError(
                f"FUSE mount refused: {exc.strerror}; the keeper needs CAP_SYS_ADMIN and a kernel with FUSE",
                errno=exc.errno,
            ) from exc
        try:
            init = handshake.parse_init(_read_request(fd))
            os.write(fd, handshake.init_reply(init, backend))
            device = mountinfo.at(mountinfo.read(), mount_point)[-1].device
            _latch_flush(fd, mount_point)
            _raise_read_ahead(device, read_ahead_kb)
            on_complete(device, init)
            table_fd = request_table.create()
            return Superblock(init, backend, device, mount_point, open_root(mount_point), fd, table_fd)
        except BaseException:
            with contextlib.suppress(OSError):
                syscalls.detach(mount_point)
            raise
    except BaseException:
        os.close(fd)
        raise


def open_root(mount_point: str) -> int:
    """An O_PATH descriptor of the mount's root. The kernel asks no server for it: the root's inode is pinned.

    Raises: OSError.
    """
    return os.open(mount_point, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def is_fuse_device(fd: int) -> bool:
    """Whether the descriptor is an open /dev/fuse (character device 10:229).

    Only what is open for writing is asked what it is: fstat(2) of something on a mount of ours could wait for a worker.
    """
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if flags & os.O_PATH or flags & os.O_ACCMODE != os.O_RDWR:
        return False
    status = os.fstat(fd)
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == os.makedev(10, 229)


def _open_device() -> int:
    try:
        return os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        raise MountError(
            f"{FUSE_DEVICE}: {exc.strerror}; load the fuse module (modprobe fuse) and give the keeper the device",
            errno=exc.errno,
        ) from exc


def _read_request(fd: int) -> bytes:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if not poll.poll(_HANDSHAKE_TIMEOUT_S * 1000):
        raise MountError(f"the kernel sent no FUSE request within {_HANDSHAKE_TIMEOUT_S:g} s")
    return os.read(fd, _REQUEST_BYTES)


def _raise_read_ahead(device: str, read_ahead_kb: int) -> None:
    """INIT cannot raise the kernel's read-ahead, only this file can (files opened later)."""
    path = f"/sys/class/bdi/{device}/read_ahead_kb"
    try:
        with open(path, "w", encoding="ascii") as file:
            file.write(str(read_ahead_kb))
    except OSError as exc:
        raise MountError(
            f"cannot set the mount's read-ahead: {exc.strerror}; the keeper needs /sys writable", errno=exc.errno
        ) from exc


def _latch_flush(fd: int, mount_point: str) -> None:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(fd)  # or a keeper killed now would leave a child that waits for itself
            os.close(os.open(os.path.join(mount_point, os.fsdecode(_LATCH_NAME)), os.O_RDONLY))
            status = 0
        finally:
            os._exit(status)
    deadline = time.monotonic() + _HANDSHAKE_TIMEOUT_S
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    flushed = False
    while True:
        pid, wait_status = os.waitpid(child, os.WNOHANG)
        if pid:
            if wait_status or not flushed:
                raise MountError("the first open and close through a new mount failed; see the kernel log")
            return
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            with contextlib.suppress(OSError):
                syscalls.detach(mount_point)
            raise MountError(f"the first open through a new mount took more than {_HANDSHAKE_TIMEOUT_S:g} s")
        if poll.poll(5):
            flushed |= _answer(fd, os.read(fd, _REQUEST_BYTES))


def _answer(fd: int, request: bytes) -> bool:
    """Answer one request of the latch child; True when it was the FLUSH."""
    _, opcode, unique, nodeid, *_ = wire.IN_HEADER.unpack_from(request)
    if opcode in wire.UNANSWERED:
        return False
    error, payload = 0, b""
    if opcode == Opcode.LOOKUP and request[wire.IN_HEADER.size :].rstrip(b"\0") == _LATCH_NAME:
        # Valid for no time at all: the next lookup of this name asks the worker, which has no such file.
        payload = wire.ENTRY_OUT.pack(_LATCH_INODE, 0, 0, 0, 0, 0, *_attributes(_LATCH_INODE))
    elif opcode == Opcode.GETATTR:
        payload = wire.ATTR_OUT.pack(0, 0, 0, *_attributes(nodeid))
    elif opcode == Opcode.OPEN:
        payload = wire.OPEN_OUT.pack(0, 0, 0)
    elif opcode == Opcode.LOOKUP:
        error = errno.ENOENT
    elif opcode != Opcode.RELEASE:
        error = errno.ENOSYS
    os.write(fd, wire.reply_header(unique, len(payload), error) + payload)
    return bool(opcode == Opcode.FLUSH)


def _attributes(inode: int) -> tuple[int, ...]:
    mode = stat.S_IFDIR | 0o555 if inode == _ROOT_INODE else stat.S_IFREG | 0o444
    return (inode, 0, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)
