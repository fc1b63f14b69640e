"""One budget for what all mounts of a node hold in memory on the way from the registry to their readers.

    lent blocks       memory that fetcher and worker share, where the cache's disk is slow or full (`csi.cache.ring`)
    fetching threads  each has a block in work
    reads             of what is not in the page cache, each with its answer in work

Interpreters, and what they have imported, come on top: about 20 MiB a mount (see docs/adr/0015).
"""

from __future__ import annotations

from dataclasses import dataclass

from csi.stream.blocks import BLOCK_BYTES

_READ_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Share:
    """What one mount may hold at once."""

    lent_blocks: int
    threads: int
    reads: int

    @property
    def size_bytes(self) -> int:
        """All of it in use."""
        return (self.lent_blocks + self.threads) * BLOCK_BYTES + self.reads * _READ_BYTES


LEAST = Share(lent_blocks=2, threads=2, reads=4)
"""With less nothing moves: one thread is for readers alone, and a block that is lent lies there while the next one comes."""
MOST = Share(lent_blocks=16, threads=16, reads=32)
"""What one mount can make use of (measured: see docs/benchmarks.md)."""


def share_within(size_bytes: int) -> Share:
    """The largest share of no more than that, between `LEAST` and `MOST`."""
    part = max(0.0, min(1.0, size_bytes / MOST.size_bytes))
    return Share(
        lent_blocks=max(LEAST.lent_blocks, int(MOST.lent_blocks * part)),
        threads=max(LEAST.threads, int(MOST.threads * part)),
        reads=max(LEAST.reads, int(MOST.reads * part)),
    )


class MemoryBudget:
    """Gives each mount half of what is left, as long as it runs: so the first ones have all they can use, and there is something
    for those that come later. Where there is not, a mount gets `LEAST`, and the budget is passed by that.
    """

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._shares: dict[str, Share] = {}

    @property
    def given_bytes(self) -> int:
        """To all mounts together."""
        return sum(share.size_bytes for share in self._shares.values())

    def share_of(self, mount_id: str) -> Share:
        """The mount's own, from now on; the same for each of its processes."""
        if mount_id not in self._shares:
            self._shares[mount_id] = share_within((self.size_bytes - self.given_bytes) // 2)
        return self._shares[mount_id]

    def give_back(self, mount_id: str) -> None:
        """It has no processes any more. Idempotent."""
        self._shares.pop(mount_id, None)
