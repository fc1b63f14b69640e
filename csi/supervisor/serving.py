"""The half of a mount that answers the kernel: the connection, and one worker on it, replaced when it dies or hangs.

What a dead worker had taken: the raw backend's successor finds it in the connection's request table; for pyfuse3, RESEND
first, so that the kernel gives it out again. Readers see a pause.

One worker at a time: the table has one writer, and of two who read the connection one may freeze. So a worker is told to
leave, and has said that it does, or is dead, before the next one is given the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from csi.control import wire
from csi.control.keeper import CollectedMount, KeptMount, KeptSlot
from csi.errors import ControlError, ModelMountError
from csi.fuse.handshake import RESEND_MESSAGE, BackendName
from csi.fuse.refusal import refuse_waiting
from csi.supervisor.child import Child, ChildPool, adopted
from csi.supervisor.half import Half
from csi.supervisor.heartbeat import end_of
from csi.supervisor.kept import KeptMounts
from csi.supervisor.memory import Share
from csi.supervisor.passing import PassThrough
from csi.supervisor.resting import is_asked, until_asked
from csi.supervisor.settings import SupervisorSettings

log = logging.getLogger(__name__)

_SERVE_TIMEOUT_S = 20.0
_LEAVE_PATIENCE_S = 0.1
"""For what a worker holds when it is told to leave: reads that wait for the network are its successor's."""
_LEAVE_GRACE_S = 2.0
_CHANNEL_TIMEOUT_S = 5.0
_SERVED_S = 0.2
"""A worker that lived so long has served: whoever waited has been answered, or waits for the network."""
_LONGEST_DELAY_S = 5.0
_SLOT = "worker"

_Result = TypeVar("_Result")


