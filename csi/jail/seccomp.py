"""seccomp: the system calls a role may make; every other fails with EPERM. An allow-list, as a small BPF program.

EPERM and not a kill: a library that tries something it can do without goes on without it.

Source: seccomp(2), linux include/uapi/linux/{seccomp,filter,bpf_common}.h; numbers from asm/unistd.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass

_PR_SET_SECCOMP, _MODE_FILTER = 22, 2
_LD_WORD, _JEQ, _JSET, _JGE, _RET = 0x20, 0x15, 0x45, 0x35, 0x06
_ALLOW, _ERRNO, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
_NR_OFFSET, _ARCH_OFFSET, _ARGS_OFFSET = 0, 4, 16
_X32_BIT = 0x40000000
_INSTRUCTION = struct.Struct("<HBBI")
_libc = ctypes.CDLL(None, use_errno=True)

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of the table below, AUDIT_ARCH."""

# fmt: off
NUMBERS: dict[str, tuple[int | None, int | None]] = {
    "access": (21, None), "bind": (49, 200), "brk": (12, 214), "clock_getres": (229, 114),
    "clock_gettime": (228, 113), "clock_nanosleep": (230, 115), "clone": (56, 220), "clone3": (435, 435),
    "close": (3, 57), "connect": (42, 203), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24),
    "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_pwait": (281, 22), "epoll_wait": (232, None),
    "eventfd2": (290, 19), "exit": (60, 93), "exit_group": (231, 94), "faccessat": (269, 48),
    "faccessat2": (439, 439), "fadvise64": (221, 223), "fallocate": (285, 47), "fchmod": (91, 52), "fcntl": (72, 25),
    "fdatasync": (75, 83), "flock": (73, 32), "fstat": (5, 80), "fsync": (74, 82), "ftruncate": (77, 46),
    "futex": (202, 98), "getcwd": (79, 17), "getdents64": (217, 61), "getegid": (108, 177), "geteuid": (107, 175),
    "getgid": (104, 176), "getpeername": (52, 205), "getpid": (39, 172), "getppid": (110, 173),
    "getrandom": (318, 278), "getresgid": (120, 150), "getresuid": (118, 148), "getrusage": (98, 165),
    "getsockname": (51, 204), "getsockopt": (55, 209), "gettid": (186, 178), "gettimeofday": (96, 169),
    "getuid": (102, 174), "ioctl": (16, 29), "landlock_add_rule": (445, 445), "landlock_create_ruleset": (444, 444),
    "landlock_restrict_self": (446, 446), "linkat": (265, 37), "lseek": (8, 62), "lstat": (6, None), "madvise": (28, 233),
    "membarrier": (324, 283), "memfd_create": (319, 279), "mincore": (27, 232), "mkdir": (83, None),
    "mkdirat": (258, 34), "mmap": (9, 222), "mprotect": (10, 226), "mremap": (25, 216), "msync": (26, 227),
    "munmap": (11, 215), "nanosleep": (35, 101), "newfstatat": (262, 79), "open": (2, None), "openat": (257, 56),
    "pipe2": (293, 59), "poll": (7, None), "ppoll": (271, 73), "pread64": (17, 67), "preadv": (295, 69),
    "preadv2": (327, 286), "prlimit64": (302, 261), "pselect6": (270, 72), "pwrite64": (18, 68), "pwritev": (296, 70),
    "pwritev2": (328, 287), "read": (0, 63), "readlink": (89, None), "readlinkat": (267, 78), "readv": (19, 65),
    "recvfrom": (45, 207), "recvmmsg": (299, 243), "recvmsg": (47, 212), "rename": (82, None), "renameat": (264, 38),
    "renameat2": (316, 276), "restart_syscall": (219, 128), "rseq": (334, 293), "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sched_getaffinity": (204, 123), "sched_yield": (24, 124),
    "select": (23, None), "sendmmsg": (307, 269), "sendmsg": (46, 211), "sendto": (44, 206),
    "set_robust_list": (273, 99), "setpriority": (141, 140), "setsockopt": (54, 208), "shutdown": (48, 210), "sigaltstack": (131, 132),
    "socket": (41, 198), "socketpair": (53, 199), "splice": (275, 76), "stat": (4, None), "statx": (332, 291),
    "sync_file_range": (277, 84), "sysinfo": (99, 179), "tee": (276, 77), "tgkill": (234, 131), "time": (201, None),
    "uname": (63, 160), "umask": (95, 166), "fstatfs": (138, 44), "statfs": (137, 43), "utimensat": (280, 88),
    "sendfile": (40, 71), "unlink": (87, None), "unlinkat": (263, 35), "vmsplice": (278, 75), "write": (1, 64),
    "writev": (20, 66),
}
"""Every call some role may make: its number on x86_64 and on aarch64."""
# fmt: on

