"""The table of mounts, and how one comes to be: resolve, find or create, lease.

A lease is taken for a target path and given back by name, so the node process may die at any time between: after
its return it says which leases it still has (`reconcile`), and the rest end.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from typing import Any
from weakref import WeakValueDictionary

from csi.control.keeper import KeeperClient
from csi.errors import InvalidVolumeError
from csi.oci.digest import Digest
from csi.oci.reference import Reference
from csi.supervisor.child import ChildPool, Role
from csi.supervisor.mount import Credentials, Lease, Mount, resolve
from csi.supervisor.settings import SupervisorSettings
from csi.volume import Verify, mount_key

log = logging.getLogger(__name__)


class Supervisor:
    """All methods run on one event loop; work that others may join is shielded from its callers' deadlines."""

    def __init__(self, settings: SupervisorSettings) -> None:
        self._settings = settings
        self._keeper = KeeperClient(settings.state_dir)
        self._pool = ChildPool(
            [
                Role("worker", settings.worker_uid, settings.child_gid),
                Role("fetcher", settings.fetcher_uid, settings.child_gid),
            ],
            settings.spares,
        )
        self._mounts: dict[str, Mount] = {}
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def start(self) -> None:
        """Start the spare children."""
        await self._pool.fill()

    async def ensure(
        self,
        *,
        target_path: str,
        volume_id: str,
        reference: Reference,
        pinned: Digest | None,
        verify: Verify,
        credentials: Credentials,
    ) -> dict[str, Any]:
        """The mount of that model, made or joined, leased for `target_path`.

        `pinned` is the digest this volume was first published with; it decides over a tag.

        Raises: whatever keeps the model from being mounted; then the lease does not exist.
        """
        self._check_layout(reference)
        wanted = reference.with_digest(pinned) if pinned else reference
        # One at a time per reference: the first makes the mount, the others find it.
        async with self._lock(str(wanted)):
            mount = self._find(wanted, verify)
            if mount is not None:
                lease = mount.leases.get(target_path)
                if lease is None or lease.credentials != credentials:
                    await mount.access(wanted, credentials)
            else:
                mount = await self._create(wanted, verify, credentials)
            mount.leases[target_path] = Lease(volume_id)
            await mount.replace_credentials(target_path, credentials)
        for other in list(self._mounts.values()):
            if other is not mount and target_path in other.leases:
                await self._end_lease(other, target_path)
        return self._describe(mount)

    async def renew(self, target_path: str, credentials: Credentials) -> dict[str, Any] | None:
        """Republish: newer credentials, nothing else. None when there is no such lease or its mount is dead."""
        mount = self._leased(target_path)
        if mount is None or mount.dead:
            return None
        await mount.replace_credentials(target_path, credentials)
        return self._describe(mount)

    async def release(self, target_path: str) -> None:
        """Give the lease back; the mount ends with its last one. No such lease: nothing to do."""
        mount = self._leased(target_path)
        if mount is not None:
            await self._end_lease(mount, target_path)

    async def reconcile(self, target_paths: set[str]) -> None:
        """End the leases of every target that is not in `target_paths`."""
        for mount in list(self._mounts.values()):
            for target_path in set(mount.leases) - target_paths:
                log.info("lease of %s ends: it is not published any more", target_path)
                await self.release(target_path)

    async def status(self, target_path: str | None = None) -> list[dict[str, Any]]:
        """Every mount, or the one of a target."""
        chosen = [mount for mount in self._mounts.values() if target_path is None or target_path in mount.leases]
        return list(await asyncio.gather(*(mount.stats() for mount in chosen)))

    async def close(self) -> None:
        """End every mount and child. For the one-process-tree mode and tests: in a cluster mounts outlive us."""
        mounts, self._mounts = list(self._mounts.values()), {}
        await asyncio.gather(*(mount.close() for mount in mounts))
        await self._pool.close()

    async def _create(self, wanted: Reference, verify: Verify, credentials: Credentials) -> Mount:
        fetcher = await self._pool.take("fetcher")
        try:
            manifest_fd, media_type, digest_text = await resolve(fetcher, wanted, credentials, self._settings)
        except BaseException:
            fetcher.kill()
            raise
        try:
            key = mount_key(wanted, Digest.parse(digest_text), verify)
            async with self._lock(key.mount_id):
                held = self._mounts.get(key.mount_id)
                if held is not None and not held.dead:  # another tag, or another spelling, of the same model
                    await fetcher.stop()
                    return held
                if held is not None:
                    await held.close()
                mount = Mount(key, wanted, self._keeper, self._pool, self._settings)
                await mount.create(fetcher, manifest_fd, media_type, credentials)
                if held is not None:
                    mount.leases.update(held.leases)
                self._mounts[key.mount_id] = mount
                return mount
        finally:
            os.close(manifest_fd)

    async def _end_lease(self, mount: Mount, target_path: str) -> None:
        await mount.drop_lease(target_path)
        if not mount.leases:
            self._mounts.pop(mount.mount_id, None)
            await asyncio.shield(asyncio.create_task(mount.close()))

    def _find(self, wanted: Reference, verify: Verify) -> Mount | None:
        if wanted.digest is None:
            return None
        mount = self._mounts.get(mount_key(wanted, wanted.digest, verify).mount_id)
        return None if mount is None or mount.dead else mount

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
            **mount.summary,
        }


def parse_credentials(value: Mapping[str, Any] | None) -> Credentials:
    """Raises: InvalidVolumeError."""
    if value is None:
        return None
    username, password = value.get("username"), value.get("password")
    if not isinstance(username, str) or not isinstance(password, str):
        raise InvalidVolumeError("credentials need username and password", field="secrets")
    return {"username": username, "password": password}
