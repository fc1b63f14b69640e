"""How much a fetcher may still allocate. The store gives it out in parts, so that all mounts together obey the limit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from csi.errors import CacheError

LARGEST_GRANT_BYTES = 2 * 1024**3
_LOW_BYTES = 512 * 1024 * 1024
"""A second of a fast network: time enough to be given more."""
_ASK_AGAIN_S = 2.0


class Allowance:
    """Thread-safe. `tell` says to the store how it stands (see `settle`) and must not block; it is called when little is left,
    again after 2 s while nothing comes.
    """

    def __init__(self, tell: Callable[[], None]) -> None:
        self.tell = tell
        self._left = self._taken = 0
        self._told_at = 0.0
        self._lock = threading.Lock()

    def take(self, size_bytes: int) -> None:
        """To be allocated now; `landed` when it is. Raises: CacheError when there is not that much, and then nothing is taken."""
        with self._lock:
            enough = self._left >= size_bytes
            if enough:
                self._left -= size_bytes
                self._taken += size_bytes
            tell = self._left < _LOW_BYTES and time.monotonic() - self._told_at > _ASK_AGAIN_S
            if tell:
                self._told_at = time.monotonic()
        if tell:
            self.tell()
        if not enough:
            raise CacheError("the cache has no room for more: its limit or the disk's free-space floor is reached")

    def landed(self, size_bytes: int) -> None:
        """So much of what was taken is on the disk, or will never be: until then nobody else sees it there, and it is told as ours."""
        with self._lock:
            self._taken -= size_bytes

    def add(self, size_bytes: int) -> None:
        """More was given."""
        with self._lock:
            self._left += size_bytes
            self._told_at = 0.0

    def settle(self, needed_bytes: int | None) -> tuple[int, int]:
        """Give back what is not needed for the rest of the model; None: nobody knows yet how much that is. How much may still come
        to the disk, and how much more is wanted now.
        """
        with self._lock:
            if needed_bytes is not None:
                self._left = min(self._left, max(0, needed_bytes - self._taken))
            coming = self._left + self._taken
            if self._left >= _LOW_BYTES:
                return coming, 0
            wanted = LARGEST_GRANT_BYTES if needed_bytes is None else max(0, needed_bytes - coming)
            return coming, min(LARGEST_GRANT_BYTES, wanted)
