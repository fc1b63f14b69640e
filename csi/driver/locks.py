"""Locks by name. A second caller is refused after its patience, never queued for good: kubelet and the sidecars repeat."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from weakref import WeakValueDictionary

from csi.errors import OperationPendingError


class NamedLocks:
    """Use from one event loop. A lock lives while somebody holds it or waits for it."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @contextlib.asynccontextmanager
    async def held(self, name: str, patience_s: float = 0.0) -> AsyncIterator[None]:
        """Raises: OperationPendingError when another call holds it for longer than `patience_s`."""
        lock = self._locks.get(name)
        if lock is None:
            lock = self._locks[name] = asyncio.Lock()
        if patience_s <= 0 and lock.locked():
            raise self._pending(name)
        try:
            async with asyncio.timeout(patience_s or None):
                await lock.acquire()
        except TimeoutError:
            raise self._pending(name) from None
        try:
            yield
        finally:
            lock.release()

    def _pending(self, name: str) -> OperationPendingError:
        return OperationPendingError(
            f"{self._kind} {name}: another call is working on it; it will be done when you call again",
            target_path=name,
        )
