"""Whether the next target of a mount may show plain files of the cache: native speed, and no process of ours in its reads.

    worker    which files the model has, if each of them is one whole blob
    store     puts them together, if all of them are here and hashed since the machine started
    keeper    binds that directory instead of the superblock

Who opens a file of such a target asks nobody: that is the price, and why it is done only where there is no passthrough
(`auto`), or where an administrator wishes it (`always`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from csi.control import wire
from csi.errors import ControlError, ModelMountError
from csi.supervisor.child import Child, ChildPool
from csi.supervisor.passing import PassThrough
from csi.supervisor.settings import SupervisorSettings
from csi.supervisor.store_link import StoreLink
from csi.volume import SHARED_DOMAIN

log = logging.getLogger(__name__)

_WORKER_TIMEOUT_S = 10.0
_STORE_TIMEOUT_S = 10.0


def refusal_for(settings: SupervisorSettings, passing: PassThrough | None, domain: str) -> str | None:
    """Why no target of a mount shows plain files; None when nothing that is known beforehand speaks against it."""
    if settings.seal == "never":
        return "it is switched off (--seal never)"
    if settings.seal == "auto" and (passing is None or passing.refusal is None):
        return "the kernel reads proven files by itself (--seal auto)"
    if domain != SHARED_DOMAIN:
        return "the store proves no blobs of an isolated namespace"
    if settings.store_uid is None:
        return "the store has no user of its own, as the supervisor does not run as root"
    return None


class Sealing:
    """Of one mount. `worker`: the one that serves it now."""

    def __init__(
        self,
        mount_id: str,
        domain: str,
        settings: SupervisorSettings,
        pool: ChildPool,
        store: StoreLink,
        worker: Callable[[], Child | None],
        passing: Callable[[], PassThrough | None],
    ) -> None:
        self._mount_id, self._domain, self._settings = mount_id, domain, settings
        self._pool, self._store, self._worker, self._passing = pool, store, worker, passing
        self._files_fd = -1
        self._refused: str | None = None
        """By the model itself, once and for all."""
        self._said: str | None = None

    @property
    def refusal(self) -> str | None:
        """Why the next target would not show plain files, as far as it was looked at."""
        return refusal_for(self._settings, self._passing(), self._domain) or self._refused or self._said

    async def seal(self, tree_fd: int) -> bool:
        """Have the files put together. False when the next target must show the superblock; `refusal` says why."""
        if refusal_for(self._settings, self._passing(), self._domain) or self._refused:
            return False
        try:
            if self._files_fd < 0:
                await self._ask_for_files(tree_fd)
            if self._files_fd < 0:
                return False
            await self._store.call("seal", _STORE_TIMEOUT_S, [self._files_fd], mount_id=self._mount_id)
        except ModelMountError as exc:
            self._said = exc.message
            log.debug("mount %s: is not shown as plain files: %s", self._mount_id[:8], exc)
            return False
        self._said = None
        return True

    def close(self) -> None:
        """Idempotent."""
        if self._files_fd >= 0:
            os.close(self._files_fd)
            self._files_fd = -1

    async def _ask_for_files(self, tree_fd: int) -> None:
        """Raises: ControlError, what the worker says."""
        worker, own = self._worker(), None
        if worker is None:  # it rests
            worker = own = await self._pool.take("worker")
        try:
            fields, fds = await worker.call("files", _WORKER_TIMEOUT_S, [tree_fd])
        finally:
            if own is not None:
                own.kill()
        self._refused = _text(fields, "refusal")
        if fds:
            self.close()
            self._files_fd = wire.exactly(fds, 1)[0]
        elif self._refused is None:
            raise ControlError(f"mount {self._mount_id[:8]}: its worker does not say which files it has")


def _text(fields: dict[str, Any], name: str) -> str | None:
    value = fields.get(name)
    return None if value is None else str(value)
