"""What the store does beside answering: one thing after the other, the most urgent first."""

from __future__ import annotations

import itertools
import queue
from collections.abc import Callable
from enum import IntEnum

Work = Callable[[], None]


class Urgency(IntEnum):
    """Lower comes first. What takes long comes in pieces, so that what is more urgent need not wait for all of it."""

    PROVE_AGAIN = 0
    """Readers are slower until it is done: the kernel may not read the blob by itself."""
    PROMOTE = 1
    """A mount has a blob complete; others may be waiting to share it."""
    VERIFY = 2
    """An administrator wants to know."""
    CLEAN_UP = 3


class WorkQueue:
    """Of any number of threads. Equally urgent things in the order in which they came."""

    def __init__(self) -> None:
        self._queue: queue.PriorityQueue[tuple[Urgency, int, Work]] = queue.PriorityQueue()
        self._numbers = itertools.count()

    def put(self, urgency: Urgency, work: Work) -> None:
        """To be done."""
        self._queue.put((urgency, next(self._numbers), work))

    def get(self) -> Work:
        """What is to be done next; waits for it."""
        return self._queue.get()[2]
