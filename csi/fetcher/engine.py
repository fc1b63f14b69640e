"""Decides what is fetched when and from where, and does it: threads that each fetch one range at a time.

    engine    the threads, what they do next, failures, whom to tell       `csi.stream.scheduler` decides the order
    intake    one block from the network to disk or to the worker          `csi.fetcher.intake`
    proving   what is on the disk already, and whole blobs                 `csi.fetcher.proving`

Where there is a block index, a block is checked on its way through memory before it is marked, and what the cache held
before this process started is checked before it is marked again. Without one a thread checks each blob once it is
complete.

    _lock        guards the scheduler, the counters and the wake-ups; never held during I/O
    _writers     fixed list after the constructor; written to without the lock
    readers      learn of a block by `on_block` after its mark is set in the shared block map

One thread never does background work, so that a demanded block does not queue behind it. Retries are endless while
the mount lives: how long a reader waits is the reader's decision (its deadline), not the fetcher's. Only wrong bytes
end a wait early, after a few tries.
"""

from __future__ import annotations

import functools
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from csi.cache.blob import BlobWriter
from csi.cache.format import SHARED_FROM_BYTES, BlobState
from csi.cache.ring import LendingRing
from csi.errors import (
    CacheError,
    ContentError,
    DigestMismatchError,
    ModelMountError,
    RegistryAuthError,
    RegistryError,
)
from csi.fetcher.counters import Counters
from csi.fetcher.intake import Intake, Outcome
from csi.fetcher.proving import DigestCheck, Found, block_buffer, look_at_kept, read_stored
from csi.integrity.index import BlobHashes
from csi.stream import blocks
from csi.stream.ports import ModelSource
from csi.stream.range_length import RangeLength
from csi.stream.scheduler import Job, Priority, Scheduler
from csi.stream.width import WINDOW_S, Width
from csi.tree.model import BlobSpec

log = logging.getLogger(__name__)

_FIRST_DELAY_S = 0.2
_MAX_DELAY_S = 10.0

_SCARCE_CORES = 4
_HASH_PATIENCE_S = 0.1
_FINAL_TRIES = 3
_LENT_AT_ONCE = 4
"""Blocks of a range that can only be lent: each request costs, and there is not room for many."""
_EVENT_INTERVAL_S = 10.0  # of a registry whose every block is wrong we need not speak every time
_TROUBLE_INTERVAL_S = 1.0
_AUTH_DELAY_S = 2.0  # new credentials wake the wait at once
MOST_THREADS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSettings:
    """`threads` connections to begin with, one of them for readers only, and at most `most_threads` where that brings more.
    `fill`: fetch the whole model in the background. `cores`: how many this process may use.
    """

    threads: int = 4
    most_threads: int = MOST_THREADS
    fill: bool = True
    cores: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))