_CLONE_THREAD = 0x10000
# TCGETS FIONBIO FIONREAD FIONCLEX FIOCLEX, and FICLONERANGE, which writes to a file that is open for it
_HARMLESS_IOCTLS = (0x5401, 0x5421, 0x541B, 0x5450, 0x5451, 0x4020940D)
_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK = 1, 2, 10, 16  # netlink: getaddrinfo asks which families there are

_NETWORK = {"socket", "connect", "bind", "sendmmsg", "recvmmsg"}
_CHANGE_FILES = {
    *("mkdirat", "mkdir", "unlinkat", "unlink", "rename", "renameat", "renameat2"),
    *("pwrite64", "pwritev", "pwritev2", "ftruncate", "fallocate", "fsync", "fdatasync", "sync_file_range"),
    *("flock", "fchmod", "linkat", "utimensat", "sendfile"),
}
_SPLICE = {"splice", "tee", "vmsplice"}

WORKER = frozenset(NUMBERS) - _NETWORK - _CHANGE_FILES - {"setpriority"} | {"ftruncate", "pwrite64"}
"""No network, no change of any file (`ftruncate`, `pwrite64`: memfds)."""
FETCHER = frozenset(NUMBERS) - _SPLICE - {"linkat", "setpriority"}
"""No FUSE. Which files it may change is Landlock's part."""
STORE = frozenset(NUMBERS) - _SPLICE - _NETWORK
"""No FUSE, no network. Which files it may change is Landlock's part."""


@dataclass(frozen=True, slots=True)
class _When:
    """Allow a call only for some values of the low word of one argument; any bit of a mask when `any_bit`."""

    argument: int
    values: tuple[int, ...]
    any_bit: bool = False
    otherwise: int = errno.EPERM


_CONDITIONS: Mapping[str, _When] = {
    "clone": _When(0, (_CLONE_THREAD,), any_bit=True),  # threads, no processes
    "clone3": _When(0, (), otherwise=errno.ENOSYS),  # its flags cannot be looked at; the C library falls back to clone
    "ioctl": _When(1, _HARMLESS_IOCTLS),
    "prlimit64": _When(0, (0,)),  # our own limits
    "socket": _When(0, (_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK)),
}


def is_supported() -> bool:
    """Whether there is a table for this machine (the kernel is asked by `apply`)."""
    return platform.machine() in _ARCHITECTURES


def program(allowed: Collection[str], machine: str) -> bytes:
    """The filter as `struct sock_filter[]`."""
    column, audit_arch = _ARCHITECTURES[machine]
    code = [
        (_LD_WORD, 0, 0, _ARCH_OFFSET),
        (_JEQ, 1, 0, audit_arch),
        (_RET, 0, 0, _KILL_PROCESS),
        (_LD_WORD, 0, 0, _NR_OFFSET),
        (_JGE, 0, 1, _X32_BIT),
        (_RET, 0, 0, _KILL_PROCESS),
    ]
    for name in sorted(allowed):
        number = NUMBERS[name][column]
        if number is None:
            continue
        body = _verdict(_CONDITIONS.get(name))
        code.append((_JEQ, 0, len(body), number))
        code += body
    code.append((_RET, 0, 0, _ERRNO | errno.EPERM))
    return b"".join(_INSTRUCTION.pack(*instruction) for instruction in code)


def _verdict(when: _When | None) -> list[tuple[int, int, int, int]]:
    if when is None:
        return [(_RET, 0, 0, _ALLOW)]
    body = [(_LD_WORD, 0, 0, _ARGS_OFFSET + 8 * when.argument)] if when.values else []
    for value in when.values:
        body += [(_JSET if when.any_bit else _JEQ, 0, 1, value), (_RET, 0, 0, _ALLOW)]
    return [*body, (_RET, 0, 0, _ERRNO | when.otherwise)]


def apply(allowed: Collection[str]) -> None:
    """From now on this thread and all it starts make only these calls. Needs no_new_privs.

    Raises: OSError (EINVAL: a kernel without seccomp filters).
    """
    code = program(allowed, platform.machine())
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("<H6xQ", len(code) // _INSTRUCTION.size, ctypes.addressof(buffer))
    if _libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, header, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, f"prctl(PR_SET_SECCOMP): {os.strerror(number)}")
