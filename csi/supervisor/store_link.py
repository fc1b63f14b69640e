"""The supervisor's store: started with it, started again when it dies. While it is away nothing is shared or evicted, and
mounts go on with what they were granted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

from csi.control import wire
from csi.errors import ControlError, ModelMountError
from csi.supervisor.child import Child, Role
from csi.supervisor.ownership import give
from csi.supervisor.settings import SupervisorSettings

log = logging.getLogger(__name__)

_START_TIMEOUT_S = 20.0
_RESTART_DELAY_S = 1.0


class StoreLink:
    """Use from one event loop. `on_message` gets what the store says by itself."""

    def __init__(self, settings: SupervisorSettings, on_message: Callable[[wire.Message], None]) -> None:
        self._settings = settings
        self._on_message = on_message
        self._child: Child | None = None
        self._watcher: asyncio.Task[None] | None = None
        self.restarts = 0

    async def start(self) -> None:
        """Start it, and keep it."""
        settings = self._settings
        os.makedirs(settings.domain_dir, mode=0o755, exist_ok=True)
        for name in ("blobs", "mounts"):
            path = os.path.join(settings.domain_dir, name)
            os.makedirs(path, mode=0o755, exist_ok=True)
            give(path, settings.store_uid if name == "blobs" else os.geteuid(), settings.store_gid, 0o775)
        os.chmod(os.path.join(settings.data_dir, "cache"), 0o700)  # inside, only descriptors lead anywhere
        await self._spawn()
        self._watcher = asyncio.create_task(self._watch())

    async def call(
        self, op: str, timeout_s: float, fds: Sequence[int] = (), **fields: Any
    ) -> tuple[wire.Message, list[int]]:
        """Raises: ControlError while it is away, and its own errors."""
        if self._child is None:
            raise ControlError("the store is being started")
        return await self._child.call(op, timeout_s, fds, **fields)

    async def close(self) -> None:
        """Idempotent."""
        if self._watcher is not None:
            self._watcher.cancel()
        if self._child is not None:
            await self._child.stop()

    @property
    def pid(self) -> int | None:
        """Its process id, None while it is away."""
        return self._child.pid if self._child is not None else None

    async def _spawn(self) -> None:
        child = await Child.spawn(
            Role("store", self._settings.store_uid, self._settings.store_gid, self._settings.jail_flags())
        )
        child.on_notification = self._on_message
        domain_fd = os.open(self._settings.domain_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            await child.call(
                "start",
                _START_TIMEOUT_S,
                [domain_fd],
                max_bytes=self._settings.cache_limit_bytes,
                min_free=self._settings.cache_min_free,
            )
        except BaseException:
            child.kill()
            raise
        finally:
            os.close(domain_fd)
        self._child = child

    async def _watch(self) -> None:
        while True:
            if self._child is not None:
                status = await asyncio.shield(self._child.exited)
                self._child = None
                self.restarts += 1
                log.warning("the store ended with status %s; it is started again", status)
            await asyncio.sleep(_RESTART_DELAY_S)
            with contextlib.suppress(ModelMountError):
                await self._spawn()
