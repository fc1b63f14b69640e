"""The fetch engine with a real cache directory, a source in this process, and disks that are full or slow."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from csi.cache.blob import BlobWriter, BlockWrite
from csi.cache.ring import LendingRing
from csi.errors import CacheError, ModelMountError
from csi.fetcher.engine import EngineSettings, FetchEngine
from csi.integrity.index import BlobHashes, hash_of
from csi.oci.digest import Digest
from csi.stream.blocks import BLOCK_BYTES, block_count, block_length
from csi.stream.ports import ManifestBytes
from csi.stream.scheduler import Priority
from csi.tree.model import BlobSpec

SIZE = 10 * BLOCK_BYTES + 77
CONTENT = random.Random(2).randbytes(SIZE)
DIGEST = Digest.of(CONTENT)


class MemorySource:
    """A source that has one blob, and counts."""

    origin = "memory"

    def __init__(self, content: bytes = CONTENT) -> None:
        self.content = content
        self.fetched: list[tuple[int, int]] = []

    def fetch_manifest(self, tag: str | None, digest: Digest | None, timeout_s: float) -> ManifestBytes:
        raise AssertionError("the engine asks for no manifest")

    def referrers(self, digest: Digest, artifact_type: str, timeout_s: float) -> tuple[Digest, ...]:
        return ()

    def open_range(self, digest: Digest, size_bytes: int, offset: int, length: int) -> MemoryRange:
        self.fetched.append((offset, length))
        return MemoryRange(self.content[offset : offset + length])

    def close(self) -> None:
        return


class MemoryRange:
    def __init__(self, content: bytes) -> None:
        self._left = memoryview(content)

    def reject(self) -> None:
        """There is nobody else."""

    def readinto(self, buffer: memoryview) -> None:
        buffer[:] = self._left[: len(buffer)]
        self._left = self._left[len(buffer) :]

    def close(self) -> None:
        return


class SlowWriter(BlobWriter):
    """Writes take `delay_s` each; one at a time, as on one disk. While `full`, refuses what begins behind `room` bytes of a
    block.
    """

    delay_s = 0.0
    full = False
    room = 0
    disk = threading.Lock()

    def begin(self, block: int) -> BlockWrite | None:
        write = super().begin(block)
        return write and SlowWrite(self, block, write._opened, write._generation)


class SlowWrite(BlockWrite):
    def write(self, start: int, data: memoryview) -> None:
        if SlowWriter.full and start >= SlowWriter.room:
            raise CacheError("no space left")
        with SlowWriter.disk:
            time.sleep(SlowWriter.delay_s)
        super().write(start, data)


class Reader:
    """What a worker does, in short: takes what is lent, gives it back, looks at the map for the rest."""

    def __init__(self, writer: BlobWriter, ring: LendingRing) -> None:
        self.writer, self.ring = writer, ring
        self.got: dict[int, bytes] = {}
        self.errors: list[ModelMountError] = []
        self.keeps_slots = False
        self.kept: dict[int, int] = {}
        self.complete = False
        self.news = threading.Condition()

    def on_block(self, blob: int, block: int) -> None:
        content = bytearray(block_length(SIZE, block))
        self.writer.read_into([memoryview(content)], block * BLOCK_BYTES)
        self._take(block, bytes(content))

    def on_lent(self, blob: int, block: int, slot: int) -> bool:
        self._take(block, bytes(self.ring.content(slot, block_length(SIZE, block))))
        if self.keeps_slots:
            self.kept[slot] = block
        else:
            self.ring.release(slot)
        return True

    def is_lent(self, blob: int, block: int) -> bool:
        return block in self.kept.values()

    def on_failed(self, blob: int, block: int, error: ModelMountError) -> None:
        self.errors.append(error)

    def on_complete(self, blob: int) -> None:
        with self.news:
            self.complete = True
            self.news.notify_all()

    def on_wrong(self, error: ModelMountError) -> None:
        self.errors.append(error)

    def _take(self, block: int, content: bytes) -> None:
        with self.news:
            self.got[block] = content
            self.news.notify_all()

    def wait(self, condition: Callable[[], bool]) -> None:
        with self.news:
            assert self.news.wait_for(condition, 20)


@pytest.fixture
def area(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    SlowWriter.delay_s, SlowWriter.full, SlowWriter.room = 0.0, False, 0
    before = set(threading.enumerate())
    yield fd
    SlowWriter.delay_s = 0.0
    for thread in set(threading.enumerate()) - before:
        thread.join(20)  # an engine's threads end at their block, and write to `fd` until then
    os.close(fd)


def hashes(content: bytes = CONTENT) -> BlobHashes:
    parts = [content[block * BLOCK_BYTES :][:BLOCK_BYTES] for block in range(block_count(len(content)))]
    return BlobHashes(DIGEST, SIZE, b"".join(map(hash_of, parts)))


def engine_on(area: int, source: MemorySource, *, fill: bool, indexed: bool = True) -> tuple[FetchEngine, Reader]:
    writer = SlowWriter.open(area, DIGEST, SIZE, b"b" * 16, recheck=indexed)
    ring = LendingRing(8)
    reader = Reader(writer, ring)
    engine = FetchEngine(
        [source],
        [BlobSpec(DIGEST, SIZE)],
        [writer],
        EngineSettings(fill=fill, cores=2),
        on_block=reader.on_block,
        on_failed=reader.on_failed,
        on_wrong=reader.on_wrong,
        on_lent=reader.on_lent,
        is_lent=reader.is_lent,
        ring=ring,
        on_complete=reader.on_complete,
        hashes=[hashes() if indexed else None],
    )
    engine.start()
    return engine, reader


def lent_blocks(engine: FetchEngine) -> int:
    count = engine.snapshot()["lent_blocks"]
    assert isinstance(count, int)
    return count


def assert_all_right(reader: Reader) -> None:
    for block, content in reader.got.items():
        assert content == CONTENT[block * BLOCK_BYTES :][:BLOCK_BYTES], block


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("room", [0, 1 << 20])
@pytest.mark.allow_logs
def test_a_full_disk_is_no_error_for_readers_and_is_tried_again(
    area: int, indexed: bool, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("csi.fetcher.intake._CACHE_REST_S", 0.3)
    SlowWriter.full, SlowWriter.room = True, room
    engine, reader = engine_on(area, MemorySource(), fill=True, indexed=indexed)
    for block in range(block_count(SIZE)):
        engine.want(0, block, 1, Priority.DEMAND)
        reader.wait(lambda block=block: block in reader.got)  # type: ignore[misc]
    assert_all_right(reader)
    snapshot = engine.snapshot()
    assert snapshot["lent_blocks"] == snapshot["unwritten_blocks"]
    assert snapshot["cache_errors"]
    assert reader.writer.stored_blocks() <= (room > 0)  # the last block is short
    SlowWriter.full = False
    deadline = time.monotonic() + 20
    while reader.writer.stored_blocks() < block_count(SIZE):
        assert time.monotonic() < deadline, "what was only lent is fetched and kept once there is room"
        time.sleep(0.02)
    engine.stop()


@pytest.mark.parametrize("indexed", [True, False])
def test_readers_do_not_wait_for_a_slow_disk(area: int, indexed: bool) -> None:
    SlowWriter.delay_s = 0.3
    engine, reader = engine_on(area, MemorySource(), fill=False, indexed=indexed)
    for number in range(40):  # the same blocks again and again, as long as they are not kept
        engine.want(0, number % block_count(SIZE), 1, Priority.DEMAND)
        reader.wait(lambda: number % block_count(SIZE) in reader.got)  # noqa: B023
        if engine.snapshot()["lent_blocks"]:
            break
    else:
        raise AssertionError("a disk that takes 0.3 s a block was never found slow")
    reader.got.clear()
    absent = [block for block in range(block_count(SIZE)) if not reader.writer.has(block)]
    assert len(absent) > 1
    with SlowWriter.disk:  # no write ends as long as we have it
        for block in absent:
            engine.want(0, block, 1, Priority.DEMAND)
        reader.wait(lambda: set(reader.got) >= set(absent))
    assert_all_right(reader)
    engine.stop()


def test_a_reader_does_not_wait_for_the_rest_of_a_block_on_a_disk_that_turns_slow(area: int) -> None:
    engine, reader = engine_on(area, MemorySource(), fill=False)
    engine.want(0, 0, 1, Priority.DEMAND)
    reader.wait(lambda: 0 in reader.got)
    lent_before = lent_blocks(engine)  # none, unless the machine is too busy to tell
    SlowWriter.delay_s = 0.05  # a piece; eight of them are a block
    engine.want(0, 1, 1, Priority.DEMAND)
    reader.wait(lambda: 1 in reader.got)
    assert lent_blocks(engine) == lent_before + 1, "the first block already that the disk is slow for"
    SlowWriter.delay_s = 0.0
    reader.wait(lambda: reader.writer.has(1))
    content = bytearray(BLOCK_BYTES)
    reader.writer.read_into([memoryview(content)], BLOCK_BYTES)
    assert content == CONTENT[BLOCK_BYTES : 2 * BLOCK_BYTES], (
        "its beginning was written before, its end behind the reader"
    )
    assert_all_right(reader)
    engine.stop()


def test_a_block_of_the_background_that_is_demanded_while_a_slow_disk_takes_it_goes_on_in_memory(area: int) -> None:
    SlowWriter.delay_s = 0.5  # a piece; the whole block takes four seconds
    engine, reader = engine_on(area, MemorySource(), fill=True)
    time.sleep(0.7)  # nobody reads: what was begun goes to the disk, however long that takes
    assert not lent_blocks(engine)
    engine.want(0, 0, 1, Priority.DEMAND)
    reader.wait(lambda: 0 in reader.got)
    assert lent_blocks(engine)
    assert not reader.writer.has(0)
    assert_all_right(reader)
    SlowWriter.delay_s = 0.0
    engine.stop()


def test_a_blob_whose_last_block_is_written_behind_its_reader_is_complete(area: int) -> None:
    engine, reader = engine_on(area, MemorySource(), fill=False)
    last = 3
    for block in range(block_count(SIZE)):
        if block != last:
            engine.want(0, block, 1, Priority.DEMAND)
            reader.wait(lambda block=block: reader.writer.has(block))  # type: ignore[misc]
    assert not reader.complete
    lent_before = lent_blocks(engine)
    SlowWriter.delay_s = 0.1
    engine.want(0, last, 1, Priority.DEMAND)
    reader.wait(lambda: last in reader.got)
    assert lent_blocks(engine) == lent_before + 1
    assert not reader.writer.has(last)
    reader.wait(lambda: reader.complete)
    assert reader.writer.has(last)
    engine.stop()


@pytest.mark.allow_logs
def test_what_is_lent_is_not_fetched_again_until_it_is_given_back(area: int) -> None:
    SlowWriter.full = True
    source = MemorySource()
    engine, reader = engine_on(area, source, fill=False)
    reader.keeps_slots = True
    engine.want(0, 3, 2, Priority.DEMAND)
    reader.wait(lambda: set(reader.got) == {3, 4})
    source.fetched.clear()
    engine.want(0, 3, 3, Priority.DEMAND)
    reader.wait(lambda: 5 in reader.got)
    assert source.fetched == [(5 * BLOCK_BYTES, BLOCK_BYTES)]
    for slot in reader.kept:
        reader.ring.release(slot)
    reader.kept.clear()
    reader.got.clear()
    engine.room_again()
    engine.want(0, 3, 1, Priority.DEMAND)
    reader.wait(lambda: 3 in reader.got)
    assert_all_right(reader)
    engine.stop()


@pytest.mark.allow_logs
def test_a_damaged_block_is_fetched_again_and_said_so(area: int, tmp_path: Path) -> None:
    source = MemorySource()
    engine, reader = engine_on(area, source, fill=True)
    reader.wait(lambda: len(reader.got) == block_count(SIZE))
    engine.stop()
    source.fetched.clear()
    with open(tmp_path / DIGEST.path_name / "seg-00000", "r+b") as file:
        file.seek(3 * BLOCK_BYTES)
        file.write(b"damage")
    engine, reader = engine_on(area, source, fill=False)
    engine.want(0, 2, 3, Priority.DEMAND)
    reader.wait(lambda: set(reader.got) == {2, 3, 4})
    assert_all_right(reader)
    assert source.fetched == [(3 * BLOCK_BYTES, BLOCK_BYTES)]
    assert [type(error) for error in reader.errors] == [CacheError]
    snapshot = engine.snapshot()
    assert (snapshot["rechecked_blocks"], snapshot["damaged_blocks"]) == (2, 1)
    engine.stop()


@pytest.mark.allow_logs
def test_the_next_source_is_asked_when_one_sends_wrong_bytes(area: int) -> None:
    good, bad = MemorySource(), MemorySource(bytes(SIZE))
    engine, reader = engine_on(area, bad, fill=False)
    engine.use_sources([bad, good])
    engine.want(0, 0, block_count(SIZE), Priority.DEMAND)
    reader.wait(lambda: len(reader.got) == block_count(SIZE))
    assert_all_right(reader)
    assert engine.snapshot()["rejected_blocks"]
    engine.stop()


@pytest.mark.parametrize("indexed", [True, False])
def test_a_complete_and_checked_blob_is_reported_once(area: int, indexed: bool) -> None:
    engine, reader = engine_on(area, MemorySource(), fill=True, indexed=indexed)
    reader.wait(lambda: reader.complete)
    assert reader.writer.stored_blocks() == block_count(SIZE)
    reader.complete = False
    engine.want(0, 0, block_count(SIZE), Priority.DEMAND)
    assert not reader.complete
    engine.stop()
