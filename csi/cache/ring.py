"""Blocks handed to the worker through memory, past a disk that is full, broken or slow.

Shared memory of a fixed number of slots, each as large as a block. The fetcher lends a slot with a block in it and
says so; the worker copies out what its readers ask for and gives the slot back. A slot is never written while it is
lent, and lending and giving back are messages, so neither side needs a lock in the memory. Nothing is allocated until
the first block is lent. The seal that keeps the worker from writing keeps the fetcher from punching holes, too; so what is
not needed any more is given back by taking new memory in its place.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
import time
from collections.abc import Callable

from csi.stream.blocks import BLOCK_BYTES

_F_SEAL_FUTURE_WRITE = 0x10  # Linux 5.1; Python does not name it


class LendingRing:
    """The fetcher's side. Thread-safe."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.fd, self._memory = _new_memory(slots * BLOCK_BYTES)
        self._holders = [0] * slots
        self._last_taken: float | None = None
        self._lock = threading.Lock()

    def take(self) -> int | None:
        """A free slot to put a block into, which is held once from now on. None when there is none."""
        with self._lock:
            slot = next((slot for slot in range(self.slots) if not self._holders[slot]), None)
            if slot is not None:
                self._holders[slot] = 1
                self._last_taken = time.monotonic()
            return slot

    def lend(self, content: memoryview) -> int | None:
        """As `take`, with a copy of a block in it."""
        slot = self.take()
        if slot is not None:
            self.content(slot, len(content))[:] = content
        return slot

    def content(self, slot: int, length: int) -> memoryview:
        """The first `length` bytes of a slot that the caller holds."""
        start = slot * BLOCK_BYTES
        return self._memory[start : start + length]

    def hold(self, slot: int) -> None:
        """One more holder of a slot that is held."""
        with self._lock:
            self._holders[slot] += 1

    def release(self, slot: int) -> None:
        """One holder less; what is not held is ignored."""
        with self._lock:
            if 0 <= slot < self.slots and self._holders[slot]:
                self._holders[slot] -= 1

    @property
    def unused_s(self) -> float | None:
        """Seconds since a slot was taken. None: nothing of the memory was ever used."""
        with self._lock:
            return None if self._last_taken is None else time.monotonic() - self._last_taken

    def renew(self, tell: Callable[[int], bool]) -> bool:
        """Give the memory back and take new, which `fd` is from then on, if nobody holds a slot, there is new memory, and `tell`,
        called with the new descriptor, says that whoever borrows has heard of it. Nothing is lent meanwhile, so `tell` must
        not wait.
        """
        with self._lock:
            if any(self._holders):
                return False
            try:
                fd, memory = _new_memory(self.slots * BLOCK_BYTES)
            except OSError:  # no descriptor, or no address space, to spare: what there is goes on
                return False
            if not tell(fd):
                os.close(fd)
                return False
            os.close(self.fd)
            self.fd, self._memory, self._last_taken = fd, memory, None
            return True

    @property
    def free_slots(self) -> int:
        """How many more blocks can be lent."""
        with self._lock:
            return self._holders.count(0)


def _new_memory(size_bytes: int) -> tuple[int, memoryview]:
    """A descriptor that nobody can write through, and our mapping of it. Raises: OSError."""
    fd = os.memfd_create("blocks", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size_bytes)
        memory = memoryview(mmap.mmap(fd, size_bytes))
        # Whoever gets the descriptor can only read; what is in a slot may still have to be written to the cache.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except OSError:
        os.close(fd)
        raise
    return fd, memory


class BorrowedBlocks:
    """The worker's side: read-only."""

    def __init__(self, fd: int) -> None:
        self.slots = os.fstat(fd).st_size // BLOCK_BYTES
        self._memory = memoryview(mmap.mmap(fd, self.slots * BLOCK_BYTES, mmap.MAP_SHARED, mmap.PROT_READ))

    def content(self, slot: int, offset: int, length: int) -> memoryview:
        """Bytes of a slot that is lent to us."""
        start = slot * BLOCK_BYTES + offset
        return self._memory[start : start + length]
