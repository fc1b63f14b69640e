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
import fcntl
import json
import logging
import os
import select
import socket
import time
from collections import deque
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from csi.control import wire
from csi.control.keeper import KeptMount
from csi.credentials import NO_LOGINS, Credentials, Keyring, to_wire, united, within_limits
from csi.errors import (
    ControlError,
    DigestMismatchError,
    InvalidVolumeError,
    ModelMountError,
    MountError,
    RegistryUnavailableError,
)
from csi.fuse.handshake import RESEND_MESSAGE, BackendName
from csi.oci.digest import Digest
from csi.oci.reference import Reference
from csi.registry_hosts import to_wire as hosts_to_wire
from csi.supervisor.build import BuildPhase, SentManifest
from csi.supervisor.child import Child, ChildPool
from csi.supervisor.hosts import read_hosts
from csi.supervisor.kept import KeptMounts
from csi.supervisor.manifests import MAX_BYTES, KeptManifest, KeptManifests
from csi.supervisor.ownership import give
from csi.supervisor.parents import NO_PARENTS, FoundParents, Parent, parent_sources
from csi.supervisor.settings import SupervisorSettings
from csi.supervisor.store_link import StoreLink
from csi.volume import SHARED_DOMAIN, MountKey, Prefetch, Verify

log = logging.getLogger(__name__)

_SERVE_TIMEOUT_S = 20.0
_STORE_TIMEOUT_S = 5.0
_PROOF_TIMEOUT_S = 300.0  # one block, however slow the link: who publishes hears before that it takes time
_CRASH_WINDOW_S = 30.0
_CRASHES_BEFORE_WAIT = 5
_CRASH_WAIT_S = 5.0
_OF_AN_INDEX = "of an index"  # kept apart: whether these have a block index was not looked at
_STATS_LIMIT_BYTES = 64 * 1024 * 1024


@dataclass(slots=True)
class Lease:
    """A target path that shows the mount. Credentials live in memory only, and are never logged."""

    volume_id: str
    reference: Reference
    credentials: Credentials = field(default=(), repr=False)
    service_account: str = ""
    parents: tuple[Parent, ...] = ()
    brought: Credentials = field(default=(), repr=False)
    keyring: Keyring = field(default=NO_LOGINS, repr=False)
    """What the volume itself brought, without the node's own logins."""
    refused: str | None = None
    """What the registry said when it was last asked whether these credentials may still read the model."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a reference names now. `manifest_fd` is a sealed memfd, the holder's to close. `indexed`: there is a block index
    that this node trusts. `index_ignored`: why one that there is besides is not used. `parent`: the reference of the model that
    it builds on.
    """

    manifest_fd: int
    media_type: str
    digest: Digest
    indexed: bool
    index_ignored: str = ""
    parent: str | None = None


