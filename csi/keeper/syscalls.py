"""Thin ctypes wrappers over the mount system calls. Each raises OSError; none decides anything.

Source: mount(2), umount2(2), open_tree(2), move_mount(2), mount_setattr(2), openat2(2).
"""

from __future__ import annotations

import ctypes
import os
import struct

_libc = ctypes.CDLL(None, use_errno=True)

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_NOATIME = 1, 2, 4, 8, 1024
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8

_SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_OPENAT2, _SYS_MOUNT_SETATTR = 428, 429, 437, 442  # all architectures

_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_OPEN_TREE_CLONE = 1
_OPEN_TREE_CLOEXEC = os.O_CLOEXEC
_MOVE_MOUNT_F_EMPTY_PATH, _MOVE_MOUNT_T_EMPTY_PATH = 0x04, 0x40

MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC = 1, 2, 4, 8
MOUNT_ATTR_NOATIME = 0x10
_MOUNT_ATTR_ATIME_MASK = 0x70

RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_BENEATH = 0x02, 0x04, 0x08

_MOUNT_ATTR = struct.Struct("<QQQQ")  # attr_set attr_clr propagation userns_fd
_OPEN_HOW = struct.Struct("<QQQ")  # flags mode resolve


def _check(result: int, subject: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), subject)
    return result


def _syscall(number: int, *arguments: object) -> int:
    return int(_libc.syscall(ctypes.c_long(number), *arguments))


def mount_fuse(target: str, source: str, flags: int, options: str) -> None:
    """mount(2) of a FUSE superblock; `options` names the open /dev/fuse descriptor (`fd=N`)."""
    _check(
        _libc.mount(
            os.fsencode(source),
            os.fsencode(target),
            b"fuse.modelmount",
            ctypes.c_ulong(flags),
            options.encode(),
        ),
        target,
    )


def detach(name: str) -> None:
    """umount2(MNT_DETACH | UMOUNT_NOFOLLOW): never waits for the file system behind it."""
    _check(_libc.umount2(os.fsencode(name), MNT_DETACH | UMOUNT_NOFOLLOW), name)


def clone_tree(path: str) -> int:
    """A detached copy of the mount at `path`, as a descriptor that `attach_tree` puts somewhere."""
    return _check(
        _syscall(
            _SYS_OPEN_TREE,
            ctypes.c_int(_AT_FDCWD),
            os.fsencode(path),
            ctypes.c_uint(_OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC),
        ),
        path,
    )


def set_tree_attributes(tree_fd: int, attributes: int) -> None:
    """mount_setattr(2) on a detached tree, before anybody can see it."""
    attr = ctypes.create_string_buffer(
        _MOUNT_ATTR.pack(
            attributes,
            _MOUNT_ATTR_ATIME_MASK if attributes & MOUNT_ATTR_NOATIME else 0,
            0,
            0,
        ),
        _MOUNT_ATTR.size,
    )
    _check(
        _syscall(
            _SYS_MOUNT_SETATTR,
            ctypes.c_int(tree_fd),
            b"",
            ctypes.c_uint(_AT_EMPTY_PATH),
            attr,
            ctypes.c_size_t(_MOUNT_ATTR.size),
        ),
        "mount_setattr",
    )


def attach_tree(tree_fd: int, target_fd: int) -> None:
    """move_mount(2) of a detached tree onto the directory behind `target_fd`: no path is walked again."""
    _check(
        _syscall(
            _SYS_MOVE_MOUNT,
            ctypes.c_int(tree_fd),
            b"",
            ctypes.c_int(target_fd),
            b"",
            ctypes.c_uint(_MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH),
        ),
        "move_mount",
    )


def open_beneath(directory_fd: int, relative_path: str) -> int:
    """openat2(2): an O_PATH descriptor of a directory below `directory_fd`, following no link of any kind.

    Raises: OSError ELOOP for a symbolic link on the way, EXDEV for a way out.
    """
    how = ctypes.create_string_buffer(
        _OPEN_HOW.pack(
            os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC,
            0,
            RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS,
        ),
        _OPEN_HOW.size,
    )
    return _check(
        _syscall(
            _SYS_OPENAT2,
            ctypes.c_int(directory_fd),
            os.fsencode(relative_path),
            how,
            ctypes.c_size_t(_OPEN_HOW.size),
        ),
        relative_path,
    )
