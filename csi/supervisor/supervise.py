"""The table of mounts, and how one comes to be: resolve, find or create, lease.

A lease is taken for a target path and given back by name, so the node process may die at any time between: after
its return it says which leases it still has (`reconcile`), and the rest end.

Mounts outlive their supervisor. The next one finds them by the keeper (descriptors, its children's sockets) and by their
records (who has them), goes on with the children that live, and then replaces them by its own, one mount at a time.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from csi.control import wire
from csi.credentials import NO_LOGINS, Credentials, Keyring, to_wire, within_limits
from csi.errors import (
    ControlError,
    InvalidVolumeError,
    ModelMountError,
    ModelNotFoundError,
    ModelPreparingError,
    OperationPendingError,
    RegistryAuthError,
    RegistryUnavailableError,
    UnsupportedModelError,
)
from csi.keychain.own_logins import own_logins
from csi.oci.digest import Digest
from csi.oci.reference import Reference
from csi.oci.view import View
from csi.supervisor.access import AccessRecords, Caller, Model
from csi.supervisor.child import Child, ChildPool, Role
from csi.supervisor.kept import KeptMounts
from csi.supervisor.lease import Lease, Logins
from csi.supervisor.manifests import KeptManifests
from csi.supervisor.memory import MemoryBudget
from csi.supervisor.mount import Mount
from csi.supervisor.node_credentials import NodeCredentials
from csi.supervisor.parents import NO_PARENTS, Parent, find_parents
from csi.supervisor.records import MountRecord, MountRecords
from csi.supervisor.resolve import Resolved, kept_of, resolve, resolve_known
from csi.supervisor.settings import SupervisorSettings
from csi.supervisor.store_link import StoreLink
from csi.volume import SHARED_DOMAIN, MountKey, Prefetch, Verify, mount_key

log = logging.getLogger(__name__)

_CACHE_VERBS = ("ls", "df", "prune", "verify", "pin", "unpin")
_CACHE_TIMEOUT_S = 3600.0  # hashing everything takes its time
_EAGER_POLL_S = 0.2
_FRESH_S = 60.0  # a hundred pods that start at once are one question to the registry
_ASK_AGAIN_S = 3600.0
_LONGEST_RENEWAL_DELAY_S = 30.0

KnownCredentials = dict[str, dict[str, Logins | None]]
"""By mount id and target path; None: not known."""
_Answer = TypeVar("_Answer")


class Supervisor:
    """All methods run on one event loop; work that others may join is shielded from its callers' deadlines."""

    def __init__(self, settings: SupervisorSettings) -> None:
        self._settings = settings
        self._keeper = KeptMounts(settings.state_dir)
        self._pool = ChildPool(
            [
                Role("worker", settings.worker_uid, settings.child_gid, settings.jail_flags()),
                Role("fetcher", settings.fetcher_uid, settings.child_gid, settings.fetcher_flags()),
                Role("store", settings.store_uid, settings.store_gid, settings.jail_flags()),
            ],
            settings.spares,
        )
        logins = own_logins(
            settings.node_registry_config, settings.credential_provider_config, settings.credential_provider_bin_dir
        )
        self._node_credentials = NodeCredentials(logins, settings.logins_kept_s)
        self._renews_logins = bool(logins)
        self._renewing: asyncio.Task[None] | None = None
        self._store = StoreLink(settings, self._pool, self._on_store_message)
        self._memory = MemoryBudget(settings.memory_budget_bytes)
        self._records = MountRecords(settings.state_dir)
        self._mounts: dict[str, Mount] = {}
        self._access = AccessRecords(os.path.join(settings.data_dir, "access"), settings.access_life_s)
        self._manifests = KeptManifests(os.path.join(settings.data_dir, "manifests"), settings.access_life_s)
        self._asking: dict[int, asyncio.Task[None]] = {}
        self._expiries: dict[str, asyncio.Task[None]] = {}
        self._following: asyncio.Task[None] | None = None
        self._ending: set[asyncio.Task[None]] = set()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def start_spares(self) -> None:
        """So that what comes next does not wait for interpreters to start."""
        await self._pool.fill()

    async def start(self, known: KnownCredentials, *, alone: bool) -> None:
        """Go on with the mounts there are. `known`: credentials that the supervisor before us handed over. `alone`: it is
        dead, so a mount whose connection the keeper does not have is lost.
        """
        spares = asyncio.create_task(self._pool.fill())
        await self._find_keeper()
        await self._adopt_all(known)
        if alone:
            await self._until_keeper_answers(self._keeper.settle)
        await asyncio.gather(self._store.start(), spares)
        self._renew_own_logins()

    async def renew_all(self) -> None:
        """Replace every worker and fetcher that an earlier supervisor started. Returns when nothing of it is needed."""
        delay_s = 0.1
        while foreign := [mount for mount in self._mounts.values() if mount.served and not mount.is_ours]:
            for mount in foreign:
                try:
                    has_worker = mount.serving.child is not None or mount.serving.resting
                    if self._mounts.get(mount.mount_id) is mount and has_worker:
                        await mount.renew()
                except ModelMountError as exc:
                    log.error("mount %s: the worker before serves on: %s", mount.mount_id[:8], exc)
                except Exception:
                    log.exception("mount %s: renewing it failed by a bug", mount.mount_id[:8])
            if any(mount.served and not mount.is_ours for mount in self._mounts.values()):
                await asyncio.sleep(delay_s)
                delay_s = min(_LONGEST_RENEWAL_DELAY_S, delay_s * 2)

    async def pause(self) -> KnownCredentials:
        """Another supervisor takes over: change nothing from now on. What is still being made ends, and is begun again by
        the next call of whoever waits for it.
        """
        endless = [task for task in (self._following, self._renewing) if task is not None]
        for task in endless:
            task.cancel()
        if endless:
            await asyncio.wait(endless)
        for task in (*self._expiries.values(), *self._asking.values()):
            task.cancel()
        self._expiries.clear()
        unfinished = [mount for mount in self._mounts.values() if not mount.served or mount.dead]
        for mount in self._mounts.values():
            if mount not in unfinished:
                mount.pause()
        await asyncio.gather(*(self._end(mount) for mount in unfinished), *self._ending, return_exceptions=True)
        await self._store.close()
        return {
            mount.mount_id: {path: Logins.of(lease) for path, lease in mount.leases.items()}
            for mount in self._mounts.values()
        }

    async def resume(self) -> None:
        """It did not."""
        await self._find_keeper()
        for mount in self._mounts.values():
            mount.resume()
            if not mount.leases:
                self._want(mount)
        await self._store.start()
        self._renew_own_logins()

    def _renew_own_logins(self) -> None:
        if self._renews_logins:
            self._renewing = asyncio.create_task(self._renew_logins())

    async def let_go(self) -> None:
        """It has: the mounts are its own."""
        for mount in self._mounts.values():
            mount.let_go()
            self._keeper.let_go(mount.mount_id)
        self._mounts.clear()
        await self._pool.close()

    async def _adopt_all(self, known: KnownCredentials) -> None:
        records = self._records.load()
        kept = [mount.mount_id for mount in await self._until_keeper_answers(self._keeper.mounts) if mount.connected]
        await asyncio.gather(
            *(self._adopt(mount_id, records.get(mount_id), known.get(mount_id, {})) for mount_id in kept)
        )
        self._records.keep_only(set(self._mounts))
        if self._mounts:
            log.info("%d mounts of an earlier supervisor go on", len(self._mounts))

    async def _adopt(self, mount_id: str, record: MountRecord | None, known: Mapping[str, Logins | None]) -> None:
        try:
            if record is None:
                log.warning("mount %s was never finished; it is removed", mount_id[:8])
                await self._keeper.unmount(mount_id)
                return
            for path, lease in record.leases.items():
                if (logins := known.get(path)) is not None:
                    logins.give(lease)
                else:  # this node's own may be enough
                    lease.credentials = await self._node_credentials.after((), lease.reference) or None
            mount = self._new_mount(record.key, record.reference)
            try:
                await mount.adopt(record, await self._keeper.collect(mount_id))
            except (ModelMountError, OSError) as exc:
                log.error("mount %s cannot go on, and is made anew by its next publish: %s", mount_id[:8], exc)
                await mount.close()
                return
        except ModelMountError as exc:
            log.error("mount %s: %s", mount_id[:8], exc)
            return
        self._mounts[mount_id] = mount
        if not mount.leases:
            self._want(mount)

    def _new_mount(self, key: MountKey, reference: Reference) -> Mount:
        return Mount(
            key,
            reference,
            self._keeper,
            self._pool,
            self._store,
            self._records,
            self._settings,
            self._manifests,
            self._memory,
        )

    async def _until_keeper_answers(self, ask: Callable[[], Awaitable[_Answer]]) -> _Answer:
        while True:
            try:
                return await ask()
            except ControlError as exc:
                log.warning("waiting for the keeper: %s", exc)
                await asyncio.sleep(0.2)

    async def cache(self, verb: str, fields: dict[str, Any]) -> list[int]:
        """What `modelmount cache` asks of the store; its answer as a memfd."""
        if verb not in _CACHE_VERBS:
            raise ControlError(f"supervisor: unknown cache verb {verb!r}")
        _, fds = await self._store.call(verb, _CACHE_TIMEOUT_S, **fields)
        return fds

    def _on_store_message(self, message: wire.Message) -> None:
        mount = self._mounts.get(str(message.get("mount_id")))
        if mount is not None:
            mount.on_store_message(message)

    async def _find_keeper(self) -> None:
        await self._until_keeper_answers(self._keeper.connect)
        self._following = asyncio.create_task(self._keeper.follow())

    async def ensure(
        self,
        *,
        target_path: str,
        volume_id: str,
        reference: Reference,
        pinned: Digest | None,
        verify: Verify | None,
        prefetch: Prefetch,
        view: View,
        credentials: Credentials,
        domain: str = SHARED_DOMAIN,
        service_account: str = "",
        keyring: Keyring = NO_LOGINS,
        pinned_parents: Sequence[Reference] = (),
    ) -> dict[str, Any]:
        """The mount of that model, made or joined, leased for `target_path`.

        `pinned` is the digest this volume was first published with, and `pinned_parents` those of what the model builds on;
        they decide over tags. `keyring`: the volume's logins, for repositories that the model's author names.

        Raises: whatever keeps the model from being mounted; then the lease does not exist. OperationPendingError with
        `verify: eager` while the model is being downloaded, which goes on; the next call joins it.
        """
        self._check_layout(reference)
        wanted = reference.with_digest(pinned) if pinned else reference
        # One at a time per reference: the first makes the mount, the others find it.
        brought = credentials
        credentials = await self._node_credentials.after(brought, wanted)
        caller = _caller(credentials, service_account)
        while True:
            async with self._lock(f"{domain} {wanted}"):
                mount = self._find(wanted, verify, view, domain, pinned_parents)
                if mount is not None and mount.failure is not None:  # it failed while nobody waited
                    await self._end(mount)
                    raise mount.failure
                if mount is None:
                    mount, is_asked = await self._create(
                        wanted, verify, prefetch, view, credentials, domain, caller, keyring, pinned_parents
                    )
                    parents = await self._parents_for(mount, keyring)
                    if is_asked:
                        self._access.grant(_model(mount, wanted), caller)
                    break
                if mount.kept is not None or not mount.is_stranger(wanted):
                    parents = await self._parents_for(mount, keyring)
                    lease = mount.leases.get(target_path)
                    if lease is None or (lease.credentials, lease.parents) != (credentials, parents):
                        await self._allow(mount, wanted, credentials, caller)
                        for parent in parents:
                            who = _parent_caller(parent.credentials, credentials, service_account)
                            await self._allow(mount, parent.reference, parent.credentials, who)
                    break
            # What a registry has to show is known once the mount is there.
            self._want(mount)
            await mount.ready(self._settings.patience_s)
        if mount.kept is None:  # new, or made again for the leases of one that was lost
            await self._until_ready(mount, credentials, parents)
        if mount.key.verify is Verify.EAGER and not mount.leases:
            await self._until_verified(mount)
        async with self._lock(f"{domain} {wanted}"):
            lease = Lease(volume_id, wanted, credentials, service_account, parents, brought, keyring)
            lease.sealed = await mount.seal()
            await mount.add_lease(target_path, lease)
            if prefetch is Prefetch.FULL:
                await mount.fill()
        for other in list(self._mounts.values()):
            if other is not mount and target_path in other.leases:
                await self._end_lease(other, target_path)
        return self._describe(mount) | {"sealed": lease.sealed}

    async def _parents_for(self, mount: Mount, keyring: Keyring) -> tuple[Parent, ...]:
        """What the mount's model builds on, as whoever has these logins."""
        return tuple([Parent(reference, await self._logins(keyring, reference)) for reference in mount.parents])

    async def _logins(self, keyring: Keyring, reference: Reference) -> Credentials:
        found = within_limits(keyring.candidates(reference.registry, reference.repository))
        return await self._node_credentials.after(found, reference)

    async def renew(
        self, target_path: str, credentials: Credentials, keyring: Keyring = NO_LOGINS
    ) -> dict[str, Any] | None:
        """Republish: newer credentials, nothing else. None when there is no such lease or its mount is dead.

        Whether they still give access is asked in the background, and a refusal is remembered in the lease: it is no
        reason to take a live volume away.
        """
        mount = self._leased(target_path)
        if mount is None or mount.dead:
            return None
        brought = credentials
        credentials = await self._node_credentials.after(brought, mount.leases[target_path].reference)
        parents = await self._parents_for(mount, keyring)
        lease = mount.leases.get(target_path)
        if lease is None or mount.dead:  # gone meanwhile
            return None
        lease.brought, lease.keyring = brought, keyring
        changed = (lease.credentials, lease.parents) != (credentials, parents)
        await mount.replace_credentials(target_path, credentials, parents)
        age_s = self._access.age_s(_model(mount, lease.reference), _caller(credentials, lease.service_account))
        if changed or lease.refused or age_s is None or age_s > _ASK_AGAIN_S:
            self._ask_in_background(mount, lease)
        return self._describe(mount)

    async def _renew_logins(self) -> None:
        """The node's own logins end, and nobody needs to republish for new ones: asked for again while mounts live, as often as
        they are looked at anew, and given to the fetchers that have older ones.
        """
        while True:
            await asyncio.sleep(self._settings.logins_kept_s)
            for mount in list(self._mounts.values()):
                for target_path, lease in list(mount.leases.items()):
                    if lease.credentials is None:  # what its volume brought is not known: the next republish says it
                        continue
                    credentials = await self._node_credentials.after(lease.brought, lease.reference)
                    parents = await self._parents_for(mount, lease.keyring)
                    if mount.leases.get(target_path) is lease:
                        await mount.replace_credentials(target_path, credentials, parents)

    async def release(self, target_path: str) -> None:
        """Give the lease back; the mount ends with its last one. No such lease: nothing to do."""
        mount = self._leased(target_path)
        if mount is not None:
            await self._end_lease(mount, target_path)

    async def reconcile(self, target_paths: set[str], before: float) -> None:
        """End the leases of every target that is not in `target_paths`, if they are from `before` (CLOCK_MONOTONIC, seconds):
        a later one is that of a publish which the node process is at.
        """
        for mount in list(self._mounts.values()):
            for target_path in [path for path, lease in mount.leases.items() if lease.since < before]:
                if target_path in target_paths:
                    continue
                log.info("lease of %s ends: it is not published any more", target_path)
                await self.release(target_path)

    async def status(self, target_path: str | None = None) -> list[dict[str, Any]]:
        """Every mount, or the one of a target."""
        chosen = [mount for mount in self._mounts.values() if target_path is None or target_path in mount.leases]
        return list(await asyncio.gather(*(mount.stats() for mount in chosen)))

    async def close(self) -> None:
        """End every mount and child. For the one-process-tree mode: in a cluster mounts outlive us."""
        for task in (*self._expiries.values(), *self._asking.values()):
            task.cancel()
        for endless in (self._following, self._renewing):
            if endless is not None:
                endless.cancel()
        mounts, self._mounts = list(self._mounts.values()), {}
        await asyncio.gather(*(mount.close() for mount in mounts))
        await asyncio.gather(self._pool.close(), self._store.close())

    async def _allow(self, mount: Mount, wanted: Reference, credentials: Credentials, caller: Caller) -> None:
        """Whether the caller may have the model that is here already: its registry decides, or while it is down the record
        of its last word.

        Raises: RegistryAuthError, ModelNotFoundError, DigestMismatchError; RegistryUnavailableError without a record.
        """
        model = _model(mount, wanted)
        age_s = self._access.age_s(model, caller)
        # That somebody could read the manifest shows nothing of the blobs.
        stranger = mount.is_stranger(wanted)
        if age_s is not None and age_s < _FRESH_S and not stranger:
            return
        try:
            await mount.access(wanted, credentials)
        except RegistryUnavailableError as exc:
            if age_s is None or stranger:
                raise
            log.warning("%s: %s; this caller could read it %.0f minutes ago, so it may", wanted, exc, age_s / 60)
            return
        except (RegistryAuthError, ModelNotFoundError):
            self._access.revoke(model, caller)
            raise
        self._access.grant(model, caller)

    def _ask_in_background(self, mount: Mount, lease: Lease) -> None:
        if id(lease) in self._asking:
            return
        task = asyncio.create_task(self._ask(mount, lease))
        self._asking[id(lease)] = task
        task.add_done_callback(lambda _: self._asking.pop(id(lease), None))

    async def _ask(self, mount: Mount, lease: Lease) -> None:
        """Whether a live volume's credentials still give access."""
        known = lease.credentials or ()
        asked = [(lease.reference, known, _caller(known, lease.service_account))]
        for parent in lease.parents:
            who = _parent_caller(parent.credentials, known, lease.service_account)
            asked.append((parent.reference, parent.credentials, who))
        for reference, credentials, caller in asked:
            model = _model(mount, reference)
            try:
                await mount.access(reference, credentials)
            except (RegistryAuthError, ModelNotFoundError) as exc:
                self._access.revoke(model, caller)
                if lease.refused is None:
                    mount.event("AccessRefused", str(exc))
                lease.refused = str(exc)
                return
            except ModelMountError as exc:
                log.info("%s: cannot ask whether access holds: %s", reference, exc)
                return
            self._access.grant(model, caller)
        lease.refused = None

    async def _until_ready(self, mount: Mount, credentials: Credentials, parents: tuple[Parent, ...]) -> None:
        """Raises: ModelPreparingError with progress; what keeps the model from being mounted, and then it ends."""
        self._want(mount)
        await mount.use_first_credentials(credentials, parents)
        try:
            await mount.ready(self._settings.patience_s)
        except ModelPreparingError:
            raise
        except ModelMountError:
            await self._end(mount)
            raise

    def _want(self, mount: Mount) -> None:
        """Somebody waits for a mount that nobody has yet."""
        mount.wanted_at = time.monotonic()
        if mount.mount_id not in self._expiries:
            self._expiries[mount.mount_id] = asyncio.create_task(self._end_if_unwanted(mount))

    async def _until_verified(self, mount: Mount) -> None:
        """Raises: OperationPendingError with progress; DigestMismatchError, and then the mount ends."""
        self._want(mount)
        deadline = mount.wanted_at + self._settings.patience_s
        while True:
            done, total, error = await mount.progress()
            if error is not None:
                await self._end(mount)
                raise error
            if done == total:
                return
            if time.monotonic() > deadline:
                raise OperationPendingError(
                    f"model {mount.key.digest.short()}: {max(0, done) / 1e6:,.0f} of {max(0, total) / 1e6:,.0f} MB are "
                    "downloaded and checked ('verify: eager'); the volume is there once all of them are"
                )
            await asyncio.sleep(_EAGER_POLL_S)

    async def _end_if_unwanted(self, mount: Mount) -> None:
        """A download that nobody asked after for long ends."""
        try:
            while not mount.leases:
                left = mount.wanted_at + self._settings.unwanted_s - time.monotonic()
                if left <= 0:
                    await self._end(mount)
                    return
                await asyncio.sleep(left)
        finally:
            if self._expiries.get(mount.mount_id) is asyncio.current_task():
                del self._expiries[mount.mount_id]

    async def _end(self, mount: Mount) -> None:
        if self._mounts.get(mount.mount_id) is mount:
            del self._mounts[mount.mount_id]
            expiry = self._expiries.pop(mount.mount_id, None)
            if expiry is not None and expiry is not asyncio.current_task():
                expiry.cancel()
        closing = asyncio.create_task(mount.close())
        self._ending.add(closing)
        closing.add_done_callback(self._ending.discard)
        await asyncio.shield(closing)

    async def _create(
        self,
        wanted: Reference,
        verify: Verify | None,
        prefetch: Prefetch,
        view: View,
        credentials: Credentials,
        domain: str,
        caller: Caller,
        keyring: Keyring,
        pinned_parents: Sequence[Reference],
    ) -> tuple[Mount, bool]:
        """The mount, and whether its registry was asked for it now."""

        async def ask(reference: Reference, known: Credentials) -> Resolved:
            who = _parent_caller(known, credentials, caller.service_account)
            parent, is_asked = await self._resolve(fetcher, reference, known, domain, who)
            if is_asked:
                self._access.grant(Model(domain, reference.origin, parent.digest), who)
            return parent

        fetcher = await self._pool.take("fetcher")
        try:
            model, is_asked = await self._resolve(fetcher, wanted, credentials, domain, caller, view.variant)
        except BaseException:
            fetcher.kill()
            raise
        found = NO_PARENTS
        try:
            try:
                found = await find_parents(
                    wanted,
                    model.parent,
                    pinned_parents,
                    lambda reference: self._logins(keyring, reference),
                    ask,
                )
                indexed = model.indexed and not found.parents  # an index knows one manifest's layers
                if verify is Verify.CHUNK and not indexed:
                    raise UnsupportedModelError(
                        f"model {model.digest.short()}: has no block index, which 'verify: chunk' and 'prefetch: ondemand' "
                        "need; push it again with 'modelmount push', or leave both out"
                        + (f" ({model.index_ignored})" if model.index_ignored else "")
                    )
            except BaseException:
                fetcher.kill()
                raise
            promise = verify or (Verify.CHUNK if indexed else Verify.WHOLE)
            key = mount_key(wanted, model.digest, promise, view, domain, found.places())
            async with self._lock(key.mount_id):
                held = self._mounts.get(key.mount_id)
                if (
                    held is not None and not held.dead and held.failure is None
                ):  # another tag, or another spelling, of the same model
                    await fetcher.stop()
                    if held.key.origin is None:
                        await held.access(wanted, credentials)
                    return held, is_asked
                if held is not None:
                    await held.close()
                mount = self._new_mount(key, wanted)
                mount.prepare(fetcher, model, credentials, prefetch, found)
                if held is not None:
                    mount.leases.update(held.leases)
                self._mounts[key.mount_id] = mount
                return mount, is_asked
        finally:
            found.close()
            os.close(model.manifest_fd)

    async def _resolve(
        self,
        fetcher: Child,
        wanted: Reference,
        credentials: Credentials,
        domain: str,
        caller: Caller,
        variant: str = "",
    ) -> tuple[Resolved, bool]:
        """What the reference names, and whether its registry said so now. A digest whose manifest is kept
        here needs no registry for a caller who could read it within the last minute, nor, while its registry is down, for one
        of whom there is a record.

        Raises: what the registry answered.
        """
        kept = model = None
        if wanted.digest is not None and (kept := self._manifests.get(domain, wanted.digest, variant)) is not None:
            model = Model(domain, wanted.origin, wanted.digest)
        age_s = self._access.age_s(model, caller) if model is not None else None
        if kept is not None and age_s is not None and age_s < _FRESH_S:
            return await resolve_known(fetcher, kept, wanted.origin), False
        try:
            found = await resolve(fetcher, wanted, credentials, self._settings, variant=variant)
        except RegistryUnavailableError as exc:
            if kept is None or age_s is None:
                raise
            log.warning("%s: %s; this caller could read it %.0f minutes ago, so it may", wanted, exc, age_s / 60)
            return await resolve_known(fetcher, kept, wanted.origin), False
        except (RegistryAuthError, ModelNotFoundError):
            if model is not None:
                self._access.revoke(model, caller)
            raise
        self._manifests.keep(domain, kept_of(found), variant)
        return found, True

    async def _end_lease(self, mount: Mount, target_path: str) -> None:
        await mount.drop_lease(target_path)
        if not mount.leases:
            await self._end(mount)

    def _find(
        self, wanted: Reference, verify: Verify | None, view: View, domain: str, parents: Sequence[Reference]
    ) -> Mount | None:
        """None also for a model that builds on others, until its volume is pinned to theirs."""
        if wanted.digest is None:
            return None
        places = tuple(Parent(parent).place for parent in parents)
        for wish in (verify,) if verify else (Verify.CHUNK, Verify.WHOLE):
            mount = self._mounts.get(mount_key(wanted, wanted.digest, wish, view, domain, places).mount_id)
            # Nobody gets `whole` by joining one when the model would give more.
            if mount is not None and not mount.dead and (verify or wish is Verify.CHUNK or not mount.indexed):
                return mount
        return None

    def _leased(self, target_path: str) -> Mount | None:
        return next((mount for mount in self._mounts.values() if target_path in mount.leases), None)

    def _lock(self, name: str) -> asyncio.Lock:
        lock = self._locks.get(name)
        if lock is None:
            lock = self._locks[name] = asyncio.Lock()
        return lock

    def _check_layout(self, reference: Reference) -> None:
        if not reference.is_layout:
            return
        real = os.path.realpath(reference.layout_dir)
        for root in self._settings.layout_roots:
            if real == os.path.realpath(root) or real.startswith(os.path.realpath(root).rstrip("/") + "/"):
                return
        raise InvalidVolumeError(
            f"reference {str(reference)!r}: oci-layout directories are not allowed there on this node; an "
            "administrator allows them with --layout-root",
            field="reference",
        )

    def _describe(self, mount: Mount) -> dict[str, Any]:
        assert mount.kept is not None
        return {
            "mount_id": mount.mount_id,
            "digest": str(mount.key.digest),
            "device": mount.kept.device,
            "can_resend": mount.kept.can_resend,
            "verify": str(mount.key.verify),
            "parents": [str(parent) for parent in mount.parents],
            **mount.summary,
        }


def _caller(credentials: Credentials, service_account: str) -> Caller:
    return Caller(json.dumps(to_wire(credentials)) if credentials else "", service_account)


def _parent_caller(known: Credentials, credentials: Credentials, service_account: str) -> Caller:
    """Who asks for a parent with `known`. Kubelet vouched for the service account where its token opens the parent too."""
    return _caller(known, service_account if known == credentials else "")


def _model(mount: Mount, reference: Reference) -> Model:
    """The mounted model, or the parent of it that `reference` is."""
    digest = reference.digest if reference in mount.parents else mount.key.digest
    assert digest is not None
    return Model(mount.key.domain, reference.origin, digest)
