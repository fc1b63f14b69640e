"""Which blocks to fetch next. Plain state, no threads and no clock: the fetch engine calls it under its lock.

Three classes, always in this order: demand (a reader waits), ahead (a reader will want it soon), background (the
rest of the model). Every block is in at most one job at a time, however many ask for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from csi.stream import blocks

_SMALL_BLOB_BYTES = 2 * blocks.BLOCK_BYTES

Block = tuple[int, int]
"""Position of the blob in the tree, block number in the blob."""


class Priority(IntEnum):
    """Lower is more urgent."""

    DEMAND = 0
    AHEAD = 1
    BACKGROUND = 2


@dataclass(frozen=True, slots=True)
class Job:
    """Blocks `first` to `first + count` of one blob, to be fetched as one range."""

    blob: int
    first: int
    count: int
    priority: Priority

    def blocks(self) -> Iterable[Block]:
        """The blocks of the job in order."""
        return ((self.blob, block) for block in range(self.first, self.first + self.count))


def background_order(sizes: Sequence[int]) -> list[int]:
    """Small blobs first (configs, tokenizers, indexes: every loader opens them before any weight), then in order."""
    return sorted(range(len(sizes)), key=lambda blob: (sizes[blob] > _SMALL_BLOB_BYTES, blob))


class Scheduler:
    """`is_present(blob, block)` must be cheap; it is asked for every candidate. `is_kept` says of a block that is not
    present that it need only be checked: the background leaves it until somebody wants it.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        is_present: Callable[[int, int], bool],
        *,
        is_kept: Callable[[int, int], bool] = lambda blob, block: False,
        fill: bool = True,
    ) -> None:
        self._counts = [blocks.block_count(size) for size in sizes]
        self._is_present = is_present
        self._is_kept = is_kept
        self._wanted: dict[Priority, dict[Block, None]] = {Priority.DEMAND: {}, Priority.AHEAD: {}}
        self._in_flight: dict[Block, Priority] = {}
        self._background = background_order(sizes)
        self._order = self._background if fill else []
        self._cursor = 0  # position in _order
        self._cursor_block = 0

    def want(self, blob: int, first: int, count: int, priority: Priority) -> None:
        """Ask for blocks; those present, in flight or asked for as urgently already are not asked for again."""
        for block in range(max(0, first), min(first + count, self._counts[blob])):
            key = (blob, block)
            if key in self._in_flight:  # if that job fails, the block comes back as urgent as its most urgent reader
                self._in_flight[key] = min(priority, self._in_flight[key])
                continue
            if self._is_present(blob, block):
                continue
            if priority is Priority.DEMAND:
                self._wanted[Priority.AHEAD].pop(key, None)
                self._wanted[Priority.DEMAND][key] = None
            elif key not in self._wanted[Priority.DEMAND]:
                self._wanted[Priority.AHEAD][key] = None

    def next_job(self, least: Priority, most_blocks: int, *, along: int = 0) -> Job | None:
        """The most urgent job that is at least as urgent as `least`, of at most `most_blocks`; its blocks are in flight from now
        on. Where less than `along` neighbours are asked for, a job takes others along that the background would fetch.
        """
        for priority in (Priority.DEMAND, Priority.AHEAD):
            if priority > least:
                return None
            wanted = self._wanted[priority]
            while wanted:
                blob, block = next(iter(wanted))
                if self._is_present(blob, block):
                    del wanted[blob, block]
                    continue
                block = self._first_of(blob, block, wanted, most_blocks)
                return self._start(blob, block, priority, most_blocks, along if self._order else 0)
        if least < Priority.BACKGROUND:
            return None
        while self._cursor < len(self._order):
            blob = self._order[self._cursor]
            while self._cursor_block < self._counts[blob]:
                if self._is_left(blob, self._cursor_block):
                    return self._start(blob, self._cursor_block, Priority.BACKGROUND, most_blocks, most_blocks)
                self._cursor_block += 1
            self._cursor += 1
            self._cursor_block = 0
        return None

    def urgency_of(self, blob: int, block: int) -> Priority:
        """Of a block that is in flight, how urgently it was asked for by now. May be asked without the lock."""
        return self._in_flight.get((blob, block), Priority.BACKGROUND)

    @property
    def in_flight(self) -> int:
        """How many blocks."""
        return len(self._in_flight)

    @property
    def is_demanded(self) -> bool:
        """Whether a reader waits for a block that has not arrived. May be asked without the lock."""
        return bool(self._wanted[Priority.DEMAND]) or Priority.DEMAND in list(self._in_flight.values())

    def done(self, blob: int, block: int) -> None:
        """That block of a job has arrived."""
        self._in_flight.pop((blob, block), None)

    def failed(self, job: Job, *, again: bool) -> None:
        """The blocks of `job` that have not arrived are not in flight any more.

        With `again` they are asked for as before, else forgotten until somebody wants them anew. The background
        cursor goes back to them in either case.
        """
        for key in job.blocks():
            priority = self._in_flight.pop(key, None)
            if again and priority is not None and priority is not Priority.BACKGROUND:
                self._wanted[priority][key] = None
        self.rewind()

    def fill(self) -> None:
        """From now on the whole model is wanted."""
        self._order = self._background
        self.rewind()

    def rewind(self) -> None:
        """Look at every block again in the background order (blocks were dropped or failed)."""
        self._cursor = self._cursor_block = 0

    def _first_of(self, blob: int, block: int, wanted: dict[Block, None], most_blocks: int) -> int:
        """Where a range begins that has that block: reads of one reader come in any order, and it needs the first one first."""
        first = block
        while (
            block - first < most_blocks - 1
            and first % blocks.SEGMENT_BLOCKS
            and (blob, first - 1) in wanted
            and self._is_free(blob, first - 1)
        ):
            first -= 1
        return first

    def _is_free(self, blob: int, block: int) -> bool:
        return (blob, block) not in self._in_flight and not self._is_present(blob, block)

    def _is_left(self, blob: int, block: int) -> bool:
        """For the background."""
        return self._is_free(blob, block) and not self._is_kept(blob, block)

    def _start(self, blob: int, first: int, priority: Priority, most_blocks: int, along: int) -> Job:
        """The first block, neighbours that are asked for, and of others so many that there are `along`. Call with a block that may
        be started.
        """
        taken = {(blob, first): priority}
        while (
            len(taken) < most_blocks
            and (block := first + len(taken)) < self._counts[blob]
            and block % blocks.SEGMENT_BLOCKS
            and self._is_free(blob, block)
        ):
            if self._is_asked_for(blob, block):
                taken[blob, block] = priority
            elif len(taken) < along and not self._is_kept(blob, block):
                taken[blob, block] = Priority.BACKGROUND
            else:
                break
        self._in_flight.update(taken)
        for key in taken:
            for wanted in self._wanted.values():
                wanted.pop(key, None)
        return Job(blob, first, len(taken), priority)

    def _is_asked_for(self, blob: int, block: int) -> bool:
        return any((blob, block) in wanted for wanted in self._wanted.values())
