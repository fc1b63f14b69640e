"""The FUSE messages we read and write: layouts, opcodes, and the replies as bytes. No I/O.

Source: linux include/uapi/linux/fuse.h (protocol 7.45). All numbers are in host order, which is little endian on
every machine we run on.
"""

from __future__ import annotations

import struct
from enum import IntEnum

IN_HEADER = struct.Struct("<IIQQIIIHH")  # len opcode unique nodeid uid gid pid total_extlen padding
OUT_HEADER = struct.Struct("<IiQ")  # len error unique
READ_IN = struct.Struct("<QQIIQII")  # fh offset size read_flags lock_owner flags padding; READDIRPLUS too
OPEN_IN = struct.Struct("<II")  # flags open_flags
RELEASE_IN = struct.Struct("<QIIQ")  # fh flags release_flags lock_owner
_ATTR = "QQQQQQIIIIIIIIII"  # ino size blocks atime mtime ctime *nsec mode nlink uid gid rdev blksize flags
ENTRY_OUT = struct.Struct("<QQQQII" + _ATTR)  # nodeid generation entry_valid attr_valid *nsec attr
ATTR_OUT = struct.Struct("<QII" + _ATTR)  # attr_valid nsec dummy attr
OPEN_OUT = struct.Struct("<QIi")  # fh open_flags backing_id
STATFS_OUT = struct.Struct("<QQQQQIII28x")  # blocks bfree bavail files ffree bsize namelen frsize
DIRENT = struct.Struct("<QQII")  # ino off namelen type; the name follows, padded to 8 bytes

RESEND_BIT = 1 << 63
"""Set in the `unique` of a request that RESEND made the kernel give out again."""


class Opcode(IntEnum):
    """The requests we know by name; every other is answered ENOSYS."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    READLINK = 5
    OPEN = 14
    READ = 15
    STATFS = 17
    RELEASE = 18
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    RELEASEDIR = 29
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    READDIRPLUS = 44


UNANSWERED = frozenset({Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT})
"""The kernel waits for no reply to these."""


class OpenFlag(IntEnum):
    """`open_flags` of a reply to OPEN and OPENDIR."""

    KEEP_CACHE = 1 << 1
    CACHE_DIR = 1 << 3
    PASSTHROUGH = 1 << 7


def reply_header(unique: int, payload_bytes: int, error: int = 0) -> bytes:
    """The 16 bytes before a payload. `error` is a positive errno, and then there is no payload."""
    return OUT_HEADER.pack(OUT_HEADER.size + payload_bytes, -error, unique)


def dirent(inode: int, next_offset: int, kind: int, name: bytes) -> bytes:
    """One name of a listing. `kind` is the file type as in st_mode >> 12."""
    return DIRENT.pack(inode, next_offset, len(name), kind) + name + bytes(-len(name) % 8)
