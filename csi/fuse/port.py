"""What a FUSE backend serves, and what it is given. One contract for every backend."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from csi.errors import ModelMountError
from csi.tree.file_format import Tree
from csi.tree.model import Entry, EntryKind

STABLE_TIMEOUT_S = 24 * 3600.0
"""How long the kernel may keep names and attributes: content never changes under a digest."""

NAME_MAX = 255
"""Bytes in a name, as everywhere on Linux."""

DEFAULT_DEADLINE_S = 120.0
"""How long a read waits for its bytes, through every retry. A failed page fault kills the reader, so: long."""

IO_BYTES = 1024 * 1024
"""st_blksize: what `cat`, Python and most loaders take as the size of one read."""


class ContentReader(Protocol):
    """Where file bytes come from."""

    def read_now(self, entry: Entry, offset: int, size: int) -> memoryview | None:
        """What `read` returns, where that takes no waiting; else None, and nothing has been done. The view is valid until the
        next read.
        """

    async def read(self, entry: Entry, offset: int, size: int) -> memoryview:
        """Up to `size` bytes of a file from `offset` (bytes); shorter only at its end, empty past it.

        The view is valid until the next await of the calling task: reply before anything else.

        Raises: the ModelMountError that says why the bytes cannot be had within the read's deadline.
        """

    def refuse(self, entry: Entry, offset: int, size: int, error: ModelMountError) -> None:
        """That read got an error without being asked for here; it counts as any that failed, and if it is asked for again at once
        while its bytes are still missing, it fails again.
        """


@dataclass(frozen=True, slots=True)
class Connection:
    """A /dev/fuse descriptor whose INIT was answered already, that INIT request's bytes, and the connection's table of
    requests taken (see `csi.fuse.request_table`).
    """

    fd: int
    init: bytes
    table_fd: int


class Backend(Protocol):
    """Serves one connection, once. Made with (namespace, reader)."""

    async def serve(self, connection: Connection, on_serving: Callable[[], None]) -> None:
        """Serve until `stop`, or until the connection ends (unmounted, aborted). The mount itself is left alone.

        `on_serving` is called when requests are answered from now on. Owns the connection's descriptors.

        Raises: MountError for a connection it cannot serve.
        """

    def stop(self) -> None:
        """Stop receiving at once; `serve` returns when what was received is answered. Any trio task may call it."""

    async def wait_stopped(self) -> None:
        """For callers that must not return before the last reply is out."""

    @property
    def idle_s(self) -> float:
        """For how long there was nothing to answer; 0.0 while something waits for its answer."""


class NoSuchEntryError(Exception):
    """A name or inode that the tree does not have. Carries an errno."""

    def __init__(self, number: int = errno.ENOENT) -> None:
        super().__init__(os.strerror(number))
        self.errno = number


class Namespace:
    """The tree as a file system sees it. Stateless: fh = inode, generation 0, no lookup counts, so that any worker
    can answer any request of a mount, whoever answered the one before.
    """

    def __init__(self, tree: Tree) -> None:
        self.tree = tree

    def lookup(self, parent: int, name: bytes) -> Entry | None:
        """The entry, or None (a negative entry the kernel may keep). Raises: NoSuchEntryError ENOENT, ENOTDIR, ENAMETOOLONG
        (newer kernels ask for names of up to 4095 bytes).
        """
        directory = self.directory(parent)
        if len(name) > NAME_MAX:
            raise NoSuchEntryError(errno.ENAMETOOLONG)
        if name == b".":
            return directory
        if name == b"..":
            return self.entry(directory.parent)
        return self.tree.lookup(parent, name)

    def entry(self, inode: int) -> Entry:
        """Raises: NoSuchEntryError."""
        try:
            return self.tree.entry(inode)
        except KeyError:
            raise NoSuchEntryError from None

    def directory(self, inode: int) -> Entry:
        """Raises: NoSuchEntryError ENOENT, ENOTDIR."""
        entry = self.entry(inode)
        if entry.kind is not EntryKind.DIRECTORY:
            raise NoSuchEntryError(errno.ENOTDIR)
        return entry

    def open(self, inode: int, flags: int) -> Entry:
        """Raises: NoSuchEntryError EISDIR for a directory, ELOOP for a symlink, EROFS for any kind of writing."""
        entry = self.entry(inode)
        if entry.kind is EntryKind.DIRECTORY:
            raise NoSuchEntryError(errno.EISDIR)
        if entry.kind is EntryKind.SYMLINK:
            raise NoSuchEntryError(errno.ELOOP)
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & (os.O_TRUNC | os.O_APPEND):
            raise NoSuchEntryError(errno.EROFS)
        return entry

    def readlink(self, inode: int) -> bytes:
        """The target of a symlink. Raises: NoSuchEntryError ENOENT, EINVAL for what is no symlink."""
        entry = self.entry(inode)
        if entry.kind is not EntryKind.SYMLINK:
            raise NoSuchEntryError(errno.EINVAL)
        return entry.target


def mode_of(entry: Entry) -> int:
    """st_mode: 0555 for directories and executables, 0777 for symlinks (nobody looks at it), 0444 for all else; never
    setuid, setgid or sticky.
    """
    if entry.kind is EntryKind.DIRECTORY:
        return stat.S_IFDIR | 0o555
    if entry.kind is EntryKind.SYMLINK:
        return stat.S_IFLNK | 0o777
    return stat.S_IFREG | (0o555 if entry.executable else 0o444)
