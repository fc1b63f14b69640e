"""What mounts may still allocate: the room in the cache that is nobody else's. Decisions only, as in `eviction`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from csi.cache.allowance import LARGEST_GRANT_BYTES
from csi.store.eviction import Entry, Kind
from csi.stream.blocks import SEGMENT_BYTES


def share_of(room_bytes: int, wanted_bytes: int) -> int:
    """How much of the room one mount is given at once: no more than half, so that one which reads little of a large model does
    not keep out the rest, but what it allocates in one piece where that is there. It may ask again.
    """
    return max(0, min(wanted_bytes, LARGEST_GRANT_BYTES, room_bytes, max(room_bytes // 2, SEGMENT_BYTES)))


@dataclass(slots=True)
class _Reserve:
    """`size_bytes`: of the mount's area, when `left_bytes` was true."""

    left_bytes: int
    size_bytes: int


class Reserves:
    """By mount: what it said last that it may allocate, less what its area has grown since then."""

    def __init__(self) -> None:
        self._by_mount: dict[str, _Reserve] = {}

    def tell(self, mount_id: str, left_bytes: int, entries: Iterable[Entry]) -> None:
        """A mount says what it may still allocate. That is all it may: a fetcher's allowance ends with it."""
        sizes = (entry.size_bytes for entry in entries if entry.kind is Kind.AREA and entry.name == mount_id)
        self._by_mount[mount_id] = _Reserve(left_bytes, next(sizes, 0))

    def give(self, mount_id: str, more_bytes: int) -> None:
        """It may allocate more than it said."""
        if (reserve := self._by_mount.get(mount_id)) is not None:  # else its area is gone, or in a domain of its own
            reserve.left_bytes += more_bytes

    def total(self, entries: Iterable[Entry]) -> int:
        """What all of them may still allocate; mounts that are not in use are forgotten."""
        live = {entry.name: entry.size_bytes for entry in entries if entry.kind is Kind.AREA and entry.in_use}
        for mount_id in set(self._by_mount) - set(live):
            del self._by_mount[mount_id]
        for mount_id, reserve in self._by_mount.items():
            grown = max(0, live[mount_id] - reserve.size_bytes)  # it shrinks where a blob becomes a proven one
            reserve.left_bytes = max(0, reserve.left_bytes - grown)
            reserve.size_bytes = live[mount_id]
        return sum(reserve.left_bytes for reserve in self._by_mount.values())
