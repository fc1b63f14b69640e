"""Models shown as plain files: the store has put together a directory of what it has proven, and the keeper binds it.

The keeper looks into no file of it. It goes by the directory: it lies where the store's lie, is the store's, and nobody
else can write to it. As long as a target shows one, it is locked here (flock, shared), and a new keeper locks it again, so
that the store leaves it and what is in it alone, also when nobody else knows of the mount any more.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
from collections.abc import Iterable

from csi import mountinfo
from csi.errors import MountError
from csi.mountinfo import MountEntry

log = logging.getLogger(__name__)

_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class SealedTrees:
    """Those below `directory`, which are `owner_uid`'s. None for one of the two: this keeper binds none."""

    def __init__(self, directory: str | None, owner_uid: int | None) -> None:
        self._directory, self._owner_uid = directory, owner_uid
        self._locked: dict[str, int] = {}

    def open(self, mount_id: str) -> int:
        """The directory of that mount, locked from now on; the descriptor stays ours. Raises: MountError."""
        if self._directory is None or self._owner_uid is None:
            raise MountError("sealed: this keeper was given no --data-dir, or no --backing-uid whose files it takes")
        path = os.path.join(self._directory, mount_id)
        try:
            fd = os.open(path, _FLAGS)
        except OSError as exc:
            raise MountError(f"sealed: {path}: {exc.strerror}", errno=exc.errno) from exc
        held = self._locked.get(mount_id)
        if held is not None and os.path.samestat(os.fstat(held), os.fstat(fd)):
            os.close(fd)
            return held
        try:
            status = os.fstat(fd)
            if status.st_uid != self._owner_uid or status.st_mode & 0o022:
                raise MountError(
                    f"sealed: {path} is not one of the store's (uid {self._owner_uid}, writable by it alone)"
                )
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if not os.path.samestat(os.stat(path, follow_symlinks=False), status):
                raise MountError(f"sealed: {path} was replaced just now", errno=errno.EAGAIN)
        except OSError as exc:
            os.close(fd)
            raise MountError(f"sealed: {path}: {exc.strerror}", errno=exc.errno) from exc
        except MountError:
            os.close(fd)
            raise
        if held is not None:
            os.close(held)
        self._locked[mount_id] = fd
        return fd

    def keep_shown(self, entries: Iterable[MountEntry]) -> None:
        """Lock what is bound somewhere, and nothing else."""
        shown = {found for entry in entries if (found := mountinfo.sealed_mount(entry))}
        for mount_id in set(self._locked) - shown:
            os.close(self._locked.pop(mount_id))
        if self._directory is None:
            return
        for mount_id in shown - set(self._locked):
            with contextlib.suppress(MountError):
                self.open(mount_id)
                log.info("the files of mount %s are shown; they are locked again", mount_id)

    @property
    def locked(self) -> bool:
        """Whether any is."""
        return bool(self._locked)
