"""One mounted model: its connection, its worker, its fetcher, and who leases it.

connection   one /dev/fuse descriptor and the table of requests taken (the keeper has both too), and the INIT bytes
             that pyfuse3 replays
worker       replaced when it dies; readers see a pause. What it had taken: the raw backend's successor finds it in
             the connection's request table; for pyfuse3, RESEND first, so that the kernel gives it out again
fetcher      replaced when it dies; the worker asks the new one again for what it waits for
leases       one per target path; the mount ends with the last one
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import select
import socket
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from csi.control import wire
from csi.control.keeper import KeeperClient, KeptMount
from csi.errors import ControlError, ModelMountError, MountError
from csi.fuse.handshake import RESEND_MESSAGE, BackendName
from csi.oci.reference import Reference
from csi.supervisor.child import Child, ChildPool
from csi.supervisor.settings import SupervisorSettings
from csi.volume import MountKey

log = logging.getLogger(__name__)

_SERVE_TIMEOUT_S = 20.0
_BUILD_TIMEOUT_S = 60.0
_CRASH_WINDOW_S = 30.0
_CRASHES_BEFORE_WAIT = 5
_CRASH_WAIT_S = 5.0
_STATS_LIMIT_BYTES = 64 * 1024 * 1024

Credentials = dict[str, str] | None


@dataclass(slots=True)
class Lease:
    """A target path that shows the mount. Credentials live in memory only, and are never logged."""

    volume_id: str
    credentials: Credentials = field(default=None, repr=False)


class Mount:
    """Create with `create`; everything runs on the supervisor's event loop."""

    def __init__(
        self, key: MountKey, reference: Reference, keeper: KeeperClient, pool: ChildPool, settings: SupervisorSettings
    ) -> None:
        self.key = key
        self.mount_id = key.mount_id
        self.reference = reference.with_digest(key.digest)
        self.leases: dict[str, Lease] = {}
        self.kept: KeptMount | None = None
        self.summary: dict[str, int] = {}
        self.events: deque[dict[str, Any]] = deque(maxlen=64)
        self.dead = False
        self.worker_restarts = 0
        self.fetcher_restarts = 0
        self._keeper, self._pool, self._settings = keeper, pool, settings
        self._stopping = False
        self._worker: Child | None = None
        self._fetcher: Child | None = None
        self._fuse_fd = self._table_fd = self._tree_fd = self._area_fd = self._layout_fd = -1
        self._init = b""
        self._watchers: list[asyncio.Task[None]] = []

    async def create(self, fetcher: Child, manifest_fd: int, media_type: str, credentials: Credentials) -> None:
        """From a manifest to a served superblock. On failure nothing of it stays.

        Raises: UnsupportedModelError (from the worker), MountError (from the keeper), ControlError.
        """
        self._fetcher = fetcher
        try:
            worker_ready = asyncio.create_task(self._pool.take("worker"))
            self._area_fd = _open_area(self._settings.area_dir(self.key), self._settings)
            if self.reference.is_layout:
                self._layout_fd = os.open(self.reference.layout_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            self._worker = await worker_ready
            self.summary, (self._tree_fd,) = await self._worker.call(
                "build", _BUILD_TIMEOUT_S, [manifest_fd], media_type=media_type
            )
            self._save_tree()
            await self._start_fetcher(fetcher, credentials)
            kept, self._fuse_fd, self._table_fd, self._init = await asyncio.to_thread(
                self._keeper.mount, self.mount_id, self._settings.read_ahead_kb, self._settings.fuse_backend
            )
            self.kept = kept
            if kept.existed:
                self._resend()  # what the worker of a supervisor that died had taken
            await self._serve(self._worker)
        except BaseException:
            await self.close()
            raise
        self._watchers = [asyncio.create_task(self._watch_worker()), asyncio.create_task(self._watch_fetcher())]

    async def access(self, reference: Reference, credentials: Credentials) -> None:
        """Whether these credentials may read the model, asked of the registry itself.

        Raises: RegistryAuthError, ModelNotFoundError, RegistryUnavailableError.
        """
        if self._fetcher is None:
            raise ControlError(f"mount {self.mount_id[:8]}: its fetcher is being replaced; try again")
        manifest_fd, _, _ = await resolve(
            self._fetcher, reference.with_digest(self.key.digest), credentials, self._settings
        )
        os.close(manifest_fd)

    async def replace_credentials(self, target_path: str, credentials: Credentials) -> None:
        """A republish brought newer ones: use them from now on."""
        lease = self.leases[target_path]
        if lease.credentials != credentials:
            lease.credentials = credentials
            await self._use_credentials(credentials)

    async def drop_lease(self, target_path: str) -> None:
        """The target does not show the mount any more, so its credentials are not used for others either."""
        dropped = self.leases.pop(target_path)
        if self.leases and dropped.credentials is not None:
            await self._use_credentials(self._any_credentials())

    async def stats(self) -> dict[str, Any]:
        """Everything `modelmount status` shows of a mount. Does not touch the mount itself."""
        progress: dict[str, Any] = {}
        reads: dict[str, Any] = {}
        if self._fetcher is not None:
            with contextlib.suppress(ControlError):
                _, (stats_fd,) = await self._fetcher.call("stats", 2.0)
                try:
                    progress = json.loads(wire.read_all(stats_fd, _STATS_LIMIT_BYTES, "stats"))
                finally:
                    os.close(stats_fd)
        if self._worker is not None:
            with contextlib.suppress(ControlError):
                reads, _ = await self._worker.call("stats", 2.0)
        return {
            "mount_id": self.mount_id,
            "reference": str(self.reference),
            "digest": str(self.key.digest),
            "verify": str(self.key.verify),
            "device": self.kept.device if self.kept else None,
            "can_resend": self.kept.can_resend if self.kept else None,
            "init_set_version": self.kept.init_set_version if self.kept else None,
            "backend": self.kept.backend if self.kept else None,
            "dead": self.dead,
            "files": self.summary.get("files", 0),
            "total_bytes": self.summary.get("total_bytes", 0),
            "volumes": sorted({lease.volume_id for lease in self.leases.values()}),
            "targets": sorted(self.leases),
            "worker_pid": self._worker.pid if self._worker else None,
            "fetcher_pid": self._fetcher.pid if self._fetcher else None,
            "worker_restarts": self.worker_restarts,
            "fetcher_restarts": self.fetcher_restarts,
            "reads": reads,
            "progress": progress,
            "events": list(self.events),
        }

    async def close(self) -> None:
        """Unmount, stop both processes, close everything. Idempotent; never waits for a registry or a reader."""
        self._stopping = True
        for watcher in self._watchers:
            watcher.cancel()
        if self._worker is not None and self._worker.alive:
            with contextlib.suppress(ModelMountError):
                await self._worker.call("release", 1.0)
        if self.kept is not None:
            try:
                await asyncio.to_thread(self._keeper.unmount, self.mount_id)
            except ModelMountError as exc:
                log.warning("mount %s: %s", self.mount_id, exc)
        await asyncio.gather(*(child.stop() for child in (self._worker, self._fetcher) if child is not None))
        self._worker = self._fetcher = None
        for name in ("_fuse_fd", "_table_fd", "_tree_fd", "_area_fd", "_layout_fd"):
            if (fd := getattr(self, name)) >= 0:
                os.close(fd)
                setattr(self, name, -1)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._settings.tree_path(self.mount_id))

    async def _start_fetcher(self, fetcher: Child, credentials: Credentials) -> None:
        fds = [self._area_fd] if self._layout_fd < 0 else [self._area_fd, self._layout_fd]
        fetcher.on_notification = self._on_notification
        await fetcher.call(
            "start",
            _SERVE_TIMEOUT_S,
            fds,
            reference=str(self.reference),
            credentials=credentials,
            plain_http_hosts=list(self._settings.plain_http_hosts),
            threads=self._settings.fetch_threads,
            fill=True,
        )

    async def _serve(self, worker: Child) -> None:
        assert self.kept is not None
        worker.on_notification = self._on_notification
        channel = await self._channel_to_fetcher()
        try:
            await worker.call(
                "serve",
                _SERVE_TIMEOUT_S,
                [self._fuse_fd, self._table_fd, self._tree_fd, self._area_fd, channel.fileno()],
                init=self._init.hex(),
                backend=self.kept.backend,
                read_deadline_s=self._settings.read_deadline_s,
            )
        finally:
            channel.close()

    async def _channel_to_fetcher(self) -> socket.socket:
        """A fresh pair: one end goes to the fetcher now, the other is the worker's."""
        worker_end, fetcher_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with fetcher_end:
            if self._fetcher is not None:
                try:
                    await self._fetcher.call("worker", 5.0, [fetcher_end.fileno()])
                except ControlError as exc:
                    log.warning("mount %s: %s; its successor gets a channel of its own", self.mount_id[:8], exc)
        return worker_end

    async def _watch_worker(self) -> None:
        crashes: deque[float] = deque(maxlen=_CRASHES_BEFORE_WAIT)
        while True:
            assert self._worker is not None
            status = await asyncio.shield(self._worker.exited)
            if self._stopping:
                return
            if _connection_ended(self._fuse_fd):
                log.warning("mount %s: its FUSE connection was ended from outside", self.mount_id[:8])
                self.event("ConnectionAborted", "the FUSE connection was aborted or unmounted from outside")
                self.dead = True
                return
            self.worker_restarts += 1
            self.event("WorkerRestarting", f"worker {self._worker.pid} ended with status {status}")
            crashes.append(time.monotonic())
            if len(crashes) == _CRASHES_BEFORE_WAIT and crashes[-1] - crashes[0] < _CRASH_WINDOW_S:
                log.error("mount %s: %d workers died within %g s", self.mount_id[:8], len(crashes), _CRASH_WINDOW_S)
                await asyncio.sleep(_CRASH_WAIT_S)
            await self._replace_worker()

    async def _replace_worker(self) -> None:
        """Nobody reads the connection now, so what RESEND queues again is given out once."""
        self._resend()
        while not self._stopping:
            worker: Child | None = None
            try:
                worker = await self._pool.take("worker")
                await self._serve(worker)
            except ModelMountError as exc:
                log.error("mount %s: no new worker: %s", self.mount_id[:8], exc)
                if worker is not None:
                    worker.kill()
                await asyncio.sleep(1.0)
                continue
            self._worker = worker
            return

    def _resend(self) -> None:
        """Only while nobody reads the connection. The raw backend's successor finds what is owed in the table."""
        if self.kept is not None and self.kept.can_resend and self.kept.backend != BackendName.RAW:
            try:
                os.write(self._fuse_fd, RESEND_MESSAGE)
            except OSError as exc:
                log.warning("mount %s: RESEND: %s", self.mount_id[:8], exc)

    async def _watch_fetcher(self) -> None:
        delay_s = 0.0
        while True:
            assert self._fetcher is not None
            started = time.monotonic()
            status = await asyncio.shield(self._fetcher.exited)
            if self._stopping:
                return
            self.fetcher_restarts += 1
            self.event("FetcherRestarting", f"fetcher {self._fetcher.pid} ended with status {status}")
            delay_s = min(10.0, delay_s * 2 or 0.2) if time.monotonic() - started < 10 else 0.0
            await asyncio.sleep(delay_s)
            await self._replace_fetcher()

    async def _replace_fetcher(self) -> None:
        while not self._stopping:
            fetcher: Child | None = None
            try:
                fetcher = await self._pool.take("fetcher")
                await self._start_fetcher(fetcher, self._any_credentials())
                self._fetcher = fetcher
                channel = await self._channel_to_fetcher()
                with channel:
                    if self._worker is not None and self._worker.alive:
                        await self._worker.call("fetcher", 5.0, [channel.fileno()])
                return
            except ModelMountError as exc:
                log.error("mount %s: no new fetcher: %s", self.mount_id[:8], exc)
                if fetcher is not None and not fetcher.alive:
                    await asyncio.sleep(1.0)
                    continue
                return  # the worker died meanwhile: its successor gets a channel when it starts

    async def _use_credentials(self, credentials: Credentials) -> None:
        if self._fetcher is not None:
            with contextlib.suppress(ControlError):  # a new fetcher gets them when it starts
                await self._fetcher.call("credentials", 5.0, credentials=credentials)

    def _any_credentials(self) -> Credentials:
        for lease in reversed(self.leases.values()):
            if lease.credentials is not None:
                return lease.credentials
        return None

    def _on_notification(self, message: wire.Message) -> None:
        if message.get("op") == "event":
            error = message.get("error") or {}
            self.event(str(message.get("reason")), str(error.get("message", "")))

    def event(self, reason: str, text: str) -> None:
        """Remember what happened, for status and (in a cluster) Kubernetes events."""
        self.events.append({"time": time.time(), "reason": reason, "message": text[:2000]})

    def _save_tree(self) -> None:
        """On disk too, so that a later supervisor's workers load the very same tree."""
        path = self._settings.tree_path(self.mount_id)
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        content = wire.read_all(self._tree_fd, 1 << 30, "tree")
        temporary = f"{path}.{os.getpid()}"
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


