"""What leaves the cache, and how much may still come in. Decisions only: sizes and times in, names out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What an entry of the cache is."""

    BLOB = "blob"
    """Proven: its sha256 was checked by the store. Shared by all mounts that have it."""
    AREA = "area"
    """What one mount fetched, and nobody proved yet."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that is kept or leaves as a whole. `size_bytes`: what the disk gets back. `domain`: of an area of an isolated trust
    domain; the store's own is "".
    """

    kind: Kind
    name: str
    size_bytes: int
    last_used: float
    in_use: bool
    pinned: bool = False
    domain: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """`max_bytes` 0: no limit but the floor. Above the limit (the high watermark) entries leave until `low` of it is
    reached, so that they do not leave one by one. The floor is the share of the file system that stays free; kubelet
    begins to evict pods at 15 % (imagefs.available).
    """

    max_bytes: int = 0
    min_free: float = 0.16
    low: float = 0.9


@dataclass(frozen=True, slots=True)
class Disk:
    """The cache's file system."""

    total_bytes: int
    free_bytes: int

    def less(self, reserved_bytes: int) -> Disk:
        """As it will be when what mounts may still allocate is allocated."""
        return Disk(self.total_bytes, self.free_bytes - reserved_bytes)


def room(limits: Limits, disk: Disk, used_bytes: int) -> int:
    """How many bytes may still be added; negative when there are too many."""
    by_floor = disk.free_bytes - int(disk.total_bytes * limits.min_free)
    return by_floor if not limits.max_bytes else min(by_floor, limits.max_bytes - used_bytes)


def to_evict(entries: Iterable[Entry], needed_bytes: int) -> list[Entry]:
    """The least recently used entries that free that much, or all that may leave. Never one in use or pinned."""
    chosen: list[Entry] = []
    for entry in sorted(entries, key=lambda entry: (entry.last_used, entry.name)):
        if needed_bytes <= 0:
            break
        if not entry.in_use and not entry.pinned:
            chosen.append(entry)
            needed_bytes -= entry.size_bytes
    return chosen


def evict_for(limits: Limits, disk: Disk, used_bytes: int, wanted_bytes: int, entries: Iterable[Entry]) -> list[Entry]:
    """What leaves so that `wanted_bytes` may come: nothing while there is room, else down to the low watermark."""
    left = room(limits, disk, used_bytes)
    if left >= wanted_bytes:
        return []
    slack = int(limits.max_bytes * (1 - limits.low)) if limits.max_bytes else 0
    return to_evict(entries, wanted_bytes - left + slack)