class Serving(Half):
    """Of one mount. `channel` makes a channel to its fetcher, and takes the one before from it; `has_fetcher` says whether there
    is one now. `event` remembers what people should know, `share` is what it may hold in memory. `recheck`: what was read of archives before the mount was not
    verified then.

    `_linking` is held from the making of a channel until the worker has it: of two under way, the fetcher would keep one and the
    worker the other.
    """

    def __init__(
        self,
        keeper: KeptMounts,
        pool: ChildPool,
        settings: SupervisorSettings,
        channel: Callable[[], Awaitable[socket.socket]],
        has_fetcher: Callable[[], bool],
        event: Callable[[str, str], None],
        share: Callable[[], Share],
        *,
        recheck: bool,
    ) -> None:
        super().__init__(_LONGEST_DELAY_S)
        self._recheck = recheck
        self._keeper, self._pool, self._settings = keeper, pool, settings
        self._channel, self._has_fetcher, self._event = channel, has_fetcher, event
        self._share = share
        self._linking = asyncio.Lock()
        self._fuse_fd = self._table_fd = self._tree_fd = self._area_fd = -1
        self._init = b""
        self._name = ""
        self._unserved_since: float | None = None
        self.kept: KeptMount | None = None
        self.dead = False
        """The connection has ended; only a new mount helps."""
        self.restarts = 0
        self.passing: PassThrough | None = None
        self.jail: dict[str, Any] = {}
        self.resting = False
        """Nobody reads, so no worker runs; the next request starts one."""
        self._found = False
        self._last_reads: dict[str, Any] = {}
        self.longest_pause_s = 0.0
        """Of all replacements: from the end of one worker to the first answer of the next."""

    def connect(self, collected: CollectedMount, tree_fd: int, area_fd: int) -> None:
        """Take the connection over, not the other two. Nothing is asked of it yet."""
        self.kept, self._init = collected.mount, collected.init
        self._name = collected.mount.mount_id[:8]
        self._fuse_fd, self._table_fd = collected.fuse_fd, collected.table_fd
        self._tree_fd, self._area_fd = tree_fd, area_fd
        os.close(collected.root_fd)

    async def start(self, worker: Child) -> None:
        """Give a worker the mount; requests are answered when this returns. Raises: ControlError, the worker's error."""
        self._resend()  # a supervisor before us may have had a worker here
        await self._load(worker)
        await self._serve(worker)

    async def adopt(self, slot: KeptSlot | None) -> None:
        """Go on with the worker of a supervisor before us, where it lives and serves; where none does, the next request, or one
        that waits already, starts one.
        """
        self._found = True
        self.child = await adopted("worker", slot)
        self.resting = self.child is None and self._may_rest
        if self.child is not None:
            self.child.on_notification = self._on_notification

    @property
    def is_ours(self) -> bool:
        """Whether nothing of a supervisor before us serves it."""
        return self.child.is_ours if self.child is not None else self.resting and not self._found

    async def renew(self, between: Callable[[], Awaitable[None]]) -> None:
        """Replace a worker that serves well by one of ours. `between` is awaited when nobody serves.

        Raises: ControlError, the worker's error; then the old one serves on, or `watch` finds another.
        """
        worker = await self._pool.take("worker")
        try:
            await self._load(worker)  # whatever is wrong with it shows while the old one serves
            async with self._changing:
                if self.resting and not self._stopping:
                    await between()
                    self._found = False
                    worker.kill()  # it was to show that it could
                    return
                if self._stopping or self.child is None:
                    raise ControlError(f"mount {self._name}: its worker is being replaced already")
                began = time.monotonic()
                await self._leave(self.child)
                self.child = None
                self._resend()
                await between()
                await self._serve(worker)
                self._note_pause(began)
        except BaseException:
            worker.kill()
            raise

    async def use_new_fetcher(self) -> None:
        """The worker gets a channel to it; without a worker, its successor does when it serves. Raises: ControlError."""
        async with self._linking:
            worker = self.child
            if worker is None or not worker.alive:
                return
            with await self._channel() as channel:
                await worker.call("fetcher", _CHANNEL_TIMEOUT_S, [channel.fileno()])

    async def stats(self) -> dict[str, Any]:
        """Counters of reads: those of the last worker while none is needed, none while it is being replaced."""
        if self.resting:
            return self._last_reads
        if self.child is not None:
            with contextlib.suppress(ModelMountError):
                reads, _ = await self.child.call("stats", 2.0)
                return reads
        return {}

    async def release(self) -> None:
        """Reads that wait for the network fail now. Before the mount is ended: a process in such a read cannot be killed."""
        self._stopping = True
        self._end_watch()
        if self.child is not None and self.child.alive:
            with contextlib.suppress(ModelMountError):
                await self.child.call("release", 1.0)

    async def stop(self) -> None:
        """End the worker, let go of the connection. Idempotent."""
        self._stopping = True
        if self.child is not None:
            await self.child.stop()
        self.child = None
        self._close()

    def _close(self) -> None:
        wire.close_all([fd for fd in (self._fuse_fd, self._table_fd) if fd >= 0])
        self._fuse_fd = self._table_fd = -1

    async def _load(self, worker: Child) -> None:
        assert self.kept is not None
        await worker.call(
            "load",
            _SERVE_TIMEOUT_S,
            [self._tree_fd, self._area_fd],
            backend=self.kept.backend,
            read_deadline_s=self._settings.read_deadline_s,
            reads_at_once=self._share().reads,
        )

    async def _serve(self, worker: Child) -> None:
        assert self.kept is not None
        worker.on_notification = self._on_notification
        # First: were we to die now, a worker that serves and that nobody knows of would be one too many.
        await self._keeper.keep(self.kept.mount_id, _SLOT, {"pid": worker.pid}, worker.handles)
        async with self._linking:
            with await self._channel() as channel:
                self.jail, _ = await worker.call(
                    "serve",
                    _SERVE_TIMEOUT_S,
                    [self._fuse_fd, self._table_fd, channel.fileno()],
                    init=self._init.hex(),
                    recheck=self._recheck,
                )
            if self.passing is not None:
                await self.passing.tell(worker)
            self.child = worker

    def _on_notification(self, message: wire.Message) -> None:
        if message.get("op") == "event":
            self._event(str(message.get("reason")), str(message.get("message", "")))

    async def _leave(self, worker: Child) -> None:
        """Returns when it receives and answers nothing any more. Raises: ControlError when that cannot be had."""
        patience_s = _LEAVE_PATIENCE_S
        if self.kept is not None and self.kept.backend != BackendName.RAW and not self.kept.can_resend:
            patience_s = self._settings.read_deadline_s  # what it holds, nobody else could answer
        try:
            await worker.call("stop", patience_s + _LEAVE_GRACE_S, patience_s=patience_s)
        except ControlError as exc:
            if not worker.kill():
                raise
            log.warning("mount %s: %s; it was killed", self._name, exc)
            await worker.exited
        worker.let_go()

    async def _watch(self) -> None:
        while not self._stopping:
            if self.resting:
                await self._until_asked()
                self.resting = False
                if self._has_ended():
                    return
                self._unserved_since = None
            if self.child is None:
                await self._replace()
                continue
            worker, started = self.child, time.monotonic()
            status = await end_of(worker, lambda what: self._event("WorkerHung", what), self._on_beat)
            async with self._changing:
                if self.child is not worker or self._stopping:
                    continue  # it was told to leave
                self.child = None
                worker.let_go()
            if self._has_ended():
                return
            self.restarts += 1
            self._event("WorkerRestarting", f"worker {worker.pid} ended with status {status}")
            lived_s = time.monotonic() - started
            self._restarts.note_death(lived_s)
            if lived_s > _SERVED_S or self._unserved_since is None:
                self._unserved_since = time.monotonic()

    def _has_ended(self) -> bool:
        if _connection_ended(self._fuse_fd):
            log.warning("mount %s: its FUSE connection was ended from outside", self._name)
            self._event("ConnectionAborted", "the FUSE connection was aborted or unmounted from outside")
            self.dead = True
        return self.dead

    @property
    def _may_rest(self) -> bool:
        """Not where what a worker has taken from the kernel, and not answered when it ends, is lost."""
        kept = self.kept
        return (
            self._settings.idle_exit_s > 0
            and kept is not None
            and (kept.backend == BackendName.RAW or bool(kept.can_resend))
        )

    async def _until_asked(self) -> None:
        """A worker that is gone may have taken requests, also in the moment of its end: they come back, or lie in the table."""
        for patience_s in (0.5, 2.0, None):
            self._resend()
            if await until_asked(self._fuse_fd, self._table_fd, patience_s):
                return

    async def _rest(self) -> None:
        """End the worker, until it is asked for. What it takes meanwhile is in the table, or comes back by RESEND."""
        reads = await self.stats()
        async with self._changing:
            if self._stopping or self.child is None or is_asked(self._fuse_fd, self._table_fd):
                return
            await self._leave(self.child)
            self.child = None
            self.resting, self._last_reads = True, reads
        log.info("mount %s: nobody reads; its worker has ended until somebody does", self._name)

    async def _on_beat(self, answer: wire.Message) -> None:
        if self._may_rest and answer.get("idle_s", 0.0) >= self._settings.idle_exit_s:
            await self._rest()
        elif (
            not answer.get("linked", True) and self._has_fetcher()
        ):  # an older worker does not say; a new fetcher brings one
            await self._link_again(int(answer.get("pid", 0)))

    async def _link_again(self, pid: int) -> None:
        """The worker's channel has ended, and the fetcher lives: a supervisor before us died with one half handed over, or the one
        end was lost with a process.
        """
        log.warning("mount %s: worker %d has no channel to the fetcher; it gets another", self._name, pid)
        try:
            await self.use_new_fetcher()
        except ModelMountError as exc:
            log.warning("mount %s: %s; it is tried again", self._name, exc)

    async def _replace(self) -> None:
        """Nobody reads the connection now, so what RESEND queues again is given out once."""
        began = time.monotonic()
        if self._unserved_since is None:
            self._unserved_since = began
        delay_s = self._restarts.delay_s
        while not self._stopping:
            await self._refusing(asyncio.sleep(delay_s))
            worker: Child | None = None
            try:
                async with self._changing:
                    self._resend()
                    worker = await self._refusing(self._pool.take("worker"))
                    await self._refusing(self._load(worker))
                    await self._serve(worker)
                self._note_pause(began)
                return
            except ModelMountError as exc:
                log.error("mount %s: no new worker: %s", self._name, exc)
                if worker is not None:
                    worker.kill()
                delay_s = min(_LONGEST_DELAY_S, delay_s * 2 or 0.2)

    async def _refusing(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Its result. While it takes its time, readers who wait for a worker longer than a read may take get an error."""
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                since = self._unserved_since
                if since is not None and time.monotonic() - since > self._settings.read_deadline_s:
                    self._refuse()
                await asyncio.wait([task], timeout=1.0)
        finally:
            task.cancel()
        return task.result()

    def _refuse(self) -> None:
        assert self.kept is not None
        try:
            refused = refuse_waiting(
                self._fuse_fd, self._table_fd, BackendName(self.kept.backend), can_resend=self.kept.can_resend
            )
        except (OSError, ModelMountError) as exc:
            log.error("mount %s: readers wait on: %s", self._name, exc)
            return
        if refused:
            log.error("mount %s: no worker starts; %d requests got an error", self._name, refused)
            self._event("NoWorker", f"no worker can be started; {refused} requests of readers got an error")

    def _note_pause(self, began: float) -> None:
        pause_s = time.monotonic() - began
        self.longest_pause_s = max(self.longest_pause_s, pause_s)
        log.info("mount %s: another worker serves after %.0f ms", self._name, pause_s * 1000)

    def _resend(self) -> None:
        """Only while nobody reads the connection. The raw backend's successor finds what is owed in the table."""
        if self.kept is not None and self.kept.can_resend and self.kept.backend != BackendName.RAW:
            try:
                os.write(self._fuse_fd, RESEND_MESSAGE)
            except OSError as exc:
                log.warning("mount %s: RESEND: %s", self._name, exc)


def _connection_ended(fuse_fd: int) -> bool:
    """POLLERR: unmounted or aborted. Asked before a worker is replaced, or a dead mount would spin."""
    poll = select.poll()
    poll.register(fuse_fd, select.POLLIN)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
