"""The tar header reader: what Python's `tarfile` sees in well-formed archives, and nothing but our errors elsewhere."""

from __future__ import annotations

import io
import itertools
import tarfile
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csi.errors import ModelMountError, SizeMismatchError, UnsupportedModelError
from csi.oci.archive import tar
from csi.oci.archive.member import Member, MemberKind
from csi.oci.archive.table import MemberTable

KINDS = {
    tarfile.REGTYPE: MemberKind.FILE,
    tarfile.CONTTYPE: MemberKind.FILE,
    tarfile.DIRTYPE: MemberKind.DIRECTORY,
    tarfile.SYMTYPE: MemberKind.SYMLINK,
    tarfile.LNKTYPE: MemberKind.HARDLINK,
    tarfile.FIFOTYPE: MemberKind.SPECIAL,
    tarfile.CHRTYPE: MemberKind.SPECIAL,
    tarfile.BLKTYPE: MemberKind.SPECIAL,
}
_segment = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1, max_size=40)
_names = st.lists(_segment, min_size=1, max_size=8).map("/".join)


@st.composite
def infos(draw: st.DrawFn) -> tarfile.TarInfo:
    info = tarfile.TarInfo(draw(_names))
    info.type = draw(st.sampled_from(list(KINDS)))
    info.size = draw(st.integers(0, 2000)) if KINDS[info.type] is MemberKind.FILE else 0
    info.mode = draw(st.integers(0, 0o7777))
    info.mtime = draw(st.integers(0, 2**33) | st.floats(0, 2**33))
    if info.type in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        info.linkname = draw(_names)
    return info


def pack(members: list[tarfile.TarInfo], archive_format: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=archive_format) as archive:
        for info in members:
            archive.addfile(info, io.BytesIO(b"\xa5" * info.size) if info.size else None)
    return out.getvalue()


def read(data: bytes, on_ask: Callable[[int, int], None] = lambda offset, length: None) -> MemberTable:
    def answer(offset: int, length: int) -> bytes:
        on_ask(offset, length)
        return data[offset : offset + length]

    return tar.members_of(answer, len(data), "layers[0]")


def outcome(
    data: bytes, on_ask: Callable[[int, int], None] = lambda offset, length: None
) -> MemberTable | ModelMountError:
    try:
        return read(data, on_ask)
    except (UnsupportedModelError, SizeMismatchError) as error:
        return error


