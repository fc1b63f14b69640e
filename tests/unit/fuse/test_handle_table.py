"""The table of open handles: what one worker leaves behind, the next one finds."""

from __future__ import annotations

import os

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from csi.fuse import request_table
from csi.fuse.backings import THROUGH_US, way_of
from csi.fuse.handle_table import HandleTable
from csi.fuse.request_table import HANDLES_OFFSET

_INODES = st.integers(1, 4)


class Successions(RuleBasedStateMachine):
    """Opens, releases and deaths at random; `open` is what the kernel holds: fh → (unique, inode, id)."""

    def __init__(self) -> None:
        super().__init__()
        self.fd = request_table.create()
        self.table = HandleTable(self.fd, HANDLES_OFFSET)
        self.open: dict[int, tuple[int, int, int]] = {}
        self.released: list[tuple[int, int]] = []
        self.unique = 0

    def teardown(self) -> None:
        os.close(self.fd)

    @rule(inode=_INODES, wanted=st.integers(0, 3), dies=st.booleans())
    def open_one(self, inode: int, wanted: int, dies: bool) -> None:
        self.unique += 2
        handle = self.table.add(self.unique, inode, way_of(self.table.of_inode(inode), wanted))
        assert handle is not None
        if dies:  # before it has answered: the next worker does it again
            self.succeed()
            again = self.table.of_open(self.unique)
            assert again == handle
        assert handle.fh not in self.open
        self.open[handle.fh] = (self.unique, inode, handle.backing_id)

    @rule(data=st.data(), dies=st.booleans())
    def release_one(self, data: st.DataObject, dies: bool) -> None:
        if self.open:
            fh = data.draw(st.sampled_from(sorted(self.open)))
            _, inode, _ = self.open.pop(fh)
            self.table.remove(fh, inode)
            if dies:
                self.succeed()
                self.table.remove(fh, inode)
            self.released.append((fh, inode))

    @rule(data=st.data())
    def release_again_what_is_long_closed(self, data: st.DataObject) -> None:
        if self.released:
            self.table.remove(*data.draw(st.sampled_from(self.released)))

    @rule()
    def succeed(self) -> None:
        self.table = HandleTable(self.fd, HANDLES_OFFSET)

    @invariant()
    def it_knows_what_is_open(self) -> None:
        for inode in range(1, 5):
            ids = sorted(backing_id for _, of, backing_id in self.open.values() if of == inode)
            assert sorted(self.table.of_inode(inode)) == ids
            assert len(set(ids)) <= 1, "one way at a time"
        for fh, (unique, _, backing_id) in self.open.items():
            handle = self.table.of_open(unique)
            assert handle is not None
            assert (handle.fh, handle.backing_id) == (fh, backing_id)


TestSuccessions = Successions.TestCase


def test_an_open_handle_decides_how_the_next_is_opened() -> None:
    assert way_of([], 5) == 5
    assert way_of([], THROUGH_US) == THROUGH_US
    assert way_of([THROUGH_US], 5) == THROUGH_US
    assert way_of([4, 4], 5) == 4, "another id for an open inode is EIO"
    assert way_of([4], THROUGH_US) == 4


def test_what_nobody_opened_is_ignored() -> None:
    fd = request_table.create()
    table = HandleTable(fd, HANDLES_OFFSET)
    for fh in (0, 1, 7, 1 << 40, (1 << 64) - 1):
        table.remove(fh, 1)
    handle = table.add(10, 1, 3)
    assert handle is not None
    table.remove(handle.fh, 2)
    assert table.of_inode(1) == [3], "a handle of another inode is not it"
    os.close(fd)
