"""Become an unprivileged user for good. Called by workers and fetchers about themselves, after their imports (the
interpreter may lie where the new user cannot read) and before their first message.

Source: credentials(7), prctl(2) PR_SET_NO_NEW_PRIVS.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import resource
import signal

# What the standard library imports only when it is first needed: codecs by name, and what prints a traceback.
_IMPORTED_LATE = (
    "encodings.ascii",
    "encodings.idna",
    "encodings.latin_1",
    "encodings.punycode",
    "encodings.utf_8_sig",
    "linecache",
    "stringprep",
    "traceback",
    "unicodedata",
)

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_libc = ctypes.CDLL(None, use_errno=True)


def end_with_parent() -> None:
    """SIGTERM for this process when its parent dies, however that happens (Linux: PR_SET_PDEATHSIG)."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def raise_descriptor_limit() -> None:
    """As many descriptors as this process may have: a model of ten thousand files needs three for each."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def become(uid: int, gid: int) -> None:
    """Take `uid` and `gid`, no supplementary group, no capability, and no way to get any back.

    Raises: OSError when this process may not; PermissionError when root could be had again.
    """
    for module in _IMPORTED_LATE:
        importlib.import_module(module)
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)  # from 0 to another uid: the kernel drops every capability
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS)")
    try:
        os.setuid(0)
    except PermissionError:
        return
    raise PermissionError("privileges could be had back after dropping them")
