"""Become an unprivileged user for good. Called by workers and fetchers about themselves, after their imports (the
interpreter may lie where the new user cannot read) and before their first message.

Source: credentials(7), prctl(2) PR_SET_NO_NEW_PRIVS.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import os
import resource
import signal
import struct
from collections.abc import Collection
from enum import IntEnum

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

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_PR_CAPBSET_DROP, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 24, 47, 4
_CAPABILITY_VERSION_3 = 0x20080522
_LAST_CAPABILITY = 63


class Capability(IntEnum):
    """Those we name. Source: linux include/uapi/linux/capability.h."""

    CHOWN = 0
    KILL = 5
    SETGID = 6
    SETUID = 7


_libc = ctypes.CDLL(None, use_errno=True)


def end_with_parent() -> None:
    """SIGTERM for this process when its parent dies, however that happens (Linux: PR_SET_PDEATHSIG)."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def raise_descriptor_limit() -> None:
    """As many descriptors as this process may have: a model of ten thousand files needs three for each."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def import_late() -> None:
    """What would be imported later, from where the new user cannot read."""
    for module in _IMPORTED_LATE:
        importlib.import_module(module)


def become(uid: int, gid: int) -> None:
    """Take `uid` and `gid`, no supplementary group, no capability, and no way to get any back.

    Raises: OSError when this process may not; PermissionError when root could be had again.
    """
    import_late()
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)  # from 0 to another uid: the kernel drops every capability
    no_new_privileges()
    try:
        os.setuid(0)
    except PermissionError:
        return
    raise PermissionError("privileges could be had back after dropping them")


def no_new_privileges() -> None:
    """No program that is ever executed from here gives more rights. Raises: OSError."""
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS)")


def undumpable() -> None:
    """No core, whatever the limits of the system, and no process of the same user may look into this one."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def keep_only(capabilities: Collection[Capability]) -> None:
    """Drop every other capability, for this process and all it starts: effective, permitted, inheritable, ambient, and
    the bounding set, so that a program executed as root does not get them back.

    Raises: OSError.
    """
    for number in range(_LAST_CAPABILITY + 1):
        if number not in capabilities and _libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0):
            if ctypes.get_errno() == errno.EINVAL:
                break  # the kernel's last one was before it
            if ctypes.get_errno() != errno.EPERM:
                raise OSError(ctypes.get_errno(), "prctl(PR_CAPBSET_DROP)")
            break  # no CAP_SETPCAP: the container's bounding set stays as it is
    _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    held = _held_capabilities()
    kept = sum(1 << number for number in capabilities) & held
    header = struct.pack("<Ii", _CAPABILITY_VERSION_3, 0)
    low, high = kept & 0xFFFFFFFF, kept >> 32
    if _libc.capset(header, struct.pack("<6I", low, low, 0, high, high, 0)):
        raise OSError(ctypes.get_errno(), "capset")


def _held_capabilities() -> int:
    data = ctypes.create_string_buffer(24)
    if _libc.capget(struct.pack("<Ii", _CAPABILITY_VERSION_3, 0), data):
        raise OSError(ctypes.get_errno(), "capget")
    words = struct.unpack("<6I", data.raw)
    return int(words[1] | words[4] << 32)