class Mount:
    """Made with `prepare`, served once `ready` returns; everything runs on the supervisor's event loop."""

    def __init__(
        self,
        key: MountKey,
        reference: Reference,
        keeper: KeptMounts,
        pool: ChildPool,
        store: StoreLink,
        settings: SupervisorSettings,
        manifests: KeptManifests,
    ) -> None:
        self.key = key
        self.mount_id = key.mount_id
        self.reference = reference.with_digest(key.digest)
        self.leases: dict[str, Lease] = {}
        self.kept: KeptMount | None = None
        self.summary: dict[str, int] = {}
        self.events: deque[dict[str, Any]] = deque(maxlen=64)
        self.dead = False
        self.jail: dict[str, dict[str, Any]] = {}
        self.worker_restarts = 0
        self.fetcher_restarts = 0
        self._keeper, self._pool, self._store, self._settings = keeper, pool, store, settings
        self._manifests = manifests
        self._asides: set[asyncio.Task[None]] = set()
        self.indexed = False
        self.index = "none"
        self.wanted_at = 0.0
        self.parents: tuple[Reference, ...] = ()
        """What the model builds on, by digest."""
        self._first_credentials: Credentials = ()
        self._proven: set[str] = set()  # origins
        self._first_parents: tuple[Parent, ...] = ()
        self._fill = False
        self._stopping = False
        self._worker: Child | None = None
        self._fetcher: Child | None = None
        self._fuse_fd = self._table_fd = self._tree_fd = self._area_fd = self._layout_fd = -1
        self._init = b""
        self._watchers: list[asyncio.Task[None]] = []
        self._build = BuildPhase(f"model {key.digest.short()}", self._fetch_manifest)
        self._creation: asyncio.Task[None] | None = None
        self.failure: ModelMountError | None = None
        """Why it never was served."""

    def prepare(
        self,
        fetcher: Child,
        model: Resolved,
        credentials: Credentials,
        prefetch: Prefetch,
        found: FoundParents = NO_PARENTS,
    ) -> None:
        """Begin to make the mount, from a manifest to a served superblock. Takes over `fetcher`, not the manifests of `model`
        and `found`. It goes on until it is done or `close`; on failure nothing of it stays.
        """
        self._fetcher = fetcher
        self.indexed = model.indexed
        if model.index_ignored:
            self.event("IndexIgnored", model.index_ignored)
        self._fill = prefetch is Prefetch.FULL
        self._first_credentials, self._first_parents = credentials, found.parents
        self.parents = tuple(parent.reference for parent in found.parents)
        manifest = SentManifest(os.dup(model.manifest_fd), model.media_type)
        parents = [SentManifest(os.dup(parent.fd), parent.media_type) for parent in found.manifests]
        self._creation = asyncio.create_task(self._create(fetcher, manifest, parents))

    async def ready(self, patience_s: float) -> None:
        """Returns once the mount is served.

        Raises: ModelPreparingError when that takes longer than `patience_s`; UnsupportedModelError and the like (from the
        worker), MountError (from the keeper), ControlError.
        """
        assert self._creation is not None
        await asyncio.wait([self._creation], timeout=patience_s)
        if self.failure is not None:
            raise self.failure
        if self._stopping:
            raise ControlError(f"mount {self.mount_id[:8]}: it was ended; try again")
        if not self._creation.done():
            raise self._build.not_ready()

    async def _create(self, fetcher: Child, manifest: SentManifest, parents: Sequence[SentManifest]) -> None:
        try:
            worker_ready = asyncio.create_task(self._pool.take("worker"))
            self._area_fd = _open_area(self._settings.area_dir(self.key), self._settings)
            if self.reference.is_layout:
                self._layout_fd = os.open(self.reference.layout_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            self._worker = await worker_ready
            await self._start_fetcher(fetcher, self._first_sources())
            await self._prove(fetcher)
            origins = ["" if parent.origin == self.reference.origin else parent.origin for parent in self.parents]
            self._tree_fd, self.summary = await self._build.run(
                self._worker,
                fetcher,
                manifest,
                list(zip(origins, parents, strict=True)),
                self._area_fd,
                self.key.view.texts,
                str(self.key.verify),
            )
            self._save_tree()
            collected = await self._keeper.mount(
                self.mount_id, self._settings.read_ahead_kb, self._settings.fuse_backend
            )
            self.kept, self._init = collected.mount, collected.init
            self._fuse_fd, self._table_fd = collected.fuse_fd, collected.table_fd
            os.close(collected.root_fd)
            if collected.mount.existed:
                self._resend()  # what the worker of a supervisor that died had taken
            await self._serve(self._worker)
        except Exception as exc:
            if not isinstance(exc, ModelMountError):
                log.exception("mount %s: failed by a bug", self.mount_id[:8])
                exc = ModelMountError(f"internal error while mounting: {type(exc).__name__}")
            self.failure = exc
            await self._tear_down()
            return
        finally:
            wire.close_all([manifest.fd, *(parent.fd for parent in parents)])
        self._watchers = [asyncio.create_task(self._watch_worker()), asyncio.create_task(self._watch_fetcher())]

    def is_stranger(self, reference: Reference) -> bool:
        """Whether that registry has yet to show that it has the model, and not only its manifest."""
        return self.key.origin is None and reference.origin not in self._proven

    async def _prove(self, fetcher: Child) -> None:
        """The mount shares its blocks with volumes of other registries, those of before and those to come."""
        if self.is_stranger(self.reference):
            await fetcher.call("prove", _PROOF_TIMEOUT_S)
            self._proven.add(self.reference.origin)

    async def _fetch_manifest(self, digest: Digest) -> SentManifest:
        if self._fetcher is None:
            raise ControlError(f"mount {self.mount_id[:8]}: its fetcher is gone; try again")
        try:
            child = await resolve(
                self._fetcher, self.reference.with_digest(digest), self._first_credentials, self._settings
            )
            self._manifests.keep(self.key.domain, kept_of(child), _OF_AN_INDEX)
        except RegistryUnavailableError:
            kept = self._manifests.get(self.key.domain, digest, _OF_AN_INDEX)
            if kept is None:
                raise
            child = await resolve_known(self._fetcher, kept, self.reference.origin)
        return SentManifest(child.manifest_fd, child.media_type)

    async def use_first_credentials(self, credentials: Credentials, parents: tuple[Parent, ...] = ()) -> None:
        """Newer ones, while the mount is being made and no volume has it yet."""
        if self.leases or (credentials, parents) == (self._first_credentials, self._first_parents):
            return
        self._first_credentials, self._first_parents = credentials, parents
        await self._send_sources(self._first_sources())

    def _first_sources(self) -> list[dict[str, Any]]:
        own = {"reference": str(self.reference), "credentials": to_wire(self._first_credentials)}
        return [own, *parent_sources(self.reference, [self._first_parents])]

    async def access(self, reference: Reference, credentials: Credentials) -> None:
        """Whether these credentials may read the model (or the parent of it whose digest `reference` has), asked of the
        registry itself.

        Raises: RegistryAuthError, ModelNotFoundError, RegistryUnavailableError; DigestMismatchError when another registry
        than the mount's has the manifest but not the blobs.
        """
        if self._fetcher is None:
            raise ControlError(f"mount {self.mount_id[:8]}: its fetcher is being replaced; try again")
        # A registry that only repeats a manifest must not open the door to blobs it does not have.
        wanted = reference if reference in self.parents else reference.with_digest(self.key.digest)
        model = await resolve(self._fetcher, wanted, credentials, self._settings, prove=self.is_stranger(reference))
        os.close(model.manifest_fd)
        self._proven.add(reference.origin)

    async def add_lease(self, target_path: str, lease: Lease) -> None:
        """The target shows the mount from now on, and its volume's registry is one more to fetch from."""
        before = self._sources()
        self.leases[target_path] = lease
        if self._sources() != before:
            await self._use_sources()

    async def replace_credentials(
        self, target_path: str, credentials: Credentials, parents: tuple[Parent, ...] = ()
    ) -> None:
        """There are newer ones: use them from now on."""
        lease = self.leases[target_path]
        if (lease.credentials, lease.parents) != (credentials, parents):
            lease.credentials, lease.parents = credentials, parents
            await self._use_sources()

    async def drop_lease(self, target_path: str) -> None:
        """The target does not show the mount any more, so its credentials are not used for others either."""
        del self.leases[target_path]
        if self.leases:
            await self._use_sources()

    async def fill(self) -> None:
        """Fetch the whole model from now on: one volume at least wants it."""
        if not self._fill:
            self._fill = True
            if self._fetcher is not None:
                with contextlib.suppress(ControlError):  # a new fetcher is told when it starts
                    await self._fetcher.call("fill", 5.0)

    async def progress(self) -> tuple[int, int, ModelMountError | None]:
        """Bytes verified whole, bytes of the model, and what makes the first of them never complete."""
        stats = await self._fetch_stats()
        blobs = stats.get("blobs", [])
        done = sum(blob["size_bytes"] for blob in blobs if blob["state"] == "verified")
        total = sum(blob["size_bytes"] for blob in blobs)
        wrong = next((blob["digest"] for blob in blobs if blob["state"] == "poisoned"), None)
        error = DigestMismatchError(
            f"model {self.key.digest.short()}: blob {wrong} is not what its digest says; check the registry's storage, or "
            "push the model again",
            subject=wrong,
        )
        return done, total if blobs else -1, error if wrong else None

    async def stats(self) -> dict[str, Any]:
        """Everything `modelmount status` shows of a mount. Does not touch the mount itself."""
        reads: dict[str, Any] = {}
        progress = await self._fetch_stats()
        if self._worker is not None:
            with contextlib.suppress(ControlError):
                reads, _ = await self._worker.call("stats", 2.0)
        return {
            "mount_id": self.mount_id,
            "reference": str(self.reference),
            "digest": str(self.key.digest),
            "verify": str(self.key.verify),
            "index": self.index,
            "prefetch": str(Prefetch.FULL if self._fill else Prefetch.ONDEMAND),
            "device": self.kept.device if self.kept else None,
            "can_resend": self.kept.can_resend if self.kept else None,
            "init_set_version": self.kept.init_set_version if self.kept else None,
            "backend": self.kept.backend if self.kept else None,
            "jail": self.jail,
            "dead": self.dead,
            "preparing": None if self.kept is not None else self._build.not_ready().message,
            "variant_digest": self._build.chosen,
            "parents": [str(parent) for parent in self.parents],
            "layers": self._build.layers,
            "warnings": self._build.warnings,
            "files": self.summary.get("files", 0),
            "total_bytes": self.summary.get("total_bytes", 0),
            "volumes": sorted({lease.volume_id for lease in self.leases.values()}),
            "targets": sorted(self.leases),
            "refused": {path: lease.refused for path, lease in self.leases.items() if lease.refused},
            "worker_alive": self._worker is not None and self._worker.alive,
            "fetcher_alive": self._fetcher is not None and self._fetcher.alive,
            "worker_pid": self._worker.pid if self._worker else None,
            "fetcher_pid": self._fetcher.pid if self._fetcher else None,
            "worker_restarts": self.worker_restarts,
            "fetcher_restarts": self.fetcher_restarts,
            "reads": reads,
            "progress": progress,
            "events": list(self.events),
        }

    async def _fetch_stats(self) -> dict[str, Any]:
        """Empty while the fetcher is being replaced."""
        if self._fetcher is None:
            return {}
        try:
            _, (stats_fd,) = await self._fetcher.call("stats", 2.0)
        except ControlError:
            return {}
        try:
            stats: dict[str, Any] = json.loads(wire.read_all(stats_fd, _STATS_LIMIT_BYTES, "stats"))
        finally:
            os.close(stats_fd)
        return stats

    async def close(self) -> None:
        """Unmount, stop both processes, close everything. Idempotent; never waits for a registry or a reader."""
        self._stopping = True
        if self._creation is not None and not self._creation.done():
            self._creation.cancel()
            await asyncio.wait([self._creation])
        await self._tear_down()

    async def _tear_down(self) -> None:
        self._stopping = True
        for watcher in self._watchers:
            watcher.cancel()
        if self._worker is not None and self._worker.alive:
            with contextlib.suppress(ModelMountError):
                await self._worker.call("release", 1.0)
        if self.kept is not None:
            try:
                await self._keeper.unmount(self.mount_id)
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

    async def _start_fetcher(self, fetcher: Child, sources: list[dict[str, Any]]) -> None:
        fetcher.on_notification = self._on_notification
        await self._send_hosts(fetcher, sources)
        sources_fd = wire.memfd("sources", json.dumps(sources).encode())
        fds = [sources_fd, self._area_fd, *([self._layout_fd] if self._layout_fd >= 0 else [])]
        reply, layers_fds = await fetcher.call(
            "start",
            _SERVE_TIMEOUT_S,
            fds,
            digest=str(self.key.digest),
            **self._settings.address_rules,
            threads=self._settings.fetch_threads,
            fill=self._fill or self.key.verify is not Verify.CHUNK,
            verify=str(self.key.verify),
            variant=self.key.view.variant,
            allowance=await self._granted(),
        )
        self._proven.update(map(str, reply.pop("origins", ())))
        self.index = str(reply.pop("index", "none"))
        self.jail["fetcher"] = reply
        try:
            own = [source for source in sources if not source.get("is_parent")]
            parents = [[source] for source in sources if source.get("is_parent")]
            for layers_fd, origins in zip(layers_fds, [own, *parents], strict=True):
                await self._attach(fetcher, origins, layers_fd)
        except ModelMountError as exc:  # then everything is fetched
            log.info("mount %s shares nothing: %s", self.mount_id[:8], exc)
        finally:
            wire.close_all([sources_fd, *layers_fds])

    async def _attach(self, fetcher: Child, sources: list[dict[str, Any]], layers_fd: int) -> None:
        """What the store has goes into our area, or will once our registry has shown that it has it too."""
        if self.key.domain != SHARED_DOMAIN:
            return
        origins = [Reference.parse(source["reference"]).origin for source in sources]
        fields, challenges_fds = await self._store.call(
            "attach", _STORE_TIMEOUT_S, [layers_fd], mount_id=self.mount_id, origins=origins
        )
        try:
            if fields.get("challenges"):
                await fetcher.call("challenge", 5.0, challenges_fds)
        finally:
            wire.close_all(challenges_fds)

    async def _granted(self) -> int:
        """How much our fetcher may allocate (more) now; nothing while the store is away."""
        try:
            fields, _ = await self._store.call("grant", _STORE_TIMEOUT_S, mount_id=self.mount_id)
        except ModelMountError as exc:
            log.warning("mount %s: no room in the cache: %s", self.mount_id[:8], exc)
            return 0
        return int(fields.get("size_bytes", 0))

    async def _grant_more(self) -> None:
        given = await self._granted()
        if given and self._fetcher is not None:
            await self._fetcher.call("grant", 5.0, size_bytes=given)

    async def _tell_store(self, op: str, message: wire.Message) -> None:
        """A blob is complete, or a block that the store asked for is here."""
        if self.key.domain != SHARED_DOMAIN:
            return
        fields = {name: message[name] for name in ("digest", "size_bytes", "block") if name in message}
        own = [lease.reference.origin for lease in self.leases.values()] or [self.reference.origin]
        origins = [str(message["origin"])] if message.get("origin") else own
        for patience_s in (1.0, 5.0, 0.0):
            try:
                reply, _ = await self._store.call(
                    op, _STORE_TIMEOUT_S, mount_id=self.mount_id, origins=list(dict.fromkeys(origins)), **fields
                )
                break
            except ControlError:  # it is being started again
                if not patience_s:
                    raise
                await asyncio.sleep(patience_s)
        if reply.get("shared"):
            await self._adopt_shared(str(message["digest"]))

    async def _adopt_shared(self, digest: str) -> None:
        if self._fetcher is not None:
            await self._fetcher.call("shared", 5.0, digest=digest)

    def on_store_message(self, message: wire.Message) -> None:
        """A blob of ours is shared now, or was found wrong."""
        if message.get("op") == "shared":
            self._aside(self._adopt_shared(str(message.get("digest"))))
        elif message.get("op") == "wrong":
            self.event("IntegrityFailure", str((message.get("error") or {}).get("message", "")))

    def _aside(self, work: Coroutine[Any, Any, None]) -> None:
        """Beside everything else, and only logged when it fails: nobody waits for it."""

        async def run() -> None:
            try:
                await work
            except ModelMountError as exc:
                log.info("mount %s: %s", self.mount_id[:8], exc)

        task = asyncio.create_task(run())
        self._asides.add(task)
        task.add_done_callback(self._asides.discard)

    async def _serve(self, worker: Child) -> None:
        assert self.kept is not None
        worker.on_notification = self._on_notification
        channel = await self._channel_to_fetcher()
        try:
            self.jail["worker"], _ = await worker.call(
                "serve",
                _SERVE_TIMEOUT_S,
                [self._fuse_fd, self._table_fd, self._tree_fd, self._area_fd, channel.fileno()],
                init=self._init.hex(),
                backend=self.kept.backend,
                read_deadline_s=self._settings.read_deadline_s,
                recheck=self.key.verify is not Verify.CHUNK,
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
                await self._start_fetcher(fetcher, self._sources())
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

    async def _use_sources(self) -> None:
        """Tell the fetcher where to fetch from, and as whom, now."""
        await self._send_sources(self._sources())

    async def _send_sources(self, sources: list[dict[str, Any]]) -> None:
        if self._fetcher is not None:
            with contextlib.suppress(ControlError):  # a new fetcher gets them when it starts
                await self._send_hosts(self._fetcher, sources)
                sources_fd = wire.memfd("sources", json.dumps(sources).encode())
                try:
                    await self._fetcher.call(
                        "credentials",
                        5.0,
                        [sources_fd],
                        **self._settings.address_rules,
                        proven=sorted(self._proven),
                    )
                finally:
                    os.close(sources_fd)

    async def _send_hosts(self, fetcher: Child, sources: list[dict[str, Any]]) -> None:
        """A live mount goes on without mirrors that somebody has misspelt meanwhile."""
        try:
            await send_hosts(fetcher, [Reference.parse(source["reference"]) for source in sources], self._settings)
        except InvalidVolumeError as exc:
            log.error("mount %s: without its mirrors: %s", self.mount_id[:8], exc)

    def _sources(self) -> list[dict[str, Any]]:
        """One per origin that a volume names, with the credentials of the volumes that name it, the newest first: they go
        to no other. There is more than one only where the origin is no part of the key. Then those of parents.
        """
        by_origin: dict[str, list[Lease]] = {}
        for lease in reversed(self.leases.values()):
            by_origin.setdefault(lease.reference.origin, []).append(lease)
        own = [
            {
                "reference": str(leases[0].reference.with_digest(self.key.digest)),
                "credentials": to_wire(within_limits(united(*(lease.credentials for lease in leases)))),
            }
            for leases in by_origin.values()
        ]
        return own + parent_sources(self.reference, [lease.parents for lease in reversed(self.leases.values())])

    def _on_notification(self, message: wire.Message) -> None:
        if message.get("op") == "event":
            error = message.get("error") or {}
            self.event(str(message.get("reason")), str(error.get("message", "")))
        elif message.get("op") == "grant":
            self._aside(self._grant_more())
        elif message.get("op") == "complete":
            self._aside(self._tell_store("promote", message))
        elif message.get("op") == "proof":
            self._aside(self._tell_store("prove", message))

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


async def send_hosts(fetcher: Child, references: Sequence[Reference], settings: SupervisorSettings) -> None:
    """Tell a fetcher which hosts serve these registries, as this node's files say now. Raises: InvalidVolumeError."""
    if settings.registry_config_dir is None:
        return
    registries = sorted({reference.registry for reference in references if not reference.is_layout})
    hosts = {name: hosts_to_wire(read_hosts(settings.registry_config_dir, name)) for name in registries}
    hosts_fd = wire.memfd("hosts", json.dumps(hosts).encode())
    try:
        await fetcher.call("hosts", 5.0, [hosts_fd])
    finally:
        os.close(hosts_fd)


async def resolve(
    fetcher: Child,
    reference: Reference,
    credentials: Credentials,
    settings: SupervisorSettings,
    *,
    variant: str = "",
    prove: bool = False,
) -> Resolved:
    """What `reference` names now; `variant` is which manifest is meant if that is an index. `prove`: the fetcher serves that
    model already, and checks that this registry has its blobs too.

    Raises: what the registry answered, as our errors.
    """
    layout_fds: list[int] = []
    if reference.is_layout:
        try:
            layout_fds = [os.open(reference.layout_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)]
        except OSError as exc:
            raise MountError(f"{reference}: {exc.strerror}; is it an OCI image-layout directory?") from exc
    try:
        await send_hosts(fetcher, [reference], settings)
        fields, fds = await fetcher.call(
            "resolve",
            settings.resolve_timeout_s + 5.0,
            layout_fds,
            reference=str(reference),
            credentials=to_wire(credentials),
            **settings.address_rules,
            registry_timeout_s=settings.resolve_timeout_s,
            variant=variant,
            prove=prove,
        )
    finally:
        wire.close_all(layout_fds)
    return _resolved(fields, fds)


async def resolve_known(fetcher: Child, manifest: KeptManifest, origin: str) -> Resolved:
    """The same for a manifest that is on this node: no registry is asked. Raises: ControlError."""
    manifest_fd = wire.memfd("manifest", manifest.data)
    try:
        fields, fds = await fetcher.call(
            "known",
            _STORE_TIMEOUT_S,
            [manifest_fd],
            origin=origin,
            digest=str(manifest.digest),
            media_type=manifest.media_type,
            indexed=manifest.indexed,
        )
    finally:
        os.close(manifest_fd)
    return replace(_resolved(fields, fds), parent=manifest.parent)


def kept_of(model: Resolved) -> KeptManifest:
    """What of it to keep."""
    data = wire.read_all(model.manifest_fd, MAX_BYTES, "manifest")
    return KeptManifest(model.digest, model.media_type, data, model.indexed, model.parent)


def _resolved(fields: dict[str, Any], fds: list[int]) -> Resolved:
    return Resolved(
        wire.exactly(fds, 1)[0],
        wire.field(fields, "media_type", str),
        Digest.parse(wire.field(fields, "digest", str)),
        wire.field(fields, "indexed", bool),
        str(fields.get("index_ignored", "")),
        wire.field(fields, "parent", str) if fields.get("parent") is not None else None,
    )


def _open_area(path: str, settings: SupervisorSettings) -> int:
    """The mount's own part of the cache: the fetcher writes, the store links and removes, the worker reads. Locked as long
    as any of us has it open, so that the store knows that it is in use.
    """
    while True:
        os.makedirs(path, mode=0o755, exist_ok=True)
        give(path, settings.fetcher_uid, settings.store_gid, 0o2775)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(fd, fcntl.LOCK_SH)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        os.close(fd)  # evicted between open and lock


def _connection_ended(fuse_fd: int) -> bool:
    """POLLERR: unmounted or aborted. Asked before a worker is replaced, or a dead mount would spin."""
    poll = select.poll()
    poll.register(fuse_fd, select.POLLIN)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
