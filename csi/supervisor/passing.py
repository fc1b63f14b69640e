"""FUSE passthrough for one mount: a proven blob gets from the store to the keeper, and its backing id to the worker.

    fetcher      has the store's copy of a blob in place, and its blocks are those the model's index names: `adopted`
    store        opens that copy, if it has hashed it since the machine started and nobody wrote to it since
    keeper       registers it with the connection
    worker       opens files that are that blob by its id, from the next open on

Worker and fetcher hand over no descriptor in this: what the kernel shows comes from the store. Where any of it cannot be,
files are read through the worker as before, and `status` says why.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from csi.control import wire
from csi.control.keeper import CollectedMount
from csi.errors import ControlError, ModelMountError, MountError
from csi.fuse.handshake import BackendName, can_pass_through, parse_init
from csi.supervisor.child import Child
from csi.supervisor.kept import KeptMounts
from csi.supervisor.settings import SupervisorSettings
from csi.supervisor.store_link import StoreLink
from csi.volume import SHARED_DOMAIN

log = logging.getLogger(__name__)

_STORE_TIMEOUT_S = 5.0
_WORKER_TIMEOUT_S = 5.0
_PATIENCE_S = (1.0, 5.0, 20.0)  # store or keeper are being started again
_IDS_PER_MESSAGE = 256


def refusal_for(settings: SupervisorSettings, collected: CollectedMount, domain: str) -> str | None:
    """Why a mount has no passthrough; None when nothing that is known beforehand speaks against it."""
    if not settings.passthrough:
        return "it is switched off (--passthrough off)"
    if collected.mount.backend != BackendName.RAW:
        return f"the {collected.mount.backend} backend has none"
    if not can_pass_through(parse_init(collected.init)):
        return "this kernel has none (Linux 6.9)"
    if domain != SHARED_DOMAIN:
        return "the store proves no blobs of an isolated namespace"
    if settings.store_uid is None:
        return "the store has no user of its own, as the supervisor does not run as root"
    return None


class PassThrough:
    """`refusal`: why this mount has none, None when it may have. `worker`: the one that serves it now."""

    def __init__(
        self,
        mount_id: str,
        keeper: KeptMounts,
        store: StoreLink,
        refusal: str | None,
        worker: Callable[[], Child | None],
    ) -> None:
        self._mount_id, self._keeper, self._store, self._worker = mount_id, keeper, store, worker
        self._refusal = refusal
        self._adopted: set[str] = set()
        self._ids: dict[str, int] = {}
        self._turn = asyncio.Lock()

    @property
    def refusal(self) -> str | None:
        """Why it has none, None when it may have."""
        return self._refusal

    def status(self) -> dict[str, Any]:
        """`blobs` are read by the kernel itself when they are opened next."""
        return {"refusal": self._refusal, "blobs": sorted(self._ids)}

    async def adopted(self, digest: str) -> None:
        """The store's copy is in place. Raises: ModelMountError."""
        self._adopted.add(digest)
        await self.offer(digest)

    async def offer(self, digest: str) -> None:
        """Open the blob by passthrough from now on, if it can be. Raises: ModelMountError."""
        async with self._turn:
            if self._refusal is not None or digest in self._ids or digest not in self._adopted:
                return
            for patience_s in (*_PATIENCE_S, 0.0):
                try:
                    backing_id = await self._backing_id(digest)
                    break
                except MountError as exc:
                    self._refusal = exc.message
                    log.info("mount %s: %s", self._mount_id[:8], exc)
                    return
                except ControlError:
                    if not patience_s:
                        raise
                    await asyncio.sleep(patience_s)
            if backing_id is not None and digest in self._adopted:
                self._ids[digest] = backing_id
                if (worker := self._worker()) is not None:
                    await _tell(worker, {digest: backing_id})

    async def withdraw(self, digest: str) -> None:
        """A block of it was found damaged: what is open goes on, nothing is opened so any more. Raises: ModelMountError."""
        if digest not in self._adopted:
            return
        self._adopted.discard(digest)
        backing_id = self._ids.pop(digest, None)
        worker = self._worker()
        if backing_id is not None and worker is not None:
            fields, _ = await worker.call("no_backing", _WORKER_TIMEOUT_S, digest=digest)
            if not fields.get("open"):
                await self._keeper.unback(self._mount_id, backing_id)
        await self._store.call("doubt", _STORE_TIMEOUT_S, mount_id=self._mount_id, digest=digest)

    async def begin_anew(self, worker: Child) -> None:
        """What a supervisor before us had told the worker does not count any more; it is found out again."""
        try:
            await worker.call("backings", _WORKER_TIMEOUT_S, ids={}, anew=True)
        except ModelMountError as exc:  # it died: its successor knows none
            log.info("mount %s: %s", self._mount_id[:8], exc)

    async def tell(self, worker: Child) -> None:
        """A new worker, which is about to be the one that serves, knows none of them. What changes meanwhile it hears too."""
        told: dict[str, int] = {}
        try:
            while told != self._ids:
                if gone := set(told) - set(self._ids):
                    digest = gone.pop()
                    del told[digest]
                    await worker.call("no_backing", _WORKER_TIMEOUT_S, digest=digest)
                else:
                    news = {digest: known for digest, known in self._ids.items() if told.get(digest) != known}
                    told |= news
                    await _tell(worker, news)
        except ModelMountError as exc:  # it died: the next one is told
            log.info("mount %s: %s", self._mount_id[:8], exc)

    async def _backing_id(self, digest: str) -> int | None:
        """None while the store has to hash the blob first; it says when that is done. Raises: MountError, ControlError."""
        _, fds = await self._store.call("backing", _STORE_TIMEOUT_S, mount_id=self._mount_id, digest=digest)
        if not fds:
            return None
        try:
            return await self._keeper.back(self._mount_id, wire.exactly(fds, 1)[0])
        finally:
            wire.close_all(fds)


async def _tell(worker: Child, ids: dict[str, int]) -> None:
    items = list(ids.items())
    for first in range(0, len(items), _IDS_PER_MESSAGE):
        await worker.call("backings", _WORKER_TIMEOUT_S, ids=dict(items[first : first + _IDS_PER_MESSAGE]))
