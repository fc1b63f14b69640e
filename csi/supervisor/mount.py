"""One mounted model: who leases it, and its two halves, which go on by themselves, also without a supervisor.

serving      the connection to the kernel and its worker (`csi.supervisor.serving`)
fetching     the cache area, its fetcher, and the store (`csi.supervisor.fetching`)
leases       one per target path; the mount ends with the last one
record       what the next supervisor needs to go on with the mount (`csi.supervisor.records`)
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from csi.control import wire
from csi.control.keeper import CollectedMount, KeptMount
from csi.credentials import Credentials
from csi.errors import ControlError, DigestMismatchError, ModelMountError, MountError, RegistryUnavailableError
from csi.oci.digest import Digest
from csi.oci.reference import Reference
from csi.supervisor.build import BuildPhase, SentManifest
from csi.supervisor.child import Child, ChildPool
from csi.supervisor.fetching import Fetching
from csi.supervisor.kept import KeptMounts
from csi.supervisor.lease import Lease, Source, source, sources_of
from csi.supervisor.manifests import KeptManifests
from csi.supervisor.memory import MemoryBudget
from csi.supervisor.parents import NO_PARENTS, FoundParents, Parent, parent_sources
from csi.supervisor.passing import PassThrough, refusal_for
from csi.supervisor.records import MountRecord, MountRecords
from csi.supervisor.resolve import Resolved, kept_of, resolve, resolve_known
from csi.supervisor.sealing import Sealing
from csi.supervisor.serving import Serving
from csi.supervisor.settings import SupervisorSettings
from csi.supervisor.store_link import StoreLink
from csi.volume import MountKey, Prefetch, Verify

log = logging.getLogger(__name__)

_OF_AN_INDEX = "of an index"  # kept apart: whether these have a block index was not looked at


class Mount:
    """Made with `prepare` and served once `ready` returns, or `adopt`ed; everything runs on the supervisor's event loop."""

    def __init__(
        self,
        key: MountKey,
        reference: Reference,
        keeper: KeptMounts,
        pool: ChildPool,
        store: StoreLink,
        records: MountRecords,
        settings: SupervisorSettings,
        manifests: KeptManifests,
        memory: MemoryBudget,
    ) -> None:
        self.key = key
        self.mount_id = key.mount_id
        self.reference = reference.with_digest(key.digest)
        self.leases: dict[str, Lease] = {}
        self.summary: dict[str, int] = {}
        self.events: deque[dict[str, Any]] = deque(maxlen=64)
        self._keeper, self._pool, self._records, self._settings = keeper, pool, records, settings
        self._store = store
        self._manifests, self._memory = manifests, memory
        self.fetching = Fetching(
            key,
            keeper,
            pool,
            store,
            settings,
            self._sources,
            self.event,
            self._on_new_fetcher,
            lambda: self.serving.resting,
            memory,
        )
        self.serving = Serving(
            keeper,
            pool,
            settings,
            self.fetching.channel,
            lambda: self.fetching.child is not None,
            self.event,
            lambda: memory.share_of(key.mount_id),
            recheck=key.verify is not Verify.CHUNK,
        )
        self._sealing = Sealing(
            key.mount_id,
            key.domain,
            settings,
            pool,
            store,
            lambda: self.serving.child,
            lambda: self.serving.passing,
        )
        self.indexed = False
        self.wanted_at = 0.0
        self.parents: tuple[Reference, ...] = ()
        """What the model builds on, by digest."""
        self._first_credentials: Credentials = ()
        self._first_parents: tuple[Parent, ...] = ()
        self._stopping = self._paused = False
        self._tree_fd = -1
        self._build = BuildPhase(f"model {key.digest.short()}", self._fetch_manifest)
        self._creation: asyncio.Task[None] | None = None
        self.failure: ModelMountError | None = None
        """Why it never was served."""

    @property
    def kept(self) -> KeptMount | None:
        """Its superblock, once there is one."""
        return self.serving.kept

    @property
    def dead(self) -> bool:
        """Its connection has ended; only a new mount helps."""
        return self.serving.dead

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
        self.fetching.child = fetcher
        self.indexed = model.indexed
        if model.index_ignored:
            self.event("IndexIgnored", model.index_ignored)
        self.fetching.filling = prefetch is Prefetch.FULL
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
        worker: Child | None = None
        try:
            worker_ready = asyncio.create_task(self._pool.take("worker"))
            self.fetching.open(self.reference)
            worker = self.serving.child = await worker_ready
            await self.fetching.start(fetcher)
            await self.fetching.prove(fetcher, self.reference)
            area_fd = self.fetching.area_fd
            origins = ["" if parent.origin == self.reference.origin else parent.origin for parent in self.parents]
            self._tree_fd, self.summary = await self._build.run(
                worker,
                fetcher,
                manifest,
                list(zip(origins, parents, strict=True)),
                area_fd,
                self.key.view.texts,
                str(self.key.verify),
            )
            self._records.put_tree(self.mount_id, self._tree_fd)
            collected = await self._keeper.mount(
                self.mount_id, self._settings.read_ahead_kb, self._settings.fuse_backend
            )
            for slot in collected.slots.values():
                wire.close_all(slot.fds)
            self._pass_through(collected)
            self.serving.connect(collected, self._tree_fd, area_fd)
            await self.fetching.keep()
            await self.serving.start(worker)
            self.save()
        except Exception as exc:
            if not isinstance(exc, ModelMountError):
                log.exception("mount %s: failed by a bug", self.mount_id[:8])
                exc = ModelMountError(f"internal error while mounting: {type(exc).__name__}")
            self.failure = exc
            await self._tear_down()
            return
        finally:
            wire.close_all([manifest.fd, *(parent.fd for parent in parents)])
        self.serving.watch()
        self.fetching.watch()

    def _pass_through(self, collected: CollectedMount) -> None:
        refusal = refusal_for(self._settings, collected, self.key.domain)
        passing = PassThrough(self.mount_id, self._keeper, self._store, refusal, lambda: self.serving.child)
        self.serving.passing = self.fetching.passing = passing

    async def adopt(self, record: MountRecord, collected: CollectedMount) -> None:
        """Go on with a mount of a supervisor before us. What of it still lives serves on; the rest is started.

        Raises: MountError, OSError for a mount that cannot be served any more; then it is the caller's to `close`.
        """
        self.leases.update(record.leases)
        self.indexed, self.summary, self.parents = record.indexed, record.summary, record.parents
        self.fetching.filling = record.filling
        self.fetching.proven.update(record.proven)
        slots = collected.slots
        try:
            self.fetching.open(self.reference)
            self._tree_fd = self._records.open_tree(self.mount_id)
        finally:
            self.serving.connect(collected, self._tree_fd, self.fetching.area_fd)
        self._pass_through(collected)
        await asyncio.gather(self.fetching.adopt(slots.get("fetcher")), self.serving.adopt(slots.get("worker")))
        if self.serving.child is not None and self.serving.passing is not None:
            await self.serving.passing.begin_anew(self.serving.child)
        await self.fetching.announce()
        self.serving.watch()
        self.fetching.watch()

    async def renew(self) -> None:
        """Replace worker and fetcher of a supervisor before us by our own. Raises: ControlError, what a start failed with."""
        try:
            await self.fetching.prepare_next()
        except ModelMountError as exc:
            log.error("mount %s: its fetcher is not replaced yet: %s", self.mount_id[:8], exc)
        try:
            await self.serving.renew(self.fetching.switch)
        finally:
            await self.fetching.drop_next()
        if self.serving.resting and self.fetching.resting:
            self._memory.give_back(self.mount_id)

    @property
    def served(self) -> bool:
        """Whether it is whole: what is still being made is nobody's yet."""
        return self.kept is not None and (self._creation is None or self._creation.done()) and self.failure is None

    @property
    def is_ours(self) -> bool:
        """Whether the worker that serves it, or will, is one that this supervisor has started."""
        return self.dead or self.serving.is_ours

    def pause(self) -> None:
        """Another supervisor takes over: do nothing, while worker and fetcher go on."""
        self._paused = True
        self.serving.pause()
        self.fetching.pause()

    def resume(self) -> None:
        """It did not."""
        self._paused = False
        self.serving.resume()
        self.fetching.resume()

    def let_go(self) -> None:
        """It has."""
        self._stopping = True
        self.serving.let_go()
        self.fetching.let_go()
        if self._tree_fd >= 0:
            os.close(self._tree_fd)
            self._tree_fd = -1
        self._sealing.close()

    def _check_ours(self) -> None:
        if self._paused:
            raise ControlError(f"mount {self.mount_id[:8]}: another supervisor takes over; try again")

    def save(self) -> None:
        """Leave on disk what the next supervisor needs. Without it, it would make the mount anew."""
        if self.kept is None or self._paused:
            return
        record = MountRecord(
            key=self.key,
            reference=self.reference,
            indexed=self.indexed,
            filling=self.fetching.filling,
            summary=self.summary,
            proven=tuple(sorted(self.fetching.proven)),
            parents=self.parents,
            leases=self.leases,
        )
        try:
            self._records.put(record)
        except MountError as exc:
            log.error("%s", exc)

    async def _fetch_manifest(self, digest: Digest) -> SentManifest:
        fetcher = await self.fetching.awake()
        try:
            child = await resolve(fetcher, self.reference.with_digest(digest), self._first_credentials, self._settings)
            self._manifests.keep(self.key.domain, kept_of(child), _OF_AN_INDEX)
        except RegistryUnavailableError:
            kept = self._manifests.get(self.key.domain, digest, _OF_AN_INDEX)
            if kept is None:
                raise
            child = await resolve_known(fetcher, kept, self.reference.origin)
        return SentManifest(child.manifest_fd, child.media_type)

    def is_stranger(self, reference: Reference) -> bool:
        """See `Fetching.is_stranger`."""
        return self.fetching.is_stranger(reference)

    async def use_first_credentials(self, credentials: Credentials, parents: tuple[Parent, ...] = ()) -> None:
        """Newer ones, while the mount is being made and no volume has it yet."""
        if self.leases or (credentials, parents) == (self._first_credentials, self._first_parents):
            return
        self._first_credentials, self._first_parents = credentials, parents
        await self.fetching.use_sources()

    async def access(self, reference: Reference, credentials: Credentials) -> None:
        """Whether these credentials may read the model (or the parent of it whose digest `reference` has), asked of the
        registry itself.

        Raises: RegistryAuthError, ModelNotFoundError, RegistryUnavailableError; DigestMismatchError when another registry
        than the mount's has the manifest but not the blobs.
        """
        fetcher = await self.fetching.awake()
        # A registry that only repeats a manifest must not open the door to blobs it does not have.
        wanted = reference if reference in self.parents else reference.with_digest(self.key.digest)
        stranger = self.is_stranger(reference)
        model = await resolve(fetcher, wanted, credentials, self._settings, prove=stranger)
        os.close(model.manifest_fd)
        self.fetching.proven.add(reference.origin)

    async def add_lease(self, target_path: str, lease: Lease) -> None:
        """The target shows the mount from now on, and its volume's registry is one more to fetch from."""
        self._check_ours()
        before = self._sources()
        self.leases[target_path] = lease
        self.save()
        if self._sources() != before:
            await self.fetching.use_sources()

    async def seal(self) -> bool:
        """Whether a new target may show the model as plain files."""
        return await self._sealing.seal(self._tree_fd) if self._tree_fd >= 0 else False

    async def replace_credentials(
        self, target_path: str, credentials: Credentials, parents: tuple[Parent, ...] = ()
    ) -> None:
        """There are newer ones: use them from now on."""
        self._check_ours()
        lease = self.leases[target_path]
        if (lease.credentials, lease.parents) != (credentials, parents):
            lease.credentials, lease.parents = credentials, parents
            await self.fetching.use_sources()

    async def drop_lease(self, target_path: str) -> None:
        """The target does not show the mount any more, so its credentials are not used for others either."""
        self._check_ours()
        del self.leases[target_path]
        self.save()
        if self.leases:
            await self.fetching.use_sources()

    async def progress(self) -> tuple[int, int, ModelMountError | None]:
        """Bytes verified whole, bytes of the model, and what makes the first of them never complete."""
        stats = await self.fetching.stats()
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
        worker, fetcher = self.serving.child, self.fetching.child
        reads, progress = await asyncio.gather(self.serving.stats(), self.fetching.stats())
        return {
            "mount_id": self.mount_id,
            "reference": str(self.reference),
            "digest": str(self.key.digest),
            "verify": str(self.key.verify),
            "index": self.fetching.index,
            "prefetch": str(Prefetch.FULL if self.fetching.filling else Prefetch.ONDEMAND),
            "device": self.kept.device if self.kept else None,
            "can_resend": self.kept.can_resend if self.kept else None,
            "init_set_version": self.kept.init_set_version if self.kept else None,
            "backend": self.kept.backend if self.kept else None,
            "passthrough": self.serving.passing.status() if self.serving.passing else None,
            "sealed": {
                "refusal": self._sealing.refusal,
                "targets": sorted(path for path, lease in self.leases.items() if lease.sealed),
            },
            "jail": {"worker": self.serving.jail, "fetcher": self.fetching.jail},
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
            "worker_alive": worker is not None and worker.alive,
            "worker_resting": self.serving.resting,
            "fetcher_resting": self.fetching.resting,
            "fetcher_alive": fetcher is not None and fetcher.alive,
            "worker_pid": self.serving.pid,
            "fetcher_pid": self.fetching.pid,
            "worker_restarts": self.serving.restarts,
            "fetcher_restarts": self.fetching.restarts,
            "longest_pause_s": round(self.serving.longest_pause_s, 3),
            "reads": reads,
            "progress": progress,
            "memory_budget_bytes": 0 if self.fetching.resting else self._memory.share_of(self.mount_id).size_bytes,
            "events": list(self.events),
        }

    async def close(self) -> None:
        """Unmount, stop both processes, close everything. Idempotent; never waits for a registry or a reader."""
        self._stopping = True
        if self._creation is not None and not self._creation.done():
            self._creation.cancel()
            await asyncio.wait([self._creation])
        await self._tear_down()

    async def _tear_down(self) -> None:
        self._stopping = True
        await self.serving.release()
        if self.kept is not None:
            try:
                await self._keeper.unmount(self.mount_id)
            except ModelMountError as exc:
                log.warning("mount %s: %s", self.mount_id, exc)
        await asyncio.gather(self.serving.stop(), self.fetching.stop())
        self._memory.give_back(self.mount_id)
        if self._tree_fd >= 0:
            os.close(self._tree_fd)
            self._tree_fd = -1
        self._sealing.close()
        self._records.remove(self.mount_id)

    def on_store_message(self, message: wire.Message) -> None:
        """See `Fetching.on_store_message`."""
        self.fetching.on_store_message(message)

    async def fill(self) -> None:
        """See `Fetching.fill`."""
        if not self.fetching.filling:
            await self.fetching.fill()
            self.save()

    async def _on_new_fetcher(self) -> None:
        await self.serving.use_new_fetcher()

    def _sources(self) -> list[Source]:
        """Where its bytes may come from now: its volumes' registries, or while it is being made the first one's."""
        if not self.leases:
            own = source(self.reference, self._first_credentials)
            return [own, *parent_sources(self.reference, [self._first_parents])]
        return sources_of(self.leases.values(), self.reference, self.key.digest)

    def event(self, reason: str, text: str) -> None:
        """Remember what happened, for status and (in a cluster) Kubernetes events."""
        self.events.append({"time": time.time(), "reason": reason, "message": text[:2000]})
