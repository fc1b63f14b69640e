"""A read waits at most its deadline, on a virtual clock; what the fetcher complained of is the reason it gives."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from csi.errors import ModelMountError, RegistryUnavailableError
from csi.oci.digest import Digest
from csi.stream.scheduler import Priority
from csi.tree import file_format, model
from csi.tree.file_format import Tree
from csi.tree.model import BlobSpec, Entry, TreeFile
from csi.worker.reader import CachedReader

_DEADLINE_S = 30.0
_BLOB = BlobSpec(Digest.of(b"weights"), 1 << 20)


class SilentFetcher:
    """Brings nothing. `on_ask` is called with each question."""

    def __init__(self) -> None:
        self.asked = 0
        self.on_ask: Callable[[], None] = lambda: None

    def ask(self, blob: int, first: int, count: int, priority: Priority) -> None:
        self.asked += 1
        self.on_ask()

    def report_damaged(self, blob: int, block: int) -> None:
        raise AssertionError("nothing is there that could be damaged")

    def give_back(self, slots: list[int]) -> bool:
        return True


@pytest.fixture
def area_fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def read_fails(reader: CachedReader, entry: Entry) -> tuple[ModelMountError, float]:
    """The error of one read, and how long it took on the virtual clock."""

    async def read() -> tuple[ModelMountError, float]:
        began = trio.current_time()
        try:
            await reader.read(entry, 0, 4096)
        except ModelMountError as exc:
            return exc, trio.current_time() - began
        raise AssertionError("there was nothing to read")

    return trio.run(read, clock=trio.testing.MockClock(autojump_threshold=0))


def weights(tree: Tree) -> Entry:
    return next(entry for _, entry in tree.walk_files())


def test_a_read_ends_at_its_deadline_with_what_was_tried(area_fd: int) -> None:
    tree = Tree(file_format.dump(model.build([TreeFile("w.bin", _BLOB, 0, 1 << 20)])))
    fetcher, told = SilentFetcher(), list[tuple[Entry, ModelMountError]]()
    reader = CachedReader(tree, area_fd, fetcher, _DEADLINE_S, lambda entry, error: told.append((entry, error)))
    fetcher.on_ask = lambda: reader.note_error(RegistryUnavailableError("registry r.test: answered 503"), fetcher.asked)
    entry = weights(tree)

    error, waited_s = read_fails(reader, entry)
    assert waited_s == pytest.approx(_DEADLINE_S)
    assert isinstance(error, RegistryUnavailableError)
    assert "registry r.test: answered 503" in str(error)
    assert f"tried {fetcher.asked} times" in str(error)
    assert told == [(entry, error)]
    assert reader.counters["failed_reads"] == 1


def test_what_the_kernel_asks_again_at_once_has_waited_already_and_a_later_read_waits_anew(area_fd: int) -> None:
    tree = Tree(file_format.dump(model.build([TreeFile("w.bin", _BLOB, 0, 1 << 20)])))
    reader, entry = CachedReader(tree, area_fd, SilentFetcher(), _DEADLINE_S), weights(tree)

    async def three_reads() -> list[float]:
        waited = []
        for pause_s in (0.0, 0.0, 5.0):
            await trio.sleep(pause_s)
            began = trio.current_time()
            with pytest.raises(RegistryUnavailableError):
                await reader.read(entry, 0, 4096)
            waited.append(trio.current_time() - began)
        return waited

    waited = trio.run(three_reads, clock=trio.testing.MockClock(autojump_threshold=0))
    assert waited == [pytest.approx(_DEADLINE_S), 0.0, pytest.approx(_DEADLINE_S)]


def test_a_complaint_from_before_a_block_came_is_no_reason(area_fd: int) -> None:
    tree = Tree(file_format.dump(model.build([TreeFile("w.bin", _BLOB, 0, 1 << 20)])))
    reader, entry = CachedReader(tree, area_fd, SilentFetcher(), _DEADLINE_S), weights(tree)
    reader.note_error(RegistryUnavailableError("of yesterday"), 3)
    reader.block_arrived(0, 7)
    error, _ = read_fails(reader, entry)
    assert "of yesterday" not in str(error)
    assert "no answer" in str(error)