async def resolve(
    fetcher: Child, reference: Reference, credentials: Credentials, settings: SupervisorSettings
) -> tuple[int, str, str]:
    """The manifest of `reference`: a sealed memfd (the caller's), its media type, its digest.

    Raises: what the registry answered, as our errors.
    """
    layout_fds: list[int] = []
    if reference.is_layout:
        try:
            layout_fds = [os.open(reference.layout_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)]
        except OSError as exc:
            raise MountError(f"{reference}: {exc.strerror}; is it an OCI image-layout directory?") from exc
    try:
        fields, fds = await fetcher.call(
            "resolve",
            settings.resolve_timeout_s + 5.0,
            layout_fds,
            reference=str(reference),
            credentials=credentials,
            plain_http_hosts=list(settings.plain_http_hosts),
            registry_timeout_s=settings.resolve_timeout_s,
        )
    finally:
        wire.close_all(layout_fds)
    return fds[0], wire.field(fields, "media_type", str), wire.field(fields, "digest", str)


def _open_area(path: str, settings: SupervisorSettings) -> int:
    """The mount's own part of the cache: the fetcher writes, the worker reads, nobody else does either."""
    os.makedirs(path, mode=0o750, exist_ok=True)
    if settings.fetcher_uid is not None:
        os.chown(path, settings.fetcher_uid, settings.child_gid if settings.child_gid is not None else -1)
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _connection_ended(fuse_fd: int) -> bool:
    """POLLERR: unmounted or aborted. Asked before a worker is replaced, or a dead mount would spin."""
    poll = select.poll()
    poll.register(fuse_fd, select.POLLIN)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
