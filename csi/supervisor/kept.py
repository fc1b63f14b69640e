"""What the keeper holds for us, and the same again here, so that either may die.

Every descriptor that goes to the keeper is duplicated first. When the keeper is replaced (its `watch` connection
ends) the new one gets all of it back: connections first, then what was left in their slots; then `settle` tells it
that nothing else will come.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from dataclasses import dataclass, field
from typing import Any

from csi.control import wire
from csi.control.keeper import CollectedMount, KeeperClient, KeptMount
from csi.errors import ControlError, MountError

log = logging.getLogger(__name__)

_WATCH_TIMEOUT_S = 5.0
_RECONNECT_DELAY_S = 0.05


@dataclass(slots=True)
class _Holding:
    """Our copies of one mount's descriptors."""

    fuse_fd: int
    table_fd: int
    slots: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = field(default_factory=dict)
    backings: dict[str, int] = field(default_factory=dict)

    def close(self) -> None:
        wire.close_all([self.fuse_fd, self.table_fd, *(fd for _, fds in self.slots.values() for fd in fds)])


class KeptMounts:
    """The keeper's mount operations, remembered. Use from one event loop."""

    def __init__(self, state_dir: str) -> None:
        self._keeper = KeeperClient(state_dir)
        self._holdings: dict[str, _Holding] = {}
        self._watching: socket.socket | None = None

    async def mount(self, mount_id: str, read_ahead_kb: int, backend: str) -> CollectedMount:
        """See `KeeperClient.mount`. What is collected is the caller's."""
        return self._held(await asyncio.to_thread(self._keeper.mount, mount_id, read_ahead_kb, backend))

    async def collect(self, mount_id: str) -> CollectedMount:
        """See `KeeperClient.collect`. What is collected is the caller's."""
        return self._held(await asyncio.to_thread(self._keeper.collect, mount_id))

    async def mounts(self) -> list[KeptMount]:
        """See `KeeperClient.mounts`."""
        return await asyncio.to_thread(self._keeper.mounts)

    async def keep(self, mount_id: str, slot: str, note: dict[str, Any], fds: tuple[int, ...]) -> None:
        """Leave `fds` (still the caller's) in a slot. Without a keeper it is left there as soon as one is back.

        Raises: ControlError for a mount that has ended.
        """
        holding = self._holdings.get(mount_id)
        if holding is None:
            raise ControlError(f"mount {mount_id[:8]}: is not held any more")
        self._forget(holding, slot)
        copies = tuple(os.dup(fd) for fd in fds)
        holding.slots[slot] = (note, copies)
        try:
            await asyncio.to_thread(self._keeper.keep, mount_id, slot, note, copies)
        except (ControlError, MountError) as exc:
            log.warning("mount %s: its %s is not kept yet: %s", mount_id[:8], slot, exc)

    async def drop(self, mount_id: str, slot: str) -> None:
        """Empty a slot. Without a keeper only our copies go; the next keeper never hears of the slot."""
        holding = self._holdings.get(mount_id)
        if holding is None or slot not in holding.slots:
            return
        self._forget(holding, slot)
        try:
            await asyncio.to_thread(self._keeper.drop, mount_id, slot)
        except ControlError as exc:
            log.info("mount %s: %s not dropped: %s", mount_id[:8], slot, exc)

    async def back(self, mount_id: str, file_fd: int) -> int:
        """See `KeeperClient.back`: the backing id."""
        name, backing_id = await asyncio.to_thread(self._keeper.back, mount_id, file_fd)
        if holding := self._holdings.get(mount_id):
            holding.backings[name] = backing_id
        return backing_id

    async def unback(self, mount_id: str, backing_id: int) -> None:
        """See `KeeperClient.unback`."""
        if holding := self._holdings.get(mount_id):
            holding.backings = {name: known for name, known in holding.backings.items() if known != backing_id}
        await asyncio.to_thread(self._keeper.unback, mount_id, backing_id)

    async def unmount(self, mount_id: str) -> None:
        """See `KeeperClient.unmount`. Without a keeper the next one removes the mount, as nobody brings it back."""
        if holding := self._holdings.pop(mount_id, None):
            holding.close()
        await asyncio.to_thread(self._keeper.unmount, mount_id)

    def let_go(self, mount_id: str) -> None:
        """The mount is somebody else's to bring back from now on."""
        if holding := self._holdings.pop(mount_id, None):
            holding.close()

    async def connect(self) -> None:
        """Begin to watch the keeper. Raises: ControlError when none answers."""
        self._watching = await asyncio.to_thread(self._keeper.watch, _WATCH_TIMEOUT_S)

    async def settle(self) -> None:
        """Nothing else is brought to this keeper: what has no connection there is lost."""
        await asyncio.to_thread(self._keeper.settle)

    async def follow(self) -> None:
        """Bring every new keeper what the one before it held. Call after `connect`; never returns."""
        while True:
            assert self._watching is not None
            with self._watching:
                await _end_of(self._watching)
            log.warning("the keeper is gone; mounts go on, and a new keeper gets them back")
            while True:
                try:
                    await self.connect()
                    await self._restore_all()
                    break
                except ControlError as exc:
                    log.debug("no keeper yet: %s", exc)
                    await asyncio.sleep(_RECONNECT_DELAY_S)

    async def _restore_all(self) -> None:
        for mount_id, holding in list(self._holdings.items()):
            try:
                await asyncio.to_thread(
                    self._keeper.restore, mount_id, holding.fuse_fd, holding.table_fd, holding.backings
                )
                for slot, (note, fds) in list(holding.slots.items()):
                    await asyncio.to_thread(self._keeper.keep, mount_id, slot, note, fds)
            except MountError as exc:
                log.error("mount %s cannot be given back to the keeper: %s", mount_id[:8], exc)
        await self.settle()
        log.info("the new keeper holds %d mounts", len(self._holdings))

    def _held(self, collected: CollectedMount) -> CollectedMount:
        mount_id = collected.mount.mount_id
        if before := self._holdings.pop(mount_id, None):
            before.close()
        self._holdings[mount_id] = _Holding(
            os.dup(collected.fuse_fd),
            os.dup(collected.table_fd),
            {name: (slot.note, tuple(map(os.dup, slot.fds))) for name, slot in collected.slots.items()},
            dict(collected.backings),
        )
        return collected

    @staticmethod
    def _forget(holding: _Holding, slot: str) -> None:
        if before := holding.slots.pop(slot, None):
            wire.close_all(before[1])


async def _end_of(sock: socket.socket) -> None:
    """Until the other end closes (it never says anything)."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def on_readable() -> None:
        if not ended.done():
            ended.set_result(None)

    loop.add_reader(sock.fileno(), on_readable)
    try:
        await ended
    finally:
        loop.remove_reader(sock.fileno())
