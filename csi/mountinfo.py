"""/proc/self/mountinfo as values. Reading it asks no file system anything, so it cannot hang on a dead mount.

Source: proc_pid_mountinfo(5).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_OCTAL = re.compile(rb"\\([0-7]{3})")
_SOURCE = "modelmount"
_SEALED_ROOT = re.compile(r".*/sealed/([0-9a-f]{16,64})(//deleted)?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class MountEntry:
    """One line. `device` is `major:minor` of the superblock, `root` the part of it that is mounted here."""

    mount_no: int
    parent_no: int
    device: str
    root: str
    mount_point: str
    options: frozenset[str]
    fs_type: str
    source: str
    super_options: frozenset[str]


def parse(data: bytes) -> list[MountEntry]:
    """In file order, so a later entry at the same mount point lies on top of an earlier one."""
    entries = []
    for line in data.split(b"\n"):  # not splitlines: a path may hold \r
        fields = line.split(b" ")
        try:
            dash = fields.index(b"-", 6)
        except ValueError:
            continue
        entries.append(
            MountEntry(
                mount_no=int(fields[0]),
                parent_no=int(fields[1]),
                device=fields[2].decode(),
                root=_unescape(fields[3]),
                mount_point=_unescape(fields[4]),
                options=frozenset(fields[5].decode().split(",")),
                fs_type=_unescape(fields[dash + 1]),
                source=_unescape(fields[dash + 2]),
                super_options=frozenset(fields[dash + 3].decode(errors="surrogateescape").split(",")),
            )
        )
    return entries


def read() -> list[MountEntry]:
    """The mounts of this process's mount name space, now."""
    with open("/proc/self/mountinfo", "rb") as file:
        return parse(file.read())


def at(entries: list[MountEntry], mount_point: str) -> list[MountEntry]:
    """What is mounted exactly there, bottom first."""
    return [entry for entry in entries if entry.mount_point == mount_point]


def sealed_mount(entry: MountEntry) -> str | None:
    """The id of the mount whose plain files are bound there, None for anything else. What is bound is told by where it lies on
    its file system: a bind has neither a name nor a superblock of its own.
    """
    match = _SEALED_ROOT.fullmatch(entry.root)
    return match[1] if match else None


def is_model(entry: MountEntry) -> bool:
    """Whether it is a mount of ours: a FUSE superblock, or plain files of the cache."""
    return entry.source == _SOURCE or sealed_mount(entry) is not None


def shows(entry: MountEntry, mount_id: str, device: str) -> bool:
    """Whether it is that mount: its superblock, or its plain files."""
    return entry.device == device or sealed_mount(entry) == mount_id


def _unescape(text: bytes) -> str:
    plain = _OCTAL.sub(lambda match: bytes([int(match[1], 8)]), text)
    return plain.decode(errors="surrogateescape")