def one(name: str = "a", size: int = 0, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def seal(header: bytearray) -> bytes:
    """With the checksum that fits."""
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def changed(info: tarfile.TarInfo, at: int, value: bytes, archive_format: int = tarfile.GNU_FORMAT) -> bytes:
    data = bytearray(pack([info], archive_format))
    data[at : at + len(value)] = value
    return seal(data[:512]) + bytes(data[512:])


def pax(records: bytes, kind: bytes = b"x", of: tarfile.TarInfo | None = None) -> bytes:
    header = bytearray(one("PaxHeaders/a", len(records)).tobuf(tarfile.USTAR_FORMAT))
    header[156:157] = kind
    return seal(header) + records.ljust(-(-len(records) // 512) * 512, b"\0") + pack([of or one("a", 3)])


@settings(max_examples=300)
@given(st.lists(infos(), max_size=8), st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
def test_well_formed_archives_are_read_as_tarfile_reads_them(
    members: list[tarfile.TarInfo], archive_format: int
) -> None:
    data = pack(members, archive_format)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        expected = [
            Member(
                path=info.name,
                kind=KINDS[info.type],
                offset=info.offset_data if KINDS[info.type] is MemberKind.FILE else 0,
                size_bytes=info.size if KINDS[info.type] is MemberKind.FILE else 0,
                link_target=info.linkname,
                executable=KINDS[info.type] is MemberKind.FILE and bool(info.mode & 0o111),
                mtime_s=int(info.mtime),
            )
            for info in archive.getmembers()
        ]
    found = [
        replace(member, path=member.path.rstrip("/")) if member.kind is MemberKind.DIRECTORY else member
        for member in read(data)
    ]
    assert found == expected


@settings(max_examples=600)
@given(
    st.lists(infos(), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 2**20), st.binary(min_size=1, max_size=12)), max_size=4),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
    st.integers(0, 2**20) | st.none(),
    st.booleans(),
)
def test_damaged_archives_give_our_errors_and_end(
    members: list[tarfile.TarInfo],
    damage: list[tuple[int, bytes]],
    archive_format: int,
    cut: int | None,
    reseal: bool,
) -> None:
    data = bytearray(pack(members, archive_format))
    for at, value in damage:
        at %= len(data)
        data[at : at + len(value)] = value
    if reseal:
        for at in range(0, len(data), 512):
            if any(data[at : at + 512]):
                data[at : at + 512] = seal(data[at : at + 512])
    if cut is not None:
        del data[cut % len(data) :]
    asked: list[int] = []
    found = outcome(bytes(data), lambda offset, length: asked.append(offset))
    if isinstance(found, ModelMountError):
        assert str(found).isprintable()
        assert len(str(found)) < 1500
    else:
        found.check(len(data))
    assert all(before < after for before, after in itertools.pairwise(asked))
    assert len(asked) <= len(data) // 512 + 2


@settings(max_examples=200)
@given(st.binary(max_size=2048))
def test_any_bytes_give_members_or_our_errors(data: bytes) -> None:
    found = outcome(data)
    if isinstance(found, MemberTable):
        found.check(len(data))


def test_payloads_are_stepped_over() -> None:
    asked: list[tuple[int, int]] = []
    table = read(pack([one("a", 5_000_000), one("b", 7)]), lambda offset, length: asked.append((offset, length)))
    assert [(member.path, member.offset, member.size_bytes) for member in table] == [
        ("a", 512, 5_000_000),
        ("b", 5_001_216, 7),
    ]
    assert asked == [(0, 512), (5_000_704, 512), (5_001_728, 512), (5_002_240, 512)]


def test_a_member_larger_than_8_gib_is_found_by_pax_and_by_base_256() -> None:
    huge = one("weights.safetensors", 9 * 2**30)
    size = huge.size + 2048
    for archive_format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        header = huge.tobuf(archive_format)
        (member,) = tar.members_of(lambda at, n, h=header: h[at : at + n] or bytes(n), len(header) + size, "x")  # type: ignore[misc]
        assert (member.offset, member.size_bytes) == (len(header), huge.size)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (changed(one("a"), 156, b"S"), "GNU sparse"),
        (changed(one("a"), 156, b"M"), "multi-volume"),
        (changed(one("a"), 156, b"Z"), "unknown type"),
        (changed(one("a"), 124, b"\xff" * 12), "negative or larger"),
        (changed(one("a"), 124, b"\x80" + b"\x7f" * 11), "negative or larger"),
        (changed(one("a"), 124, b"12x4567890\0 "), "no number"),
        (changed(one("a"), 124, b"-0000000001\0"), "no number"),
        (changed(one("a", type=tarfile.SYMTYPE, linkname="b"), 124, b"00000001000\0"), "programs disagree"),
        (changed(one("a", type=tarfile.LNKTYPE, linkname="b"), 124, b"00000001000\0"), "programs disagree"),
        (changed(one("a"), 0, b"\xff\xfe"), "not UTF-8"),
        (pack([one("n" * 99 + "/b", type=tarfile.AREGTYPE)], tarfile.GNU_FORMAT), "directory to some programs"),
        (b"hello" * 200, "checksum"),
        (pax(b"10 size=4\n"), "says in its pax header"),
        (pax(b"11 size=-4\n"), "pax size"),
        (pax(b"29 size=99999999999999999999\n"), "pax size"),
        (pax(b"10 path=b\n10 path=c\n"), "path twice"),
        (pax(b"9999 path=b\n"), "malformed pax"),
        (pax(b"3 path=b\n"), "malformed pax"),
        (pax(b"10 path=\xff\n"), "not UTF-8"),
        (pax(b"22 GNU.sparse.major=1\n"), "GNU sparse"),
        (pax(b"10 path=b\n", b"g"), "global header"),
        (pax(b"10 path=b\n", of=one("x" * 150)), "two extended headers"),
        (pack([one("a")])[:512] + bytes(512) + pack([one("b")]), "lone zero block"),
        (pack([one("n" * 5000)]), "more than 4096"),
    ],
)  # fmt: skip
def test_what_programs_read_differently_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(UnsupportedModelError, match=says):
        read(data)


@pytest.mark.parametrize("length", [100, 512, 600, 1024 + 100])
def test_an_archive_cut_short_says_so(length: int) -> None:
    with pytest.raises(SizeMismatchError, match="cut short"):
        read(pack([one("a", 700), one("b" * 200, 700)])[:length])


def test_an_archive_without_an_end_mark_is_whole_when_it_ends_after_a_member() -> None:
    assert len(read(pack([one("a", 700)])[: 512 + 1024])) == 1


def test_an_endless_row_of_extended_headers_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar, "_MAX_EXTENSIONS_BYTES", 100_000)
    long_name = pack([one("n" * 3000)], tarfile.GNU_FORMAT)[: 512 + 3072]
    with pytest.raises(UnsupportedModelError, match="two extended headers"):
        tar.members_of(lambda at, n: (long_name * 2)[at % len(long_name) :][:n], 2**60, "x")
    empty_global = pax(b"", b"g")[:512]
    with pytest.raises(UnsupportedModelError, match="too many"):
        tar.members_of(lambda at, n: empty_global[:n], 2**60, "x")


def test_too_many_members_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar, "MAX_MEMBERS", 3)
    read(pack([one(str(number)) for number in range(3)]))
    with pytest.raises(UnsupportedModelError, match="more than 3 members"):
        read(pack([one(str(number)) for number in range(4)]))


def test_a_directory_of_the_oldest_form_is_a_directory() -> None:
    header = bytearray(one("models").tobuf(tarfile.GNU_FORMAT))
    header[:7], header[156:157], header[257:] = b"models/", b"\0", bytes(255)
    (member,) = read(seal(header) + bytes(1024))
    assert (member.kind, member.path) == (MemberKind.DIRECTORY, "models/")