class FetchEngine:
    """`sources` are used in turn: the next one when one fails. `writers[i]` is the cache of `specs[i]`, and `hashes[i]`
    are the hashes of its blocks, where they are known.

    Callbacks come from our threads: `on_block(blob, block)`, `on_failed(blob, block, error)` for a block that will not
    come without being asked for again, `on_wrong(error)` when bytes were found wrong, received or stored ones, and
    `on_lent(blob, block, slot)`, which says whether the worker has been told of that slot of `ring` (`is_lent(blob, block)`: and
    has not given it back), and
    `on_complete(blob)` when all of a blob is here, checked, and not from a proven blob already, and `on_damaged(blob)` when a
    block of the cache was found damaged, and `on_trouble(error, tries)` now and then while tries fail: so many since the last
    block came. Without a ring every block goes to the cache or is lost.
    """

    def __init__(
        self,
        sources: Sequence[ModelSource],
        specs: Sequence[BlobSpec],
        writers: Sequence[BlobWriter],
        settings: EngineSettings,
        *,
        on_block: Callable[[int, int], None],
        on_failed: Callable[[int, int, ModelMountError], None],
        on_wrong: Callable[[ModelMountError], None],
        on_lent: Callable[[int, int, int], bool] = lambda blob, block, slot: False,
        is_lent: Callable[[int, int], bool] = lambda blob, block: False,
        on_complete: Callable[[int], None] = lambda blob: None,
        on_damaged: Callable[[int], None] = lambda blob: None,
        on_trouble: Callable[[ModelMountError, int], None] = lambda error, tries: None,
        ring: LendingRing | None = None,
        hashes: Sequence[BlobHashes | None] | None = None,
    ) -> None:
        self._sources = list(sources)
        self._turn = 0  # which source is used; moves on when one fails
        self._specs = specs
        self._writers = writers
        self._settings = settings
        self._on_block, self._on_failed, self._on_wrong = on_block, on_failed, on_wrong
        self._ring, self._is_lent = ring, is_lent
        self._on_complete, self._on_damaged, self._on_trouble = on_complete, on_damaged, on_trouble
        self._failed_tries, self._told_trouble_at = 0, -_TROUBLE_INTERVAL_S
        self._hashes: list[BlobHashes | None] = list(hashes) if hashes is not None else [None] * len(specs)
        self._complete: set[int] = set()
        self._held: set[int] = set()
        self._lock = threading.Condition()
        self._stopping = False
        self._generation = 0  # counts changes of sources and credentials; a wait for better ones ends when it moves
        self._scheduler = Scheduler(
            [spec.size_bytes for spec in specs], self._is_present, is_kept=self._is_left, fill=settings.fill
        )
        self._counters = Counters()
        self._last_want = 0.0
        self._final_tries: dict[tuple[int, int], int] = {}
        self._last_event: dict[type[ModelMountError], float] = {}  # one kind must not hide the other
        self._intake = Intake(
            writers,
            ring,
            self._counters,
            self._lock,
            on_lent=on_lent,
            on_written=self._written,
        )
        self._threads: list[threading.Thread] = []
        self._width = Width(settings.threads, settings.most_threads)
        self._range_length = RangeLength()
        self._fetching = 0  # threads that fetch or look for something to
        self._window_began, self._window_bytes = 0.0, 0  # of fetching without a pause; 0.0: none yet

    def start(self) -> None:
        """Start the threads."""
        with self._lock:
            self._widen()
        if self._ring is not None:
            self._spawn("write", self._intake.write_loop)
        if None in self._hashes:
            check = DigestCheck(
                self._specs,
                self._writers,
                self._hashes,
                self._lock,
                is_stopping=lambda: self._stopping,
                stand_back=self._stand_back,
                on_right=self._right_blob,
                on_damaged=self.damaged,
                on_wrong=self._wrong_digest,
            )
            self._spawn("hash", check.run)

    def stop(self) -> None:
        """Ask the threads to end after the block they are at. They are daemons: a stalled read does not keep us."""
        with self._lock:
            self._stopping = True
            self._lock.notify_all()
        self._intake.stop()

    def unallocated_bytes(self) -> int:
        """How much of the disk the blobs are still to take."""
        return sum(writer.unallocated_bytes() for writer in self._writers)

    def want(self, blob: int, first: int, count: int, priority: Priority) -> None:
        """Ask for blocks. Answers come by callback; blocks that are present get theirs at once."""
        with self._lock:
            self._last_want = time.monotonic()
            if priority is Priority.DEMAND:
                self._counters.demanded_blocks += count
            # What was asked for while it was on its way to the worker is not fetched again.
            end = min(first + count, self._writers[blob].block_count)
            asked = [block for block in range(first, end) if not self._is_lent(blob, block)]
            for start, length in _runs(asked):
                self._scheduler.want(blob, start, length, priority)
            self._lock.notify_all()
        for block in range(first, min(first + count, self._writers[blob].block_count)):
            if self._is_present(blob, block):
                self._on_block(blob, block)

    def damaged(self, blob: int, block: int) -> None:
        """A block that is marked cannot be read from the cache: fetch it again."""
        if not 0 <= block < self._writers[blob].block_count or not self._is_present(blob, block):
            return
        self._drop(blob, block)
        self.want(blob, block, 1, Priority.DEMAND)

    def distrust(self, blob: int, error: ModelMountError) -> None:
        """The blob is not what the mount was made from, whatever its sha256: nobody reads another byte of it."""
        self._writers[blob].poison()
        self._on_wrong(error)

    def adopt_shared(self, blob: int, *, fresh: bool) -> bool:
        """The store may have put a proven blob in place of what we have, or had not yet. `fresh`: it is a copy of ours.
        Whether we use it.
        """
        writer, spec = self._writers[blob], self._specs[blob]
        known = self._hashes[blob]
        if known is None and (offered := writer.offered(spec.digest)) is not None:
            self._check_served(blob, BlobHashes(spec.digest, spec.size_bytes, offered))
        adopted = writer.adopt(spec.digest, known.hashes if known else None, fresh=fresh)
        if adopted and writer.hashes is not None:
            with self._lock:
                if self._hashes[blob] is None:
                    self._hashes[blob] = BlobHashes(spec.digest, spec.size_bytes, writer.hashes)
        self.hold(blob, held=False)
        return adopted

    def _check_served(self, blob: int, hashes: BlobHashes) -> None:
        """What readers may have had of a blob before anything was known of it: wrong bytes do not become right by being
        replaced.
        """
        buffer, writer = block_buffer(), self._writers[blob]
        for block in range(writer.block_count):
            if not writer.has(block):
                continue
            view = buffer[: blocks.block_length(writer.size_bytes, block)]
            try:
                read_stored(writer, block, view)
            except (OSError, CacheError):
                continue  # nobody else can read it either
            if not hashes.is_right(block, view) and writer.has(block):
                writer.poison()
                self._wrong_blob(blob, f"block {block} is another one than the digest's")
                return

    def hold(self, blob: int, *, held: bool) -> None:
        """Leave a blob out of the background while it may still come from elsewhere."""
        with self._lock:
            (self._held.add if held else self._held.discard)(blob)
            self._scheduler.rewind()
            self._lock.notify_all()

    def write_again(self) -> None:
        """There is room in the cache (again)."""
        with self._lock:
            self._intake.write_again()
            self._lock.notify_all()

    def room_again(self) -> None:
        """Slots of the ring came back."""
        with self._lock:
            self._lock.notify_all()

    def fill(self) -> None:
        """Fetch the whole model from now on."""
        with self._lock:
            self._scheduler.fill()
            self._lock.notify_all()

    @property
    def specs(self) -> Sequence[BlobSpec]:
        """The mount's blobs."""
        return self._specs

    @property
    def blob_count(self) -> int:
        """How many blobs the mount has."""
        return len(self._specs)

    def use_sources(self, sources: Sequence[ModelSource]) -> None:
        """Fetch from these from the next range on, and try again at once what waits. Old ones are the caller's to close."""
        with self._lock:
            self._sources = list(sources)
            self._generation += 1
            self._lock.notify_all()

    def snapshot(self) -> dict[str, object]:
        """Counters and per-blob progress, for status and metrics."""
        with self._lock:
            fields = self._counters.as_fields()
            fields["damaged_blocks"] = self._counters.damaged_blocks + sum(
                writer.lost_blocks for writer in self._writers
            )
            return {
                **fields,
                "blobs": [
                    {
                        "digest": str(spec.digest),
                        "size_bytes": spec.size_bytes,
                        "blocks": writer.block_count,
                        "present_blocks": writer.stored_blocks(),
                        "state": (BlobState.VERIFIED if self._is_proven(blob) else writer.state).name.lower(),
                    }
                    for blob, (spec, writer) in enumerate(zip(self._specs, self._writers, strict=True))
                ],
            }

    def _is_proven(self, blob: int) -> bool:
        """Whether all of a blob is here, each block checked on its way in, or when it is read if its sha256 was right before."""
        writer = self._writers[blob]
        if self._hashes[blob] is None or writer.state is not BlobState.FILLING:
            return False
        return writer.is_whole or (writer.hashes is not None and writer.stored_blocks() == writer.block_count)

    def _readers_wait(self) -> bool:
        """Somebody reads what is not there yet: a demand, or the read-ahead of a reader that is only just fed."""
        return time.monotonic() - self._last_want < _HASH_PATIENCE_S or self._scheduler.is_demanded

    def _is_wanted(self, blob: int, block: int) -> bool:
        """Of a block that is in flight: somebody reads, by now."""
        return self._scheduler.urgency_of(blob, block) is not Priority.BACKGROUND or self._readers_wait()

    def _widen(self) -> None:
        """Have as many fetch threads as should be. The first is for readers only. Call with the lock."""
        while self._fetching < self._width.ranges and not self._stopping:
            least = Priority.AHEAD if self._fetching == 0 else Priority.BACKGROUND
            self._spawn(f"fetch-{self._fetching}", functools.partial(self._fetch_loop, least, self._fetching))
            self._fetching += 1

    def _note_rate(self, fetched_bytes: int) -> None:
        """Call with the lock."""
        now = time.monotonic()
        if self._window_began:
            self._window_bytes += fetched_bytes
            if (seconds := now - self._window_began) < WINDOW_S:
                return
            before = self._width.now
            if self._width.observe(self._window_bytes / seconds) != before:
                log.info("%d ranges at once: %.0f MB/s", before, self._window_bytes / seconds / 1e6)
            self._widen()
        self._window_began, self._window_bytes = now, 0

    def _nothing_to_fetch(self) -> None:
        """Call with the lock."""
        self._window_began = 0.0
        self._width.interrupted()

    def _spawn(self, name: str, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _is_present(self, blob: int, block: int) -> bool:
        return self._writers[blob].has(block)

    def _is_left(self, blob: int, block: int) -> bool:
        """Not for the background: it need only be checked, or comes from elsewhere. What is small is checked by it: then nothing
        is left to do for the blob.
        """
        writer = self._writers[blob]
        only_check = writer.is_kept(block) and writer.size_bytes >= SHARED_FROM_BYTES
        return blob in self._held or self._intake.is_being_written(blob, block) or only_check

    def _fetch_loop(self, least: Priority, number: int) -> None:
        buffer = block_buffer()
        failures = 0
        while (job := self._next_job(least, number)) is not None:
            generation = self._generation
            try:
                self._fetch(job, buffer)
                failures = 0
            except Exception as exc:  # a bug in one job must not silence a fetch thread for good
                error = exc if isinstance(exc, ModelMountError) else _internal(exc)
                failures += 1
                self._failed(job, error)
                self._pause(_delay_s(error, failures), generation)

    def _next_job(self, least: Priority, number: int) -> Job | None:
        """None for a thread that is to end: the last ones, when fewer are wanted."""
        with self._lock:
            while not self._stopping:
                if number >= self._width.ranges and number == self._fetching - 1:
                    self._fetching -= 1
                    self._lock.notify_all()
                    return None
                allowed, patience_s = self._allowed(least)
                length = along = self._range_length.now
                if patience_s is not None:  # what is lent must be read before its room in memory is needed again
                    length, along = min(_LENT_AT_ONCE, length, self._room() or _LENT_AT_ONCE), 0
                if job := self._scheduler.next_job(allowed, length, along=along):
                    return job
                if self._intake.missed_writes and allowed is Priority.BACKGROUND:
                    self._intake.missed_writes = False
                    self._scheduler.rewind()
                    continue
                if least is Priority.BACKGROUND:
                    self._nothing_to_fetch()
                self._lock.wait(patience_s)
        return None

    def _allowed(self, least: Priority) -> tuple[Priority, float | None]:
        """What may be fetched now, and when to ask again. What nobody waits for is fetched to be kept or not at all, and
        not in the way of what somebody waits for; what somebody may want soon needs room in memory while there is none
        on the disk.
        """
        if (rest := self._intake.rest_s) > 0:
            return (min(least, Priority.AHEAD) if self._room() else Priority.DEMAND), rest
        if self._intake.disk_is_slow and self._readers_wait():
            # A block that finds no room in memory is written, and its reader waits for that.
            return (min(least, Priority.AHEAD) if self._room() else Priority.DEMAND), _HASH_PATIENCE_S
        return least, None

    def _room(self) -> int:
        return self._intake.room(self._scheduler.in_flight)

    def _gives_way(self, blob: int, block: int) -> bool:
        """Whether the rest of a range is left from this block on: nobody waits for it, and what cannot be kept would take the room
        in memory of what somebody waits for.
        """
        if not (self._intake.rest_s > 0 or (self._intake.disk_is_slow and self._readers_wait())):
            return False
        return self._scheduler.urgency_of(blob, block) > (Priority.AHEAD if self._intake.room(0) else Priority.DEMAND)

    def _fetch(self, job: Job, buffer: memoryview) -> None:
        absent = [block for blob, block in job.blocks() if not self._is_good_in_cache(blob, block, buffer)]
        for first, count in _runs(absent):
            self._fetch_run(job, first, count, buffer)

    def _is_good_in_cache(self, blob: int, block: int, buffer: memoryview) -> bool:
        """Check a block that an earlier process left. False for none, and for one that is not right (any more)."""
        found = look_at_kept(self._writers[blob], self._hashes[blob], block, buffer)
        if found is Found.RIGHT:
            self._arrived(blob, block, fetched_bytes=0)
        elif found is Found.DAMAGED:
            self._drop(blob, block)
        return found is Found.RIGHT

    def _drop(self, blob: int, block: int) -> None:
        self._writers[blob].drop(block)
        with self._lock:
            self._counters.damaged_blocks += 1
        self._on_damaged(blob)
        self._tell_wrong(
            CacheError(
                f"blob {self._specs[blob].digest.short()}: block {block} of the cache was damaged; it is fetched again"
            )
        )

    def _fetch_run(self, job: Job, first: int, count: int, buffer: memoryview) -> None:
        spec, turn = self._specs[job.blob], self._turn
        source = self._sources[turn % len(self._sources)]
        offset = first * blocks.BLOCK_BYTES
        length = min(count * blocks.BLOCK_BYTES, spec.size_bytes - offset)
        try:
            asked = time.monotonic()
            reader = source.open_range(spec.digest, spec.size_bytes, offset, length)
            answered = time.monotonic()
            with self._lock:
                self._width.waited(answered - asked)
                self._widen()
            try:
                for block in range(first, first + count):
                    if self._gives_way(job.blob, block):
                        self._put_back(Job(job.blob, block, first + count - block, job.priority))
                        return
                    content = buffer[: blocks.block_length(spec.size_bytes, block)]
                    begun = time.monotonic()
                    outcome = self._intake.receive(
                        reader,
                        job.blob,
                        block,
                        content,
                        self._hashes[job.blob],
                        is_wanted=functools.partial(self._is_wanted, job.blob, block),
                    )
                    self._range_length.observe(len(content), time.monotonic() - begun)
                    if outcome is Outcome.WRONG:
                        reader.reject()
                        raise self._wrong_block(source, job.blob, block)
                    if outcome is Outcome.CUT_SHORT:
                        self._put_back(Job(job.blob, block, first + count - block, job.priority))
                        return
                    if outcome is Outcome.DISPLACED:
                        self._displaced(job, block, len(content))
                    else:
                        self._arrived(job.blob, block, fetched_bytes=len(content))
                    if self._stopping:
                        return
                with self._lock:
                    self._width.transferred(time.monotonic() - answered)
            finally:
                reader.close()
        except (RegistryError, ContentError):
            self._turn = turn + 1
            raise

    def _wrong_block(self, source: ModelSource, blob: int, block: int) -> DigestMismatchError:
        spec = self._specs[blob]
        return DigestMismatchError(
            f"blob {spec.digest.short()} from {source.origin}: block {block} is not what the model's block index says; "
            "nobody read any of it; check the registry's storage, or push the model again",
            subject=str(spec.digest),
        )

    def _arrived(self, blob: int, block: int, fetched_bytes: int) -> None:
        with self._lock:
            self._scheduler.done(blob, block)
            if not self._is_present(blob, block):  # from now on: until then the background passed over it
                self._intake.missed_writes = True
            self._final_tries.pop((blob, block), None)
            if fetched_bytes:
                self._counters.fetched_bytes += fetched_bytes
                self._counters.fetched_blocks += 1
                self._counters.last_block_at = time.time()
                self._failed_tries = 0
                self._note_rate(fetched_bytes)
            else:
                self._counters.rechecked_blocks += 1
            self._lock.notify_all()
        if self._is_present(blob, block):  # else it was lent, and said so
            self._written(blob, block)

    def _written(self, blob: int, block: int) -> None:
        """The block can be read from the cache, at once or behind its reader."""
        self._on_block(blob, block)
        if self._hashes[blob] is not None and self._writers[blob].stored_blocks() == self._writers[blob].block_count:
            self._told_complete(blob)

    def _displaced(self, job: Job, block: int, fetched_bytes: int) -> None:
        """What was fetched was not needed: something else took its place, and has to be looked at if somebody waits."""
        with self._lock:
            self._counters.fetched_bytes += fetched_bytes
            self._counters.fetched_blocks += 1
        self._put_back(Job(job.blob, block, 1, job.priority))

    def _put_back(self, job: Job) -> None:
        with self._lock:
            self._scheduler.failed(job, again=True)
            self._lock.notify_all()

    def _told_complete(self, blob: int) -> None:
        with self._lock:
            if blob in self._complete or self._writers[blob].is_shared:
                return
            self._complete.add(blob)
        self._on_complete(blob)

    def _failed(self, job: Job, error: ModelMountError) -> None:
        # Credentials may be replaced and room be made while readers wait.
        again = error.retryable or isinstance(error, RegistryAuthError | CacheError)
        log.warning("fetch of %s blocks %d+%d: %s", self._specs[job.blob].digest.short(), job.first, job.count, error)
        with self._lock:
            self._counters.note_error(error)
            self._counters.retries += 1
            self._failed_tries += 1
            now = time.monotonic()
            if tell := now - self._told_trouble_at >= _TROUBLE_INTERVAL_S:
                self._told_trouble_at = now
            if isinstance(error, CacheError):
                self._counters.cache_errors += 1
            missing = [key for key in job.blocks() if not self._is_present(*key)]
            if isinstance(error, DigestMismatchError):
                self._counters.rejected_blocks += 1
            if not again and isinstance(error, RegistryError | ContentError) and missing:
                # What went wrong on the way is right the next time, and another source may have what one has not; what
                # is wrong with all of them stays wrong.
                tries = self._final_tries[missing[0]] = self._final_tries.get(missing[0], 0) + 1
                again = tries < max(_FINAL_TRIES, 2 * len(self._sources))
                if not again:
                    del self._final_tries[missing[0]]
                    missing = missing[:1]
            self._scheduler.failed(job, again=again)
            if (
                error.fields.get("status") == 429 or "retry_after_s" in error.fields
            ):  # else it is out of order, not busy
                self._width.refused()
                self._window_began = 0.0
        if tell:
            self._on_trouble(error, self._failed_tries)
        if isinstance(error, DigestMismatchError):
            self._tell_wrong(error)
        if not again:
            for blob, block in missing:
                self._on_failed(blob, block, error)

    def _tell_wrong(self, error: ModelMountError) -> None:
        with self._lock:
            now = time.monotonic()
            if now - self._last_event.get(type(error), -_EVENT_INTERVAL_S) < _EVENT_INTERVAL_S:
                return
            self._last_event[type(error)] = now
        self._on_wrong(error)

    def _pause(self, seconds: float, generation: int) -> None:
        deadline = time.monotonic() + seconds
        with self._lock:
            while not self._stopping and generation == self._generation:
                left = deadline - time.monotonic()
                if left <= 0:
                    return
                self._lock.wait(left)

    def _stand_back(self) -> None:
        """Where cores are scarce, hashing would take the one that a reader's bytes need: a block in a while is enough."""
        if self._settings.cores < _SCARCE_CORES and self._readers_wait():
            self._lock.wait_for(lambda: self._stopping or not self._readers_wait(), _HASH_PATIENCE_S)

    def _right_blob(self, blob: int, hashes: bytes) -> None:
        """From now on each of its blocks can be checked by itself."""
        spec = self._specs[blob]
        with self._lock:
            self._hashes[blob] = BlobHashes(spec.digest, spec.size_bytes, hashes)
        self._told_complete(blob)

    def _wrong_digest(self, blob: int, found: str) -> None:
        spec = self._specs[blob]
        self._wrong_blob(blob, f"the {spec.size_bytes} bytes received hash to {spec.digest.algorithm}:{found[:12]}")

    def _wrong_blob(self, blob: int, what: str) -> None:
        spec = self._specs[blob]
        self._on_wrong(
            DigestMismatchError(
                f"blob {spec.digest.short()} from {self._sources[0].origin}: {what}; reads of it fail from now on, and its "
                "cache is dropped; check the registry's storage, or push the model again",
                expected=str(spec.digest),
                subject=str(spec.digest),
            )
        )


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ascending numbers as (first, count) of neighbours."""
    start = 0
    for position in range(1, len(numbers) + 1):
        if position == len(numbers) or numbers[position] != numbers[position - 1] + 1:
            yield numbers[start], position - start
            start = position


def _delay_s(error: ModelMountError, failures: int) -> float:
    """How long to wait after the `failures`-th failure in a row: what the registry asked for, else exponential."""
    asked = error.fields.get("retry_after_s")
    if asked is not None:
        return min(float(asked), 60.0)
    if isinstance(error, RegistryAuthError):
        return _AUTH_DELAY_S
    if isinstance(error, ContentError | RegistryError) and not error.retryable:
        return min(_MAX_DELAY_S, _FIRST_DELAY_S * failures)
    return float(min(_MAX_DELAY_S, _FIRST_DELAY_S * 2 ** min(failures - 1, 10)) * random.uniform(0.5, 1.0))  # noqa: S311


def _internal(error: Exception) -> ModelMountError:
    log.error("fetch failed by a bug", exc_info=error)
    return ModelMountError(f"internal error while fetching: {type(error).__name__}")
