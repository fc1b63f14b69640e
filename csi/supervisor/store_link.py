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

from csi.boot import this_boot
from csi.cache.paths import VERSION
from csi.control import wire
from csi.errors import ControlError, ModelMountError
from csi.supervisor.child import Child, ChildPool
from csi.supervisor.heartbeat import end_of
from csi.supervisor.ownership import give
from csi.supervisor.settings import SupervisorSettings

log = logging.getLogger(__name__)

_START_TIMEOUT_S = 20.0
_RESTART_DELAY_S = 1.0
_MAX_OTHER_LAYOUTS = 8  # one message's worth; the rest at the next start


class StoreLink:
    """Use from one event loop. `on_message` gets what the store says by itself."""

    def __init__(
        self, settings: SupervisorSettings, pool: ChildPool, on_message: Callable[[wire.Message], None]
    ) -> None:
        self._settings, self._pool = settings, pool
        self._on_message = on_message
        self._child: Child | None = None
        self._watcher: asyncio.Task[None] | None = None
        self.restarts = 0

    async def start(self) -> None:
        """Start it, and keep it."""
        settings = self._settings
        os.makedirs(settings.domain_dir, mode=0o755, exist_ok=True)
        for name in ("blobs", "mounts", "sealed"):
            path = os.path.join(settings.domain_dir, name)
            os.makedirs(path, mode=0o755, exist_ok=True)
            give(path, os.geteuid() if name == "mounts" else settings.store_uid, settings.store_gid, 0o775)
        domains_dir = os.path.dirname(settings.domain_dir)
        for domain in os.listdir(domains_dir):  # it evicts what isolated ones do not use
            if os.path.isdir(path := os.path.join(domains_dir, domain, "mounts")):
                give(path, os.geteuid(), settings.store_gid, 0o775)
        os.chmod(settings.cache_dir, 0o700)  # inside, only descriptors lead anywhere
        for path in _other_layouts(settings.cache_dir):
            _remove_empty(path)
        try:
            await self._spawn()
        except ModelMountError as exc:  # mounts go on without it, and it is tried again
            log.error("the store does not start: %s", exc)
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
        child, self._child = self._child, None
        if child is not None:
            await child.stop()

    @property
    def pid(self) -> int | None:
        """Its process id, None while it is away."""
        return self._child.pid if self._child is not None else None

    async def _spawn(self) -> None:
        child = await self._pool.fork("store")
        child.on_notification = self._on_message
        fds = [
            os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            for path in (
                self._settings.domain_dir,
                os.path.dirname(self._settings.domain_dir),
                *_other_layouts(self._settings.cache_dir),
            )
        ]
        try:
            await child.call(
                "start",
                _START_TIMEOUT_S,
                fds,
                max_bytes=self._settings.cache_limit_bytes,
                min_free=self._settings.cache_min_free,
                boot=this_boot().hex(),
            )
        except BaseException:
            child.kill()
            raise
        finally:
            wire.close_all(fds)
        self._child = child

    async def _watch(self) -> None:
        while True:
            if self._child is not None:
                status = await end_of(self._child, lambda what: None)  # which is in the log
                self._child = None
                self.restarts += 1
                log.warning("the store ended with status %s; it is started again", status)
            await asyncio.sleep(_RESTART_DELAY_S)
            with contextlib.suppress(ModelMountError):
                await self._spawn()


def _other_layouts(cache_dir: str) -> list[str]:
    """Caches that another version of this program has left."""
    names = [name for name in os.listdir(cache_dir) if name[:1] == "v" and name[1:].isdecimal()]
    return [os.path.join(cache_dir, name) for name in sorted(names) if name != f"v{VERSION}"][:_MAX_OTHER_LAYOUTS]


def _remove_empty(path: str) -> None:
    """What the store of the start before has emptied, and could not remove."""
    for directory, _, _ in os.walk(path, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(directory)
