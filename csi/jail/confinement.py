"""The whole jail of a worker, a fetcher or the store: user, limits, Landlock, seccomp, and a test that it holds.

    worker    reads the node's cache, later only its mount's area of it; no network, changes no file, starts nothing
    fetcher   connects; changes files below the cache, later only in its mount's area; reads what TLS and name
              resolution need, and the OCI layouts an administrator allows; listens nowhere, starts nothing
    store     changes files below the cache; no network, starts nothing

In two steps, because children are started before it is known what they will serve: `enter` after the imports and
before the first message, `narrow_to` when the mount's area arrives.

The limit on memory is RLIMIT_DATA: private memory, which is what a parser fed with hostile input grows. A process
that meets it ends by itself; the alternative is the container's OOM killer, which takes everybody.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import resource
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from csi.errors import MountError
from csi.jail import landlock, seccomp
from csi.jail.landlock import CHANGE, EVERYTHING, READ, Files, Net
from csi.jail.privileges import become, no_new_privileges, undumpable

log = logging.getLogger(__name__)

_MIB = 1024 * 1024
_PTRACE_ATTACH, _NO_SUCH_PID = 16, 0x7FFFFFFF
_libc = ctypes.CDLL(None, use_errno=True)


class Role(StrEnum):
    """Who is jailed."""

    WORKER = "worker"
    FETCHER = "fetcher"
    STORE = "store"


class Policy(StrEnum):
    """What to do where the kernel lacks a part."""

    REQUIRE = "require"
    """Refuse to serve."""
    DEGRADE = "degrade"
    """Serve without that part, and say so in log, ping and status."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """What holds. `missing`: parts this kernel does not have."""

    own_user: bool
    landlock_abi: int
    seccomp: bool
    missing: tuple[str, ...] = ()

    def as_fields(self) -> dict[str, object]:
        """For `ping` and status."""
        return {
            "own_user": self.own_user,
            "landlock_abi": self.landlock_abi,
            "seccomp": self.seccomp,
            "missing": list(self.missing),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Confinement:
    """What a child is told at its start. `data_dir` holds the cache; `read_dirs`: OCI layouts a fetcher may read."""

    role: Role
    policy: Policy
    data_dir: str
    read_dirs: Sequence[str] = ()
    uid: int | None = None
    gid: int | None = None
    memory_mib: int = 0
    """Private memory, 0: no limit."""

    def enter(self) -> Level:
        """Take on the jail for good. Raises: MountError when a part is missing (policy REQUIRE) or does not hold."""
        allowed = _open_allowed(self)
        if self.uid is not None:
            assert self.gid is not None
            become(self.uid, self.gid)
        else:
            no_new_privileges()
        undumpable()
        if self.memory_mib:
            resource.setrlimit(resource.RLIMIT_DATA, (self.memory_mib * _MIB, self.memory_mib * _MIB))
        missing = []
        version = landlock.abi()
        if version:
            landlock.restrict(EVERYTHING, allowed, _DENIED_NET[self.role])
        else:
            missing.append("Landlock (Linux 5.13, and 'landlock' in the kernel's lsm= list)")
        for fd, _ in allowed:
            os.close(fd)
        if 0 < version < _NET_ABI:
            missing.append("Landlock for TCP (Linux 6.7)")
        has_seccomp = _apply_seccomp(self.role)
        if not has_seccomp:
            missing.append("seccomp filters")
        level = Level(own_user=self.uid is not None, landlock_abi=version, seccomp=has_seccomp, missing=tuple(missing))
        if missing and self.policy is Policy.REQUIRE:
            raise MountError(
                f"{self.role}: this kernel lacks {', '.join(missing)}; --jail degrade would serve without it"
            )
        if missing:
            log.warning("%s serves in a weaker jail: this kernel lacks %s", self.role, ", ".join(missing))
        if holes := escapes(self.role, level):
            raise MountError(f"{self.role}: the jail does not hold: {', '.join(holes)} worked; it serves nothing")
        return level


def narrow_to(role: Role, area_fd: int) -> None:
    """From now on only the files of this area: to read them for a worker, to change any for a fetcher.

    Does nothing on a kernel without Landlock. Raises: OSError.
    """
    if landlock.abi():
        if role is Role.WORKER:
            landlock.restrict(EVERYTHING, [(area_fd, READ)])
        else:
            landlock.restrict(CHANGE, [(area_fd, CHANGE)])


_NET_ABI = 4
_DENIED_NET = {Role.WORKER: Net.BIND | Net.CONNECT, Role.FETCHER: Net.BIND, Role.STORE: Net.BIND | Net.CONNECT}
_CALLS = {Role.WORKER: seccomp.WORKER, Role.FETCHER: seccomp.FETCHER, Role.STORE: seccomp.STORE}
# TLS roots, name resolution and its plug-ins, and what the C library loads for them.
_FETCHER_READS = ("/etc", "/usr", "/lib", "/lib64", "/run/systemd/resolve", "/proc/sys/kernel/random")


def _open_allowed(confinement: Confinement) -> list[tuple[int, Files]]:
    own = READ if confinement.role is Role.WORKER else READ | CHANGE
    paths: list[tuple[str, Files]] = [(confinement.data_dir, own)]
    if confinement.role is Role.FETCHER:
        import ssl  # of no use to a worker

        roots = ssl.get_default_verify_paths()
        named = (roots.cafile, roots.capath, roots.openssl_cafile, roots.openssl_capath, sys.prefix, sys.base_prefix)
        reads = [*_FETCHER_READS, *confinement.read_dirs, *(path for path in named if path)]
        paths += [(path, READ) for path in reads]
    opened = []
    for path, rights in paths:
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:  # not on this system: then there is nothing to allow
            continue
        is_directory = os.path.isdir(path)
        opened.append((fd, rights if is_directory else rights & Files.READ_FILE))
    return opened


def _apply_seccomp(role: Role) -> bool:
    if not seccomp.is_supported():
        return False
    try:
        seccomp.apply(_CALLS[role])
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.ENOSYS):
            raise
        return False
    return True


def escapes(role: Role, level: Level) -> list[str]:
    """What works and must not, tried for real. Only what the level claims is tried."""
    attempts: list[tuple[str, Callable[[], object]]] = []
    if level.landlock_abi:
        # Writable in containers too, whose root often is not.
        where = next((path for path in ("/dev/shm", "/tmp") if os.path.isdir(path)), "/")  # noqa: S108
        attempts.append((f"creating a file in {where}", lambda: os.close(os.open(where, os.O_TMPFILE | os.O_RDWR))))
        if role is not Role.FETCHER:
            attempts.append(("reading /etc/passwd", lambda: os.close(os.open("/etc/passwd", os.O_RDONLY))))
    if level.seccomp:
        attempts += [
            ("execve", lambda: _call("execve", b"", None, None)),
            ("ptrace", lambda: _call("ptrace", _PTRACE_ATTACH, _NO_SUCH_PID, None, None)),
            ("mount", lambda: _call("mount", None, None, None, 0, None)),
            ("fork", _fork),
            ("unshare", lambda: _call("unshare", 0x10000000)),  # CLONE_NEWUSER
        ]
        if role is not Role.FETCHER:
            attempts.append(("socket", lambda: socket.socket(socket.AF_INET).close()))
        else:
            attempts.append(("packet socket", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM).close()))
    return [name for name, attempt in attempts if not _fails(attempt)]


def _fails(attempt: Callable[[], object]) -> bool:
    """EPERM and EACCES are the jail's, EROFS is the container's; any other error means that the kernel looked at the request."""
    try:
        attempt()
    except OSError as exc:
        return exc.errno in (errno.EPERM, errno.EACCES, errno.EROFS)
    return False


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _fork() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
