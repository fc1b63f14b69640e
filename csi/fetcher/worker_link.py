"""The channel to the mount's worker, and the memory that is lent over it (`csi.cache.ring`).

_lending     a slot is lent to the worker of now, or to nobody. Guards who that is, too: a block that comes while one worker
             goes and another comes is said to one of them, and the new one asks for what it lacks
"""

from __future__ import annotations

import logging
import selectors
import socket
import threading
from collections.abc import Iterable, Sequence

from csi.cache.ring import LendingRing
from csi.control import wire
from csi.errors import ControlError

log = logging.getLogger(__name__)

RING_SLOTS = 16
"""64 MiB, and nothing of it is used while the cache takes what comes."""
_QUIET_S = 1.0
"""After so long without a loan the memory goes back to the system."""


class WorkerLink:
    """`attach` and `receive` are the main thread's, whose `selector` wakes it; the rest is anybody's."""

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self.ring = LendingRing(RING_SLOTS)
        self._selector = selector
        self._worker: socket.socket | None = None
        self._lent: dict[int, tuple[int, int]] = {}  # slot to blob and block
        self._lending = threading.Lock()

    def make_ring(self, slots: int) -> None:
        """Lend no more than so many blocks at once. Before anything is lent, and before `attach`."""
        self.ring = LendingRing(slots)

    def is_of(self, readable: object) -> bool:
        """Whether that is its socket."""
        return readable is not None and readable is self._worker

    def attach(self, channel_fd: int) -> None:
        """A (new) worker's channel takes the place of the one before."""
        worker = socket.socket(fileno=channel_fd)
        worker.setblocking(False)
        with self._lending:
            self._drop()
            self._worker = worker
            self._tell_of_ring(self.ring.fd)  # before anything in it is lent
        self._selector.register(worker, selectors.EVENT_READ)

    def receive(self) -> tuple[wire.Message, list[int]] | None:
        """The next message. None also when the worker has died, and is forgotten: its successor brings a channel."""
        assert self._worker is not None
        try:
            received = wire.recv(self._worker)
        except BlockingIOError:
            return None
        except (OSError, ControlError) as exc:
            log.warning("worker channel: %s", exc)
            received = None
        if received is None:
            with self._lending:
                self._drop()
        return received

    def tell(self, message: wire.Message, fds: Sequence[int] = ()) -> bool:
        """Whether it was said. It may be lost all the same; workers ask again."""
        worker = self._worker
        if worker is None:
            return False
        try:
            wire.send(worker, message, fds)
        except OSError as exc:
            log.debug("worker not reachable: %s", exc)
            return False
        return True

    def lend(self, blob: int, block: int, slot: int) -> bool:
        """That block is in that slot of the ring, the worker's until it gives it back. Whether it was told."""
        with self._lending:  # a worker that is replaced in between would be lent what was taken back already
            if not self.tell({"op": "lent", "blob": blob, "block": block, "slot": slot}):
                return False
            self._lent[slot] = (blob, block)
            return True

    def is_lent(self, blob: int, block: int) -> bool:
        """Whether the worker has that block, or is being told of it, and has not given it back."""
        with self._lending:
            return (blob, block) in self._lent.values()

    def returned(self, slots: Iterable[int]) -> None:
        """The worker says that it is done with them."""
        with self._lending:
            for slot in slots:
                if self._lent.pop(slot, None) is not None:
                    self.ring.release(slot)

    def give_memory_back(self) -> float | None:
        """Do so if nothing was lent for a while and nothing is lent now. Returns the seconds until it is worth another call;
        None: not before a message has come from the worker. A loan is followed by one.
        """
        with self._lending:
            unused_s = self.ring.unused_s
            if unused_s is None or self._lent:
                return None
            if unused_s < _QUIET_S:
                return _QUIET_S - unused_s
            return None if self.ring.renew(self._tell_of_ring) else _QUIET_S

    def _tell_of_ring(self, fd: int) -> bool:
        return self._worker is None or self.tell({"op": "ring"}, [fd])

    def _drop(self) -> None:
        """That worker is gone, and what it was lent comes back. Call with `_lending`."""
        if self._worker is not None:
            self._selector.unregister(self._worker)
            self._worker.close()
            self._worker = None
        while self._lent:
            self.ring.release(self._lent.popitem()[0])
