"""The half of a mount that brings its bytes: one fetcher, replaced when it dies, and what the store grants and shares.

The worker asks a new fetcher again for what it waits for, so a fetcher's death costs a reader time and nothing else. Two
fetchers never write into one area: the one before is gone when the next one's engine starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from csi.cache.allowance import LARGEST_GRANT_BYTES
from csi.control import wire
from csi.control.keeper import KeptSlot
from csi.errors import ControlError, InvalidVolumeError, ModelMountError
from csi.oci.reference import Reference
from csi.supervisor.area import open_area
from csi.supervisor.child import Child, ChildPool, adopted
from csi.supervisor.half import Half
from csi.supervisor.heartbeat import end_of
from csi.supervisor.kept import KeptMounts
from csi.supervisor.lease import Source
from csi.supervisor.memory import MemoryBudget
from csi.supervisor.passing import PassThrough
from csi.supervisor.resolve import send_hosts
from csi.supervisor.settings import SupervisorSettings
from csi.supervisor.store_link import StoreLink
from csi.volume import SHARED_DOMAIN, MountKey, Verify

log = logging.getLogger(__name__)

_START_TIMEOUT_S = 20.0
_STORE_TIMEOUT_S = 5.0
_PROOF_TIMEOUT_S = 300.0  # one block, however slow the link: who publishes hears before that it takes time
_STATS_LIMIT_BYTES = 64 * 1024 * 1024
_AWAKE_PATIENCE_S = 10.0
_FIRST_DELAY_S = 0.2  # after a start that failed
_LONGEST_DELAY_S = 10.0
_SLOT = "fetcher"


@dataclass(frozen=True, slots=True)
class _Told:
    """What a fetcher was told when it started, and may be otherwise by the time it is the mount's."""

    sources: list[Source] = field(repr=False)
    fill: bool


