"""Directories of the cache for the users they belong to."""

from __future__ import annotations

import os
import stat


def give(path: str, uid: int | None, gid: int | None, mode: int) -> None:
    """Owner, group and mode of a directory. `uid` or `gid` None (a supervisor that is not root): both stay ours.

    CAP_CHOWN is enough: the mode is set while the directory is ours, as that of somebody else's needs CAP_FOWNER, and
    setgid with another group CAP_FSETID. Raises: OSError.
    """
    if uid is None or gid is None:
        uid, gid = os.geteuid(), os.getegid()
    found = os.stat(path)
    if (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (uid, gid, mode):
        return
    os.chown(path, os.geteuid(), os.getegid())
    os.chmod(path, mode)
    os.chown(path, uid, gid)
