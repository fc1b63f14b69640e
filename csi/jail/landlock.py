"""Landlock: which files this process may open from now on, and which TCP it may do. No privilege needed.

Rulesets stack, and only ever narrow: one when the process starts, another when it learns which mount it serves.
Descriptors that are open already are not affected. A ruleset holds for the calling thread and those it starts.

Source: landlock(7), linux include/uapi/linux/landlock.h.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable
from enum import IntFlag

_SYS_CREATE_RULESET, _SYS_ADD_RULE, _SYS_RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_VERSION = 1
_RULE_PATH_BENEATH = 1
_PATH_BENEATH = struct.Struct("<Qi")
_libc = ctypes.CDLL(None, use_errno=True)


class Files(IntFlag):
    """Rights on files."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHAR = 1 << 6
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK = 1 << 11
    MAKE_SYM = 1 << 12
    REFER = 1 << 13
    TRUNCATE = 1 << 14
    IOCTL_DEV = 1 << 15


class Net(IntFlag):
    """Rights on TCP ports."""

    BIND = 1 << 0
    CONNECT = 1 << 1


READ = Files.READ_FILE | Files.READ_DIR
CHANGE = (
    Files.WRITE_FILE
    | Files.REMOVE_DIR
    | Files.REMOVE_FILE
    | Files.MAKE_DIR
    | Files.MAKE_REG
    | Files.REFER
    | Files.TRUNCATE
)
EVERYTHING = Files((1 << 16) - 1)
_SINCE = {Files.REFER: 2, Files.TRUNCATE: 3, Files.IOCTL_DEV: 5}
_NET_SINCE, _SCOPE_SINCE = 4, 6
_SCOPE_ABSTRACT_UNIX_AND_SIGNALS = 3


def abi() -> int:
    """The version the kernel speaks; 0: none (not built in, or not switched on)."""
    version = int(_libc.syscall(_SYS_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint(_VERSION)))
    return max(0, version)


def restrict(handled: Files, allowed: Iterable[tuple[int, Files]], denied_net: Net | None = None) -> None:
    """From now on, `handled` rights exist only beneath the directories (descriptors) in `allowed`, `denied_net` nowhere,
    and signals and abstract sockets reach nobody outside; as far as the kernel's ABI goes. Needs no_new_privs.

    Raises: OSError.
    """
    version = abi()
    for right, since in _SINCE.items():
        if version < since:
            handled &= ~right
    net = denied_net if denied_net is not None and version >= _NET_SINCE else 0
    scope = _SCOPE_ABSTRACT_UNIX_AND_SIGNALS if version >= _SCOPE_SINCE else 0
    size = 24 if version >= _SCOPE_SINCE else 16 if version >= _NET_SINCE else 8
    attributes = struct.pack("<QQQ", handled, net, scope)[:size]
    ruleset = _checked(
        _libc.syscall(_SYS_CREATE_RULESET, attributes, ctypes.c_size_t(size), ctypes.c_uint(0)), "create_ruleset"
    )
    try:
        for fd, rights in allowed:
            rule = _PATH_BENEATH.pack(rights & handled, fd)
            _checked(
                _libc.syscall(_SYS_ADD_RULE, ruleset, ctypes.c_int(_RULE_PATH_BENEATH), rule, ctypes.c_uint(0)),
                "add_rule",
            )
        _checked(_libc.syscall(_SYS_RESTRICT_SELF, ruleset, ctypes.c_uint(0)), "restrict_self")
    finally:
        os.close(ruleset)


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"landlock_{what}: {os.strerror(number)}")
    return int(result)