class Fetching(Half):
    """Of one mount. `sources` says where bytes may come from at any time; `event` remembers what people should know.

    `on_replaced` is awaited when another fetcher serves the mount; the worker needs a channel to it then.
    """

    def __init__(
        self,
        key: MountKey,
        keeper: KeptMounts,
        pool: ChildPool,
        store: StoreLink,
        settings: SupervisorSettings,
        sources: Callable[[], list[Source]],
        event: Callable[[str, str], None],
        on_replaced: Callable[[], Awaitable[None]],
        may_rest: Callable[[], bool],
        memory: MemoryBudget,
    ) -> None:
        super().__init__(_LONGEST_DELAY_S)
        self._key, self._name = key, key.mount_id[:8]
        self._keeper, self._pool, self._store, self._settings = keeper, pool, store, settings
        self._sources, self._event, self._on_replaced = sources, event, on_replaced
        self._may_rest, self._memory = may_rest, memory
        self._wanted = asyncio.Event()
        self._last_stats: dict[str, Any] = {}
        self.resting = False
        """The model is complete and nobody reads it, so no fetcher runs; the next worker, or question, starts one."""
        self._asides: set[asyncio.Task[None]] = set()
        self._next: tuple[Child, _Told] | None = None
        self._layout_fd = -1
        self.area_fd = -1
        self.filling = False
        """The whole model is wanted, not only what is read."""
        self.index = "none"
        """Where the block index came from."""
        self.proven: set[str] = set()
        """Origins that have shown that they have the model, and not only its manifest."""
        self.passing: PassThrough | None = None
        self.restarts = 0
        self.jail: dict[str, Any] = {}

    def open(self, reference: Reference) -> None:
        """Open the mount's cache area, and the layout it is read from. Raises: OSError."""
        self.area_fd = open_area(self._settings.area_dir(self._key), self._settings)
        if reference.is_layout:
            self._layout_fd = os.open(reference.layout_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    async def start(self, fetcher: Child) -> _Told:
        """Give a fetcher its mount. What changes meanwhile goes to `child`: see `_catch_up` for one that is not yet that.

        Raises: what its registry answered, ControlError.
        """
        fetcher.on_notification = self._on_notification
        await self._send_hosts(fetcher)
        allowance = await self._granted(left_bytes=0, wanted_bytes=LARGEST_GRANT_BYTES)
        # No wait from here to the call: what changes from now on is sent after it.
        sources, fill = self._sources(), self.filling
        share = self._memory.share_of(self._key.mount_id)
        sources_fd = wire.memfd("sources", json.dumps(sources).encode())
        fds = [sources_fd, self.area_fd, *([self._layout_fd] if self._layout_fd >= 0 else [])]
        reply, layers_fds = await fetcher.call(
            "start",
            _START_TIMEOUT_S,
            fds,
            digest=str(self._key.digest),
            **self._settings.address_rules,
            threads=min(self._settings.fetch_threads, share.threads),
            most_threads=share.threads,
            lent_blocks=share.lent_blocks,
            fill=fill or self._key.verify is not Verify.CHUNK,
            verify=str(self._key.verify),
            variant=self._key.view.variant,
            allowance=allowance,
        )
        self.proven.update(map(str, reply.pop("origins", ())))
        self.index = str(reply.pop("index", "none"))
        self.jail = reply
        try:
            own = [source for source in sources if not source.get("is_parent")]
            parents = [[source] for source in sources if source.get("is_parent")]
            for layers_fd, origins in zip(layers_fds, [own, *parents], strict=True):
                await self._attach(fetcher, origins, layers_fd)
        except ModelMountError as exc:  # then everything is fetched
            log.info("mount %s shares nothing: %s", self._name, exc)
        finally:
            wire.close_all([sources_fd, *layers_fds])
        return _Told(sources, fill)

    async def keep(self) -> None:
        """Leave the fetcher with the keeper, for a supervisor after us."""
        if self.child is not None:
            with contextlib.suppress(ControlError):  # it has died: the next one is kept
                await self._keeper.keep(self._key.mount_id, _SLOT, {"pid": self.child.pid}, self.child.handles)

    async def adopt(self, slot: KeptSlot | None) -> None:
        """Go on with the fetcher of a supervisor before us, where it lives and has been given the mount."""
        self.child = await adopted("fetcher", slot)
        if self.child is None:
            return
        self.child.on_notification = self._on_notification
        # What it said meanwhile may be lost.
        self._aside(self._ask_again(self.child))

    async def prove(self, fetcher: Child, reference: Reference) -> None:
        """Let the registry show that it has the model: the mount shares its blocks with volumes of other registries, those of
        before and those to come. Raises: what it answered.
        """
        if self.is_stranger(reference):
            await fetcher.call("prove", _PROOF_TIMEOUT_S)
            self.proven.add(reference.origin)

    def is_stranger(self, reference: Reference) -> bool:
        """Whether that registry has yet to show it."""
        return self._key.origin is None and reference.origin not in self.proven

    async def prepare_next(self) -> None:
        """Start a fetcher of our own beside one that an earlier supervisor started. Raises: as `start`."""
        if self.resting:
            return
        fetcher = await self._pool.take("fetcher")
        try:
            told = await self.start(fetcher)
        except BaseException:
            fetcher.kill()
            raise
        self._next = fetcher, told

    async def drop_next(self) -> None:
        """It is not used after all."""
        following, self._next = self._next, None
        if following is not None:
            await following[0].stop()

    async def switch(self) -> None:
        """Use that one. While no worker serves the mount: the next one gets a channel to it."""
        following, self._next = self._next, None
        if following is None:
            return
        fetcher, told = following
        if self._stopping:
            await fetcher.stop()
            return
        async with self._changing:
            old, self.child = self.child, fetcher
            if old is not None and not await old.stop():
                log.warning("mount %s: its old fetcher cannot be ended", self._name)
            await self._catch_up(told)
            await self.keep()

    async def channel(self) -> socket.socket:
        """A fresh pair: one end goes to the fetcher now, the other is the worker's. One that rests is started."""
        self._wanted.set()
        worker_end, fetcher_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with fetcher_end:
            if self.child is not None:
                try:
                    await self.child.call("worker", 5.0, [fetcher_end.fileno()])
                except ControlError as exc:
                    log.warning("mount %s: %s; its successor gets a channel of its own", self._name, exc)
        return worker_end

    async def use_sources(self) -> None:
        """Fetch from where `sources` says now, and as those."""
        if (fetcher := self.child) is not None:
            with contextlib.suppress(ControlError):  # a new fetcher gets them when it starts
                await self._send_hosts(fetcher)
                sources_fd = wire.memfd("sources", json.dumps(self._sources()).encode())
                try:
                    await fetcher.call(
                        "credentials",
                        5.0,
                        [sources_fd],
                        **self._settings.address_rules,
                        proven=sorted(self.proven),
                    )
                finally:
                    os.close(sources_fd)

    async def _catch_up(self, told: _Told) -> None:
        """`child` has just begun to be that: what changed since it was started went to the one before it, or to none."""
        with contextlib.suppress(ModelMountError):  # it has died: its successor is told when it starts
            if self._sources() != told.sources:
                await self.use_sources()
            if self.filling and not told.fill and self.child is not None:
                await self.child.call("fill", 5.0)

    async def fill(self) -> None:
        """Fetch the whole model from now on: one volume at least wants it."""
        if not self.filling:
            self.filling = True
            if self.child is not None:
                with contextlib.suppress(ControlError):  # a new fetcher is told when it starts
                    await self.child.call("fill", 5.0)

    async def stats(self) -> dict[str, Any]:
        """Progress and counters. Those of the last fetcher while none is needed, none while it is being replaced."""
        if self.child is None:
            return self._last_stats if self.resting else {}
        try:
            _, (stats_fd,) = await self.child.call("stats", 2.0)
        except ControlError:
            return {}
        try:
            stats: dict[str, Any] = json.loads(wire.read_all(stats_fd, _STATS_LIMIT_BYTES, "stats"))
        finally:
            os.close(stats_fd)
        return stats

    def on_store_message(self, message: wire.Message) -> None:
        """A blob of ours is shared now, or was found wrong."""
        if message.get("op") == "shared":
            self._aside(self._adopt_shared(str(message.get("digest")), fresh=bool(message.get("fresh"))))
        elif message.get("op") == "proven" and self.passing is not None:
            self._aside(self.passing.offer(str(message.get("digest"))))
        elif message.get("op") == "wrong":
            self._event("IntegrityFailure", str((message.get("error") or {}).get("message", "")))

    async def announce(self) -> None:
        """The fetcher of a supervisor before us says again which proven blobs it has in place."""
        if self.child is not None:
            try:
                await self.child.call("announce", 5.0)
            except ModelMountError as exc:  # its successor says it by itself
                log.info("mount %s: %s", self._name, exc)

    async def stop(self) -> None:
        """End the fetcher, and let go of the area. Idempotent."""
        self._stopping = True
        self._end_watch()
        if self.child is not None:
            await self.child.stop()
        self.child = None
        self._close()

    def _close(self) -> None:
        wire.close_all([fd for fd in (self.area_fd, self._layout_fd) if fd >= 0])
        self.area_fd = self._layout_fd = -1

    async def _watch(self) -> None:
        while not self._stopping:
            if self.resting:
                await self._wanted.wait()
                self.resting = False
            if self.child is None:
                await asyncio.sleep(self._restarts.delay_s)
                await self._replace()
                continue
            fetcher, started = self.child, time.monotonic()
            status = await end_of(fetcher, lambda what: self._event("FetcherHung", what), self._on_beat)
            async with self._changing:
                if self.child is not fetcher or self._stopping:
                    continue  # it was told to end
                self.child = None
                fetcher.let_go()
            self.restarts += 1
            self._event("FetcherRestarting", f"fetcher {fetcher.pid} ended with status {status}")
            self._restarts.note_death(time.monotonic() - started)

    async def awake(self) -> Child:
        """The fetcher, started if it rests. Raises: ControlError when there is none for a while."""
        self._wanted.set()
        try:
            async with asyncio.timeout(_AWAKE_PATIENCE_S):
                while (fetcher := self.child) is None:
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise ControlError(f"mount {self._name}: its fetcher is being replaced; try again") from None
        return fetcher

    async def _on_beat(self, answer: wire.Message) -> None:
        """A fetcher that has brought everything, and whom no worker needs, ends. Where something is missing it stays: it has the
        credentials, also when we die.
        """
        if not self._may_rest():
            return
        stats = await self.stats()
        if not _is_complete(stats):
            return
        async with self._changing:
            if self._stopping or self.child is None or not self._may_rest():
                return
            fetcher, self.child = self.child, None
            self._wanted.clear()
            self.resting, self._last_stats = True, stats
        await fetcher.stop()
        if self.resting and self._may_rest():
            self._memory.give_back(self._key.mount_id)
        log.info("mount %s: nobody reads and nothing is missing; its fetcher has ended until somebody does", self._name)

    async def _replace(self) -> None:
        delay_s = _FIRST_DELAY_S
        while not self._stopping:
            fetcher: Child | None = None
            try:
                fetcher = await self._pool.take("fetcher")
                told = await self.start(fetcher)
            except ModelMountError as exc:
                log.error("mount %s: no new fetcher: %s", self._name, exc)
                if fetcher is not None:
                    fetcher.kill()
                await asyncio.sleep(delay_s)
                delay_s = min(_LONGEST_DELAY_S, delay_s * 2)
                continue
            if self.child is not None:  # another one was started meanwhile
                await fetcher.stop()
                return
            self.child = fetcher
            await self._catch_up(told)
            await self.keep()
            with contextlib.suppress(ModelMountError):  # a worker that died meanwhile: its successor gets a channel
                await self._on_replaced()
            return

    async def _attach(self, fetcher: Child, sources: list[Source], layers_fd: int) -> None:
        """What the store has goes into our area, or will once our registry has shown that it has it too."""
        if self._key.domain != SHARED_DOMAIN:
            return
        origins = _origins(sources)
        fields, challenges_fds = await self._store.call(
            "attach", _STORE_TIMEOUT_S, [layers_fd], mount_id=self._key.mount_id, origins=origins
        )
        try:
            if fields.get("challenges"):
                await fetcher.call("challenge", 5.0, challenges_fds)
        finally:
            wire.close_all(challenges_fds)

    async def _granted(self, *, left_bytes: int, wanted_bytes: int) -> int:
        """How much more our fetcher may allocate now; nothing while the store is away."""
        room: dict[str, Any] = {"left_bytes": left_bytes, "wanted_bytes": wanted_bytes}
        try:
            fields, _ = await self._store.call("grant", _STORE_TIMEOUT_S, mount_id=self._key.mount_id, **room)
        except ModelMountError as exc:
            log.warning("mount %s: no room in the cache: %s", self._name, exc)
            return 0
        return int(fields.get("size_bytes", 0))

    async def _grant_more(self, message: wire.Message) -> None:
        left, wanted = wire.field(message, "left_bytes", int), wire.field(message, "wanted_bytes", int)
        given = await self._granted(left_bytes=left, wanted_bytes=wanted)
        if given and self.child is not None:
            await self.child.call("grant", 5.0, size_bytes=given)

    async def _ask_again(self, fetcher: Child) -> None:
        await fetcher.call("repeat", 5.0)

    async def _tell_store(self, op: str, message: wire.Message) -> None:
        """A blob is complete, or a block that the store asked for is here."""
        if self._key.domain != SHARED_DOMAIN:
            return
        fields = {name: message[name] for name in ("digest", "size_bytes", "block") if name in message}
        own = _origins([source for source in self._sources() if not source.get("is_parent")])
        origins = [str(message["origin"])] if message.get("origin") else own
        for patience_s in (1.0, 5.0, 0.0):
            try:
                reply, _ = await self._store.call(
                    op, _STORE_TIMEOUT_S, mount_id=self._key.mount_id, origins=origins, **fields
                )
                break
            except ControlError:  # it is being started again
                if not patience_s:
                    raise
                await asyncio.sleep(patience_s)
        if reply.get("shared"):
            await self._adopt_shared(str(message["digest"]), fresh=False)

    async def _adopt_shared(self, digest: str, *, fresh: bool) -> None:
        if self.child is not None:
            await self.child.call("shared", 5.0, digest=digest, fresh=fresh)

    async def _send_hosts(self, fetcher: Child) -> None:
        """A live mount goes on without mirrors that somebody has misspelt meanwhile."""
        try:
            await send_hosts(
                fetcher, [Reference.parse(source["reference"]) for source in self._sources()], self._settings
            )
        except InvalidVolumeError as exc:
            log.error("mount %s: without its mirrors: %s", self._name, exc)

    def _on_notification(self, message: wire.Message) -> None:
        match message.get("op"):
            case "event":
                error = message.get("error") or {}
                self._event(str(message.get("reason")), str(error.get("message", "")))
            case "grant":
                self._aside(self._grant_more(message))
            case "complete":
                self._aside(self._tell_store("promote", message))
            case "proof":
                self._aside(self._tell_store("prove", message))
            case "adopted" if self.passing is not None:
                self._aside(self.passing.adopted(str(message.get("digest"))))
            case "damaged" if self.passing is not None:
                self._aside(self.passing.withdraw(str(message.get("digest"))))

    def _aside(self, work: Coroutine[Any, Any, None]) -> None:
        """Beside everything else, and only logged when it fails: nobody waits for it."""

        async def run() -> None:
            try:
                await work
            except ModelMountError as exc:
                log.info("mount %s: %s", self._name, exc)

        task = asyncio.create_task(run())
        self._asides.add(task)
        task.add_done_callback(self._asides.discard)


def _is_complete(stats: dict[str, Any]) -> bool:
    blobs = stats.get("blobs") or []
    return all(blob["state"] == "verified" and blob["present_blocks"] == blob["blocks"] for blob in blobs) and bool(
        blobs
    )


def _origins(sources: list[Source]) -> list[str]:
    return list(dict.fromkeys(Reference.parse(source["reference"]).origin for source in sources))
