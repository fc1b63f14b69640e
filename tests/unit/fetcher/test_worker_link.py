"""Memory that is lent to a worker, and goes back to the system when nothing is lent any more."""

from __future__ import annotations

import os
import resource
import selectors
import socket
from collections.abc import Iterator

import pytest

from csi.cache.ring import BorrowedBlocks
from csi.control import wire
from csi.fetcher import worker_link
from csi.fetcher.worker_link import WorkerLink


class Worker:
    """The other end: what it hears, and what it may look at."""

    def __init__(self, link: WorkerLink, selector: selectors.BaseSelector) -> None:
        self._link, self._selector = link, selector
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        link.attach(theirs.detach())
        self.borrowed = self.new_ring()

    def die(self) -> None:
        """And the link hears of it."""
        self.channel.close()
        for key, _ in self._selector.select(0):
            assert self._link.is_of(key.fileobj)
            assert self._link.receive() is None

    def new_ring(self) -> BorrowedBlocks:
        received = wire.recv(self.channel)
        assert received is not None
        message, (fd,) = received
        assert message["op"] == "ring"
        try:
            return BorrowedBlocks(fd)
        finally:
            os.close(fd)

    def hears_nothing(self) -> bool:
        self.channel.setblocking(False)
        try:
            self.channel.recv(1)
        except BlockingIOError:
            return True
        finally:
            self.channel.setblocking(True)
        return False


@pytest.fixture
def selector() -> Iterator[selectors.BaseSelector]:
    with selectors.DefaultSelector() as selector:
        yield selector


@pytest.fixture
def link(selector: selectors.BaseSelector, monkeypatch: pytest.MonkeyPatch) -> WorkerLink:
    monkeypatch.setattr(worker_link, "_QUIET_S", 0.0)
    return WorkerLink(selector)


@pytest.fixture
def worker(link: WorkerLink, selector: selectors.BaseSelector) -> Iterator[Worker]:
    worker = Worker(link, selector)
    yield worker
    worker.die()


def lend(link: WorkerLink, worker: Worker, content: bytes) -> int:
    slot = link.ring.lend(memoryview(content))
    assert slot is not None
    assert link.lend(0, 0, slot)
    received = wire.recv(worker.channel)
    assert received is not None
    assert (received[0]["op"], received[0]["slot"]) == ("lent", slot)
    return slot


def used_bytes(link: WorkerLink) -> int:
    return os.fstat(link.ring.fd).st_blocks * 512


def test_memory_that_nothing_was_lent_from_stays(link: WorkerLink, worker: Worker) -> None:
    assert link.give_memory_back() is None
    assert worker.hears_nothing()


def test_memory_goes_back_when_everything_is_returned_and_lending_goes_on(link: WorkerLink, worker: Worker) -> None:
    slot = lend(link, worker, b"one")
    assert used_bytes(link)
    assert link.give_memory_back() is None
    assert worker.hears_nothing(), "it has a block"
    link.returned([slot])
    assert link.give_memory_back() is None
    assert not used_bytes(link)
    new = worker.new_ring()
    slot = lend(link, worker, b"two")
    assert bytes(new.content(slot, 0, 3)) == b"two"
    assert bytes(worker.borrowed.content(slot, 0, 3)) == b"one", "who is still copying gets what it was lent"


def test_memory_that_is_being_written_to_the_disk_stays(link: WorkerLink, worker: Worker) -> None:
    slot = lend(link, worker, b"one")
    link.ring.hold(slot)
    link.returned([slot])
    assert link.give_memory_back() == 0.0, "ask again: no message will say that it is written"
    assert bytes(link.ring.content(slot, 3)) == b"one"
    assert worker.hears_nothing()


def test_a_loan_of_a_moment_ago_may_not_be_the_last(
    link: WorkerLink, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_link, "_QUIET_S", 60.0)
    link.returned([lend(link, worker, b"one")])
    again_s = link.give_memory_back()
    assert again_s is not None
    assert 50 < again_s <= 60
    assert worker.hears_nothing()


def test_a_worker_that_cannot_be_told_keeps_the_memory_it_has(link: WorkerLink, worker: Worker) -> None:
    slot = lend(link, worker, b"one")
    link.returned([slot])
    said = 0
    while link.tell({"op": "fail", "filler": "x" * 4096}):
        said += 1
    before = os.fstat(link.ring.fd).st_ino
    assert link.give_memory_back() == 0.0
    assert os.fstat(link.ring.fd).st_ino == before
    for _ in range(said):
        wire.recv(worker.channel)
    slot = lend(link, worker, b"two")
    assert bytes(worker.borrowed.content(slot, 0, 3)) == b"two"


def test_without_a_descriptor_to_spare_the_memory_there_is_goes_on(link: WorkerLink, worker: Worker) -> None:
    link.returned([lend(link, worker, b"one")])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unused = os.dup(0)
    os.close(unused)
    resource.setrlimit(resource.RLIMIT_NOFILE, (unused, hard))
    try:
        assert link.give_memory_back() == 0.0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert worker.hears_nothing()
    slot = lend(link, worker, b"two")
    assert bytes(worker.borrowed.content(slot, 0, 3)) == b"two"


def test_without_a_worker_it_goes_back_too(link: WorkerLink, worker: Worker, selector: selectors.BaseSelector) -> None:
    lend(link, worker, b"one")
    worker.die()
    assert link.give_memory_back() is None
    assert not used_bytes(link)
    successor = Worker(link, selector)
    slot = lend(link, successor, b"two")
    assert bytes(successor.borrowed.content(slot, 0, 3)) == b"two"
    successor.die()
