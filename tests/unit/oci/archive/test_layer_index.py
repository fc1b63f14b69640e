"""The index file of a layer: what went in comes out, and nothing else is taken for one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi.errors import ContentError
from csi.oci.archive.layer_index import Access, LayerIndex, dump, load
from csi.oci.archive.member import Member, MemberKind
from csi.oci.archive.points import AccessPoint
from csi.oci.archive.table import MemberTable


def table(*members: Member) -> MemberTable:
    made = MemberTable()
    for member in members:
        made.append(member)
    return made


MEMBERS = (
    Member("models/größe.bin", MemberKind.FILE, 512, 3000, "", True, 1_700_000_000),
    Member("models", MemberKind.DIRECTORY, 0, 0),
    Member("models/latest", MemberKind.SYMLINK, 0, 0, "größe.bin"),
)
POINTS = (AccessPoint(0, 10), AccessPoint(4500, 2000, 3, b"w" * 32768))
INDEX = LayerIndex(Access.POINTS, 5000, 9000, table(*MEMBERS), POINTS)


def test_an_index_comes_back_as_it_was() -> None:
    found = load(dump(INDEX), 5000)
    assert (found.access, found.encoded_bytes, found.decoded_bytes) == (Access.POINTS, 5000, 9000)
    assert list(found.members) == list(MEMBERS)
    assert [found.points[number] for number in range(len(found.points))] == list(POINTS)
    assert found.members == INDEX.members


@given(st.integers(0, 2**20), st.binary(min_size=1, max_size=4), st.integers(0, 2**20) | st.none())
def test_a_damaged_index_is_as_good_as_none(at: int, value: bytes, cut: int | None) -> None:
    good = dump(INDEX)
    data = bytearray(good)
    data[at % len(data) : at % len(data) + len(value)] = value
    if cut is not None:
        del data[cut % len(data) :]
    if bytes(data[: len(good)]) == good:
        return
    with pytest.raises(ContentError, match="layer index"):
        load(bytes(data), 5000)


@pytest.mark.parametrize(
    "index",
    [
        LayerIndex(Access.POINTS, 5000, 9000, MemberTable()),
        LayerIndex(Access.DIRECT, 5000, 5000, MemberTable(), (AccessPoint(0, 0),)),
        LayerIndex(Access.POINTS, 5000, 9000, MemberTable(), (AccessPoint(1, 0),)),
        LayerIndex(Access.POINTS, 5000, 9000, MemberTable(), (AccessPoint(0, 0), AccessPoint(0, 10))),
        LayerIndex(Access.POINTS, 5000, 9000, MemberTable(), (AccessPoint(0, 20), AccessPoint(5, 10))),
        LayerIndex(Access.POINTS, 5000, 9000, MemberTable(), (AccessPoint(0, 0), AccessPoint(9001, 10))),
        LayerIndex(Access.POINTS, 5000, 9000, MemberTable(), (AccessPoint(0, 5001),)),
        LayerIndex(Access.POINTS, 5000, 9000, MemberTable(), (AccessPoint(0, 0, 3),)),
        LayerIndex(Access.POINTS, 5000, 9000, MemberTable(), (AccessPoint(0, 1, 8),)),
        LayerIndex(Access.POINTS, 5000, 9000, MemberTable(), (AccessPoint(0, 1, 0, bytes(32769)),)),
        LayerIndex(Access.POINTS, 5000, 2**30, MemberTable(), (AccessPoint(0, 0),)),
        LayerIndex(Access.SPOOL, 5000, 3000, table(*MEMBERS)),
        LayerIndex(Access.SPOOL, 4999, 9000, table(*MEMBERS)),
    ],
)
def test_an_index_that_does_not_fit_its_layer_is_refused(index: LayerIndex) -> None:
    with pytest.raises(ContentError):
        load(dump(index), 5000)


def test_a_table_of_foreign_bytes_is_refused() -> None:
    with pytest.raises(ContentError, match="whole number"):
        MemberTable(bytes(35), b"")
    with pytest.raises(ContentError, match="damaged"):
        MemberTable(b"\xff" * 34, b"abc").check(10**9)
