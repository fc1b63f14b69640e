"""The INIT handshake, answered by the keeper once per mount and never again.

A worker that serves the mount later (after a crash, after an upgrade) does not negotiate: it must be able to
live with what was answered here. So the answer is a constant with a version, masked by what the kernel offers;
a changed constant gets a new number, and old mounts keep theirs until they are unmounted.

Source: linux include/uapi/linux/fuse.h (protocol 7.45), struct fuse_init_in / fuse_init_out.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntFlag, StrEnum

from csi.errors import MountError
from csi.fuse.wire import IN_HEADER, OUT_HEADER, Opcode

INIT_SET_VERSION = 2


class BackendName(StrEnum):
    """Who serves a mount. Decided when it is made, and never changed while it lives: the answer to INIT depends on it,
    and O_NONBLOCK belongs to the connection, which pyfuse3 cannot stand.
    """

    PYFUSE3 = "pyfuse3"
    RAW = "raw"


_INIT_IN = struct.Struct("<IIIII44x")  # major minor max_readahead flags flags2 unused[11]
_INIT_IN_MINIMUM = struct.Struct("<IIII")
_INIT_OUT = struct.Struct("<IIIIHHIIHHIIH22x")

NOTIFY_RESEND = 7
RESEND_MESSAGE = OUT_HEADER.pack(OUT_HEADER.size, NOTIFY_RESEND, 0)
"""Written to /dev/fuse: requests that were read and never answered are queued again (Linux 6.9)."""

_MAJOR, _MINOR = 7, 45


class InitFlag(IntFlag):
    """The INIT flags we use, `flags` in the low and `flags2` in the high 32 bits."""

    ASYNC_READ = 1 << 0
    BIG_WRITES = 1 << 5
    DO_READDIRPLUS = 1 << 13
    ASYNC_DIO = 1 << 15
    PARALLEL_DIROPS = 1 << 18
    ABORT_ERROR = 1 << 21
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23
    INIT_EXT = 1 << 30
    PASSTHROUGH = 1 << 37
    HAS_RESEND = 1 << 39
    ALLOW_IDMAP = 1 << 40


# AUTO_INVAL_DATA is left out (nothing ever changes), READDIRPLUS_AUTO too: pyfuse3 has no plain READDIR.
_WANTED = (
    InitFlag.ASYNC_READ
    | InitFlag.DO_READDIRPLUS
    | InitFlag.ASYNC_DIO
    | InitFlag.PARALLEL_DIROPS
    | InitFlag.MAX_PAGES
    | InitFlag.CACHE_SYMLINKS
    | InitFlag.INIT_EXT
    | InitFlag.PASSTHROUGH
    | InitFlag.HAS_RESEND
    | InitFlag.ALLOW_IDMAP
)
_MAX_BACKGROUND = 6144  # page-cache reads that may wait at once; one more, and cached files wait with them
_CONGESTION_THRESHOLD = 96
_MAX_PAGES = {BackendName.PYFUSE3: 256, BackendName.RAW: 4096}
"""Pages per request: 1 MiB, pyfuse3 reads no larger ones; 16 MiB, but never more than fs.fuse.max_pages_limit."""
_MAX_WRITE = 128 * 1024  # nothing is written; the kernel wants at least a page
_MAX_STACK_DEPTH = 1  # passthrough backing files on plain file systems; leaves room for an overlay on top


@dataclass(frozen=True, slots=True)
class InitRequest:
    """What the kernel sent. `raw` is kept and replayed to every worker of the mount."""

    unique: int
    major: int
    minor: int
    max_readahead: int
    offered: int
    raw: bytes


def parse_init(raw: bytes) -> InitRequest:
    """Raises: MountError when these are not the bytes of a FUSE 7.36 (Linux 5.16) or later INIT request."""
    if len(raw) < IN_HEADER.size + _INIT_IN_MINIMUM.size:
        raise MountError(f"FUSE INIT request has {len(raw)} bytes, expected 104")
    length, opcode, unique, *_ = IN_HEADER.unpack_from(raw)
    if opcode != Opcode.INIT or length != len(raw):
        raise MountError(f"expected a FUSE INIT request, got opcode {opcode} with {length} of {len(raw)} bytes")
    major, minor, max_readahead, flags = _INIT_IN_MINIMUM.unpack_from(raw, IN_HEADER.size)
    if (major, minor) < (7, 36):
        raise MountError(f"this kernel speaks FUSE {major}.{minor}; ModelMount needs 7.36 (Linux 5.16) or later")
    flags2 = 0
    if flags & InitFlag.INIT_EXT and len(raw) >= IN_HEADER.size + _INIT_IN.size:
        flags2 = _INIT_IN.unpack_from(raw, IN_HEADER.size)[4]
    return InitRequest(unique, major, minor, max_readahead, flags | flags2 << 32, raw)


def init_reply(request: InitRequest, backend: BackendName) -> bytes:
    """The whole reply, header included: the set of that backend, masked by what the kernel offers."""
    agreed = _WANTED & request.offered
    return OUT_HEADER.pack(OUT_HEADER.size + _INIT_OUT.size, 0, request.unique) + _INIT_OUT.pack(
        _MAJOR,
        min(_MINOR, request.minor),
        request.max_readahead,
        agreed & 0xFFFFFFFF,
        _MAX_BACKGROUND,
        _CONGESTION_THRESHOLD,
        _MAX_WRITE,
        1,  # time granularity, ns
        _MAX_PAGES[backend],
        0,  # map alignment (DAX)
        agreed >> 32,
        _MAX_STACK_DEPTH if agreed & InitFlag.PASSTHROUGH else 0,
        0,  # request timeout: none; a slow registry must not abort the connection
    )


def can_pass_through(request: InitRequest) -> bool:
    """Whether the kernel can read files of the cache by itself (Linux 6.9 and later)."""
    return bool(request.offered & InitFlag.PASSTHROUGH)


def can_resend(request: InitRequest) -> bool:
    """Whether the kernel gives out again what a dead worker had taken (Linux 6.9 and later)."""
    return bool(request.offered & InitFlag.HAS_RESEND)
