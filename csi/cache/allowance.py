"""How much a fetcher may still allocate. The store gives it out in parts, so that all mounts together obey the limit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from csi.errors import CacheError

_LOW_BYTES = 512 * 1024 * 1024
"""A second of a fast network: time enough to be given more."""
_ASK_AGAIN_S = 2.0


class Allowance:
    """Thread-safe. `ask` must not block; it is called when little is left, again after 2 s while nothing comes."""

    def __init__(self, ask: Callable[[], None]) -> None:
        self._ask = ask
        self._left = 0
        self._asked_at = 0.0
        self._lock = threading.Lock()

    def take(self, size_bytes: int) -> None:
        """Raises: CacheError when there is not that much, and then nothing is taken."""
        with self._lock:
            enough = self._left >= size_bytes
            if enough:
                self._left -= size_bytes
            ask = self._left < _LOW_BYTES and time.monotonic() - self._asked_at > _ASK_AGAIN_S
            if ask:
                self._asked_at = time.monotonic()
        if ask:
            self._ask()
        if not enough:
            raise CacheError("the cache has no room for more: its limit or the disk's free-space floor is reached")

    def add(self, size_bytes: int) -> None:
        """More was given."""
        with self._lock:
            self._left += size_bytes
            self._asked_at = 0.0
