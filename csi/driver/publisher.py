"""Publish and unpublish, without gRPC: the CSI node service and `modelmount mount` both call this.

    locks    one per target path. A second publish of a target in work is refused at once (OperationPendingError);
             an unpublish waits a little, because it must win in the end.
    order    lease, record, bind; back in reverse. A crash at any point leaves what the next call, or `recover`,
             completes or takes back.

Nothing here touches a mounted file system: what is mounted is read from mountinfo.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from dataclasses import dataclass, field
from typing import Any

from csi import mountinfo
from csi.control.keeper import KeeperClient
from csi.control.supervisor import LeasedMount, SupervisorClient
from csi.credentials import Credentials, Keyring
from csi.driver.health import Trouble, node_troubles, supervisor_unreachable, troubles_of
from csi.driver.locks import NamedLocks
from csi.driver.records import Pin, Pins, Publication, Publications
from csi.errors import ControlError, ModelMountError, VolumeConflictError
from csi.pods import Pod
from csi.volume import SHARED_DOMAIN, VolumeAttributes

log = logging.getLogger(__name__)

_UNPUBLISH_PATIENCE_S = 10.0
_RELEASE_PATIENCE_S = 2.0
_OWED_POLL_S = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishRequest:
    """One volume to show at one path. `arguments`: see `Publication.arguments`; secrets are not part of it.

    `credentials` are for the model's repository; `keyring` has the same and more, by registry, for what the model builds on.
    `service_account` is `namespace/name` when a token of it is among the credentials, else empty.
    """

    volume_id: str
    target_path: str
    attributes: VolumeAttributes
    arguments: str
    credentials: Credentials = field(default=(), repr=False)
    keyring: Keyring = field(default=Keyring(), repr=False)
    domain: str = SHARED_DOMAIN
    service_account: str = ""
    pod: Pod | None = None


class Publisher:
    """Use from one event loop; blocking calls to keeper and supervisor run in threads."""

    def __init__(
        self,
        keeper: KeeperClient,
        supervisor: SupervisorClient,
        publications: Publications,
        pins: Pins,
        boot_id: str,
    ) -> None:
        self._keeper, self._supervisor = keeper, supervisor
        self._publications, self._pins = publications, pins
        self._boot_id = boot_id
        self._started = time.monotonic()
        self._locks = NamedLocks("target")
        self._owed: set[str] = set()
        """Leases to give back as soon as the supervisor answers."""

    async def recover(self) -> None:
        """After a start: tell the supervisor which leases of an earlier process are still ours. Ours may be of a publish that is
        on its way.
        """
        targets = [publication.target_path for publication in self._publications.all()]
        await asyncio.to_thread(self._supervisor.reconcile, targets, self._started)

    async def publish(self, request: PublishRequest) -> Publication:
        """Show the model at the target. The same request again is a no-op, or heals a dead mount.

        Raises: OperationPendingError, VolumeConflictError, and whatever keeps the model from being mounted; then the
        target is as it was before. For a target that is published already only retryable errors are raised: a final
        one would make kubelet take down a live pod's volume.
        """
        async with self._locks.held(request.target_path):
            self._owed.discard(request.target_path)
            before = self._publications.get(request.target_path)
            if before is None:
                return await self._publish_first(request)
            if (before.volume_id, before.arguments) != (request.volume_id, request.arguments):
                raise VolumeConflictError(
                    f"target {request.target_path}: published already, for volume {before.volume_id} and with other "
                    "arguments; unpublish it first",
                    target_path=request.target_path,
                )
            try:
                return await self._publish_again(request, before)
            except ModelMountError as exc:
                if exc.retryable:
                    raise
                raise ControlError(f"volume {request.volume_id}: its mount is gone and not yet back: {exc}") from exc

    async def unpublish(self, volume_id: str, target_path: str) -> None:
        """Take the model away from the target. Unknown volume, unknown target: nothing to do.

        Raises: OperationPendingError, MountError (something that is not ours is in the way), ControlError.
        """
        async with self._locks.held(target_path, _UNPUBLISH_PATIENCE_S):
            await asyncio.to_thread(self._keeper.unbind, target_path)
            try:
                await asyncio.to_thread(self._supervisor.release, target_path, _RELEASE_PATIENCE_S)
            except ControlError as exc:  # nothing shows the model any more; that is what kubelet waits for
                log.warning("the lease of %s is given back later: %s", target_path, exc)
                self._owed.add(target_path)
            self._publications.remove(target_path)
            if not self._publications.of_volume(volume_id):
                self._pins.remove(volume_id)

    async def give_back_leases(self) -> None:
        """Those that a supervisor did not take back when their targets were unpublished. Never returns."""
        while True:
            await asyncio.sleep(_OWED_POLL_S)
            for target_path in list(self._owed):
                with contextlib.suppress(ModelMountError):  # tried again
                    async with self._locks.held(target_path):
                        if target_path in self._owed:
                            await asyncio.to_thread(self._supervisor.release, target_path, _RELEASE_PATIENCE_S)
                            self._owed.discard(target_path)

    def at(self, target_path: str) -> Publication | None:
        """The publication at that path, from memory."""
        return self._publications.get(target_path)

    def publication(self, volume_id: str, target_path: str) -> Publication | None:
        """The publication of that volume at that path, from memory."""
        found = self._publications.get(target_path)
        return found if found is not None and found.volume_id == volume_id else None

    def all(self) -> list[Publication]:
        """Everything that is published, from memory."""
        return self._publications.all()

    async def mounts(self) -> list[dict[str, Any]]:
        """The supervisor's status of every mount. Raises: ControlError."""
        return await asyncio.to_thread(self._supervisor.status)

    def of_volume(self, volume_id: str) -> list[Publication]:
        """Where that volume is published, from memory."""
        return self._publications.of_volume(volume_id)

    async def troubles(self, publication: Publication) -> list[Trouble]:
        """What is wrong with a published volume; asks the supervisor, never the mount."""
        target_path = publication.target_path
        try:
            mounts = await asyncio.to_thread(self._supervisor.status, target_path)
        except ControlError as exc:
            return [supervisor_unreachable(exc)]
        if not mounts or not _shows(target_path, publication.mount_id, publication.device):
            return troubles_of(None, target_path)
        return troubles_of(mounts[0], target_path)

    async def node_troubles(self) -> list[Trouble]:
        """What is wrong with this node as a whole."""
        try:
            return node_troubles(await asyncio.to_thread(self._supervisor.status))
        except ControlError as exc:
            return [supervisor_unreachable(exc)]

    async def _publish_first(self, request: PublishRequest) -> Publication:
        had_pin = self._pins.get(request.volume_id) is not None
        try:
            mount = await self._lease(request)
            publication = await self._record(request, mount)
            await self._bind(mount, request.target_path)
        except BaseException:
            await self._take_back(request, drop_pin=not had_pin)
            raise
        log.info("published volume %s at %s: %s", request.volume_id, request.target_path, publication.digest)
        return publication

    async def _publish_again(self, request: PublishRequest, before: Publication) -> Publication:
        mount = await asyncio.to_thread(
            self._supervisor.renew, request.target_path, request.credentials, request.keyring
        )
        if mount is not None and _shows(request.target_path, mount.mount_id, mount.device):
            return before
        log.warning("volume %s at %s: its mount is gone; it is made anew", request.volume_id, request.target_path)
        mount = await self._lease(request)
        publication = await self._record(request, mount)
        await self._bind(mount, request.target_path)
        return publication

    async def _bind(self, mount: LeasedMount, target_path: str) -> None:
        await asyncio.to_thread(self._keeper.bind, mount.mount_id, target_path, sealed=mount.sealed)

    async def _lease(self, request: PublishRequest) -> LeasedMount:
        reference, pin = request.attributes.reference, self._pins.get(request.volume_id)
        return await asyncio.to_thread(
            self._supervisor.ensure,
            target_path=request.target_path,
            volume_id=request.volume_id,
            reference=reference,
            pinned=pin.digest if pin is not None and reference.digest is None else None,
            pinned_parents=pin.parents if pin is not None else (),
            verify=request.attributes.verify,
            prefetch=request.attributes.prefetch,
            view=request.attributes.view,
            credentials=request.credentials,
            keyring=request.keyring,
            domain=request.domain,
            service_account=request.service_account,
        )

    async def _record(self, request: PublishRequest, mount: LeasedMount) -> Publication:
        publication = Publication(
            volume_id=request.volume_id,
            target_path=request.target_path,
            arguments=request.arguments,
            digest=str(mount.digest),
            mount_id=mount.mount_id,
            device=mount.device,
            total_bytes=mount.total_bytes,
            files=mount.files,
            boot_id=self._boot_id,
            pod=request.pod,
        )
        if request.attributes.reference.digest is None or mount.parents:  # a digest pins itself
            await asyncio.to_thread(self._pins.put, request.volume_id, Pin(mount.digest, mount.parents))
        await asyncio.to_thread(self._publications.write, publication)
        self._publications.put(publication)
        return publication

    async def _take_back(self, request: PublishRequest, *, drop_pin: bool) -> None:
        """A first publish failed: kubelet will not call unpublish after a final error, so nothing may stay."""
        self._publications.remove(request.target_path)
        if drop_pin:
            self._pins.remove(request.volume_id)
        with contextlib.suppress(ModelMountError):
            await asyncio.to_thread(self._supervisor.release, request.target_path)


def _shows(target_path: str, mount_id: str, device: str) -> bool:
    """Whether the topmost mount at the target is that mount. Only the target's parent is looked at."""
    parent, name = os.path.split(target_path)
    stacked = mountinfo.at(mountinfo.read(), os.path.join(os.path.realpath(parent), name))
    return bool(stacked) and mountinfo.shows(stacked[-1], mount_id, device)
