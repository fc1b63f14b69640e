"""Blocks lent in memory."""

from __future__ import annotations

import errno
import mmap
import os

import pytest

from csi.cache.ring import BorrowedBlocks, LendingRing


def test_what_is_lent_is_what_the_other_side_sees() -> None:
    ring = LendingRing(3)
    borrowed = BorrowedBlocks(ring.fd)
    assert borrowed.slots == 3
    slots = [ring.lend(memoryview(bytes([number]) * 100)) for number in range(3)]
    assert sorted(slot for slot in slots if slot is not None) == [0, 1, 2]
    for number, slot in enumerate(slots):
        assert slot is not None
        assert bytes(borrowed.content(slot, 10, 20)) == bytes([number]) * 20


def test_a_slot_is_not_lent_again_before_everybody_is_done_with_it() -> None:
    ring = LendingRing(1)
    slot = ring.lend(memoryview(b"a"))
    assert slot == 0
    ring.hold(slot)
    assert ring.lend(memoryview(b"b")) is None
    ring.release(slot)
    assert ring.lend(memoryview(b"b")) is None
    ring.release(slot)
    ring.release(slot)
    assert ring.free_slots == 1
    assert ring.lend(memoryview(b"b")) == 0
    assert ring.lend(memoryview(b"c")) is None, "giving back once too often frees nothing twice"


def test_nothing_is_allocated_before_something_is_lent() -> None:
    ring = LendingRing(4)
    BorrowedBlocks(ring.fd)
    assert os.fstat(ring.fd).st_blocks == 0


def test_whoever_gets_the_descriptor_can_only_read() -> None:
    ring = LendingRing(1)
    with pytest.raises(OSError, match=os.strerror(errno.EPERM)):
        os.pwrite(ring.fd, b"x", 0)
    with pytest.raises(PermissionError):
        mmap.mmap(ring.fd, 4096)
