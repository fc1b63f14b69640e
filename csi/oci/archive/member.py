"""One entry of a tar layer, as the archive has it. What may become of it in a tree is decided elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class MemberKind(StrEnum):
    """What an entry is. Anything an archive may hold and a tree may not is `SPECIAL`."""

    FILE = "file"
    DIRECTORY = "directory"
    SYMLINK = "symlink"
    HARDLINK = "hardlink"
    SPECIAL = "special"
    """A device, fifo or socket."""


@dataclass(frozen=True, slots=True)
class Member:
    """An entry, long names resolved.

    `path` and `link_target` are as the archive has them, unchecked but for being UTF-8 text without NUL. `offset` and
    `size_bytes` say where the bytes of a `FILE` lie in the tar stream, *decoded* where the layer is compressed; both
    are 0 for every other kind. `mtime_s` is in seconds since the epoch, `executable` whether any x bit is set.
    """

    path: str
    kind: MemberKind
    offset: int
    size_bytes: int
    link_target: str = ""
    executable: bool = False
    mtime_s: int = 0
