"""The table of requests taken: what one worker leaves behind, the next one finds, whatever happened between."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from csi.errors import MountError
from csi.fuse import request_table, wire
from csi.fuse.request_table import CONVICTED_AFTER, SLOTS, SUSPECT_AFTER, RequestTable
from csi.fuse.wire import Opcode


def a_request(unique: int, opcode: int = Opcode.READ) -> bytes:
    return wire.IN_HEADER.pack(wire.IN_HEADER.size, opcode, unique, 7, 0, 0, 0, 0, 0)


@pytest.fixture
def table_fd() -> Iterator[int]:
    fd = request_table.create()
    yield fd
    os.close(fd)


def take(table: RequestTable, unique: int, opcode: int = Opcode.READ) -> int:
    slot = table.acquire()
    assert slot is not None
    request = a_request(unique, opcode)
    table.room(slot)[: len(request)] = request
    return slot


class Successions(RuleBasedStateMachine):
    """Workers take, answer and die at random; `owed` is what a reader still waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.fd = request_table.create()
        self.table = RequestTable(self.fd)
        self.owed: dict[int, int] = {}  # slot: unique
        self.unique = 0

    def teardown(self) -> None:
        os.close(self.fd)

    @rule()
    def take(self) -> None:
        self.unique += 2
        slot = take(self.table, self.unique)
        assert slot not in self.owed
        self.owed[slot] = self.unique

    @rule()
    def find_nothing_to_take(self) -> None:
        slot = self.table.acquire()
        assert slot is not None
        self.table.release(slot)

    @precondition(lambda self: self.owed)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.owed)))
        del self.owed[slot]
        self.table.release(slot)

    @rule()
    def die(self) -> None:
        self.table = RequestTable(self.fd)
        assert self.table.left_behind == sorted(self.owed)
        for slot, unique in self.owed.items():
            assert wire.IN_HEADER.unpack_from(self.table.room(slot))[2] == unique

    @invariant()
    def the_supervisor_sees_the_same(self) -> None:
        assert {taken.slot: taken.unique for taken in request_table.pending(self.fd)} == self.owed


TestSuccessions = Successions.TestCase
TestSuccessions.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


def test_all_slots_can_be_taken_and_no_more(table_fd: int) -> None:
    table = RequestTable(table_fd)
    assert [table.acquire() for _ in range(SLOTS)] == list(range(SLOTS))
    assert table.acquire() is None
    table.release(17)
    assert table.acquire() == 17


def test_a_request_that_three_workers_died_over_alone_is_convicted(table_fd: int) -> None:
    innocent, poison = take(RequestTable(table_fd), 2), take(RequestTable(table_fd), 4)
    deaths = 1
    while True:
        table = RequestTable(table_fd)
        if table.is_convicted(poison):
            break
        for slot in (innocent, poison):
            if table.is_suspect(slot):
                table.begin_trial(slot)
                if slot == innocent:
                    table.end_trial(slot)
        deaths += 1
    assert deaths == SUSPECT_AFTER + CONVICTED_AFTER
    assert not table.is_convicted(innocent)
    assert [taken.convicted for taken in request_table.pending(table_fd)] == [False, True]


def test_a_trial_that_was_survived_counts_for_nothing(table_fd: int) -> None:
    slot = take(RequestTable(table_fd), 2)
    for _ in range(SUSPECT_AFTER + 2 * CONVICTED_AFTER):
        table = RequestTable(table_fd)
        table.begin_trial(slot)
        table = RequestTable(table_fd)
        table.begin_trial(slot)
        table.end_trial(slot)
    assert not RequestTable(table_fd).is_convicted(slot)


def test_a_freed_slot_forgets_its_history(table_fd: int) -> None:
    slot = take(RequestTable(table_fd), 2)
    for _ in range(5):
        table = RequestTable(table_fd)
    assert table.is_suspect(slot)
    table.release(slot)
    assert take(table, 4) == slot
    assert not table.is_suspect(slot)


def test_without_any_worker_everything_owed_is_answered_once(table_fd: int) -> None:
    table = RequestTable(table_fd)
    take(table, 2)
    take(table, 4, Opcode.FORGET)
    take(table, 6, Opcode.LOOKUP)
    ours, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, kernel:
        assert request_table.answer_all(table_fd, ours.fileno(), errno.EIO) == 2
        assert [kernel.recv(100) for _ in range(2)] == [
            struct.pack("<IiQ", 16, -errno.EIO, unique) for unique in (2, 6)
        ]
    assert request_table.pending(table_fd) == []
    assert RequestTable(table_fd).left_behind == []


def test_a_worker_cannot_shrink_it(table_fd: int) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(table_fd, 0)


@given(st.binary(max_size=64))
def test_anything_else_is_refused(content: bytes) -> None:
    fd = os.memfd_create("other")
    try:
        os.write(fd, content)
        for use in (RequestTable, request_table.pending):
            with pytest.raises(MountError, match="request table"):
                use(fd)
    finally:
        os.close(fd)


def test_nonsense_of_a_dead_worker_is_shown_and_never_believed(table_fd: int) -> None:
    os.pwrite(table_fd, b"\xff" * (3 * request_table.SLOT_BYTES), 4096)
    os.pwrite(table_fd, b"\xff" * 4, 16)  # the trial
    assert [taken.opcode for taken in request_table.pending(table_fd)] == [0xFFFFFFFF] * 3
    assert RequestTable(table_fd).left_behind == [0, 1, 2]


def test_what_is_left_again_and_again_is_known_to_be_since_the_first_time(
    table_fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1_000_000_000]
    monkeypatch.setattr("time.monotonic_ns", lambda: now[0])
    slot = take(RequestTable(table_fd), 22)
    for passed_s in (0, 7, 19):
        now[0] = (100 + passed_s) * 1_000_000_000
        assert RequestTable(table_fd).left_s(slot) == passed_s


def test_another_request_in_its_slot_is_left_since_later_even_if_nobody_cleared_that(
    table_fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0]
    monkeypatch.setattr("time.monotonic_ns", lambda: now[0])
    take(RequestTable(table_fd), 22)
    now[0] = 5_000_000_000
    table = RequestTable(table_fd)
    (slot,) = table.left_behind
    table.release(slot)
    now[0] = 60_000_000_000
    assert take(table, 24) == slot
    assert RequestTable(table_fd).left_s(slot) == 0
