"""What happened since a fetcher started, for status and metrics."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from csi.errors import ModelMountError


@dataclass(slots=True)
class Counters:
    """Guarded by the engine's lock."""

    fetched_bytes: int = 0
    fetched_blocks: int = 0
    retries: int = 0
    cache_errors: int = 0
    rejected_blocks: int = 0
    """Received, and not what the index says."""
    rechecked_blocks: int = 0
    """Found in the cache at the start, and right."""
    damaged_blocks: int = 0
    """Found in the cache at the start, and not right: fetched again."""
    demanded_blocks: int = 0
    lent_blocks: int = 0
    """Handed to readers in memory, because the disk was full, broken or slow."""
    unwritten_blocks: int = 0
    """Of those, the ones that were not written at all."""
    last_error: ModelMountError | None = None
    last_error_at: float = 0.0
    last_block_at: float = 0.0
    started_at: float = field(default_factory=time.time)

    def note_error(self, error: ModelMountError) -> None:
        """The last one is what status shows."""
        self.last_error, self.last_error_at = error, time.time()

    def as_fields(self) -> dict[str, object]:
        """As JSON has them."""
        return {
            "fetched_bytes": self.fetched_bytes,
            "fetched_blocks": self.fetched_blocks,
            "demanded_blocks": self.demanded_blocks,
            "lent_blocks": self.lent_blocks,
            "unwritten_blocks": self.unwritten_blocks,
            "retries": self.retries,
            "cache_errors": self.cache_errors,
            "rejected_blocks": self.rejected_blocks,
            "rechecked_blocks": self.rechecked_blocks,
            "damaged_blocks": self.damaged_blocks,
            "last_error": self.last_error.message if self.last_error else None,
            "last_error_kind": type(self.last_error).__name__ if self.last_error else None,
            "last_error_at": self.last_error_at,
            "last_block_at": self.last_block_at,
            "started_at": self.started_at,
        }
