"""The headers of a tar stream, read by hopping from one to the next; payloads are stepped over, never looked at.

`scan` does no I/O: it is a generator that asks for ranges and is sent their bytes. The same code so reads a layer
through small ranges of a registry, a stream that is being decompressed, and a file in a test. Every ask starts after
the one before it, so a stream that cannot go back will do.

Strict where programs disagree. What one reader takes for a payload and another for a header shows different files to a
scanner and to a loader, so it is refused, not interpreted. Names are not judged here: see `csi.oci.paths`.

Source: POSIX.1-2001 pax, "ustar Interchange Format" and "pax Header Block"; GNU tar manual, "Basic Tar Format"; the
special cases of Go's archive/tar, which image builders write with, and of the advisories on Python's tarfile.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from csi.errors import SizeMismatchError, UnsupportedModelError
from csi.oci.archive.member import Member, MemberKind
from csi.oci.archive.table import MemberTable

BLOCK_BYTES = 512
MAX_MEMBERS = 1_000_000
_MAX_TEXT_BYTES = 4096  # PATH_MAX, for names and link targets
_MAX_NAMES_BYTES = 512 * 1024 * 1024  # of all members together
_MAX_EXTENSION_BYTES = 1024 * 1024  # one pax header or long name; what Go's reader allows
_MAX_EXTENSIONS_BYTES = 2 * 1024 * 1024 * 1024  # of one archive, their headers included
_MAX_SIZE = 2**63 - 1
_MAX_OCTAL_SIZE = 0o77777777777
_MAX_MTIME_S = 2**40

_PAX_LENGTH = re.compile(rb"[1-9][0-9]{0,6} ")
_PAX_NUMBER = re.compile(r"[0-9]{1,19}")
_PAX_TIME = re.compile(r"-?[0-9]{1,19}(?:\.[0-9]*)?")
_OCTAL = re.compile(rb" *([0-7]*)[ \0]*")
_ZERO_BLOCK = bytes(BLOCK_BYTES)

_HEADER_ONLY = {
    b"1": MemberKind.HARDLINK,
    b"2": MemberKind.SYMLINK,
    b"3": MemberKind.SPECIAL,
    b"4": MemberKind.SPECIAL,
    b"5": MemberKind.DIRECTORY,
    b"6": MemberKind.SPECIAL,
}
_FILES = (b"0", b"\0", b"7")
_REFUSED = {
    b"S": "a GNU sparse file",
    b"M": "the continuation of a multi-volume archive",
    b"D": "a GNU incremental dump",
    b"V": "a GNU volume label",
    b"N": "an old GNU long name",
    b"X": "a Solaris extended header",
}
# What changes where a member's bytes are, or what it is called; said once and for one member, or refused.
_DECISIVE_KEYS = ("path", "linkpath", "size")


class Range(NamedTuple):
    """Bytes that are asked for."""

    offset: int
    length: int


@dataclass(slots=True)
class _Extension:
    """What headers before a member's own say of it."""

    path: str | None = None
    link_target: str | None = None
    size_bytes: int | None = None
    mtime_s: int | None = None
    from_pax: bool = False
    from_gnu: bool = False


Scan = Generator[Range, "bytes | memoryview | None", MemberTable]


def scan(what: str, table: MemberTable | None = None) -> Scan:
    """The members of a tar stream; `what` names the layer in error messages. They go into `table`, if there is one, as they
    are found.

    Send for each `Range` its bytes: fewer at the end of the stream, none when the stream ends exactly at its offset,
    None when it ended before it. Ranges are of at most 1 MiB, most of 512 bytes, with rising offsets.

    Memory is that of the table (34 bytes and its name for a member, at most a million of them), and a range. The steps
    are bounded by the limits on members and on extension headers.

    Raises: UnsupportedModelError (field `path` where there is a name) for an archive that is malformed, over a limit,
    or read differently by different programs; SizeMismatchError when the stream ends within it.
    """
    table = MemberTable() if table is None else table
    pending = _Extension()
    offset = names_bytes = extensions_bytes = 0
    while True:
        header = yield Range(offset, BLOCK_BYTES)
        if header is None:
            raise _ended(what, "the bytes of its last member", offset)
        if len(header) == 0 or header == _ZERO_BLOCK:
            break
        if len(header) < BLOCK_BYTES:
            raise _ended(what, "a header", offset)
        header = bytes(header)
        _check_sum(header, what, offset)
        kind = header[156:157]
        offset += BLOCK_BYTES
        if kind in (b"x", b"g", b"L", b"K"):
            size = _number(header[124:136], "size", what, offset)
            extensions_bytes += size + BLOCK_BYTES
            if size > _MAX_EXTENSION_BYTES or extensions_bytes > _MAX_EXTENSIONS_BYTES:
                raise _refused(
                    what, offset, f"has extended headers of more than {_MAX_EXTENSION_BYTES} bytes, or too many"
                )
            data = (yield Range(offset, size)) if size else b""
            if data is None or len(data) < size:
                raise _ended(what, "an extended header", offset)
            pending = _extended(kind, bytes(data), pending, what, offset)
            offset = _padded(offset + size, what)
            continue
        member, offset = _member(header, kind, pending, what, offset)
        pending = _Extension()
        names_bytes += len(member.path) + len(member.link_target)
        if len(table) >= MAX_MEMBERS:
            raise _refused(what, offset, f"has more than {MAX_MEMBERS} members")
        if names_bytes > _MAX_NAMES_BYTES:
            raise _refused(what, offset, f"has names of more than {_MAX_NAMES_BYTES} bytes together")
        table.append(member)
    if pending != _Extension():
        raise _ended(what, "the member that an extended header describes", offset)
    if len(header):
        second = yield Range(offset + BLOCK_BYTES, BLOCK_BYTES)
        if second and bytes(second) != bytes(len(second)):
            raise _refused(what, offset, "goes on after a lone zero block; some programs stop there and some do not")
    return table


def members_of(read: Callable[[int, int], bytes | memoryview], size_bytes: int, what: str) -> MemberTable:
    """Drive `scan` over something that can be read anywhere: `read(offset, length)`, never past `size_bytes`.

    Raises: what `scan` raises, and what `read` raises.
    """
    return drive(
        scan(what),
        lambda offset, length: None if offset > size_bytes else read(offset, min(length, size_bytes - offset)),
    )


def drive(scanner: Scan, answer: Callable[[int, int], bytes | memoryview | None]) -> MemberTable:
    """Answer every ask of a scan. Raises: what `scan` and `answer` raise."""
    try:
        asked = next(scanner)
        while True:
            asked = scanner.send(answer(*asked))
    except StopIteration as end:
        found: MemberTable = end.value
        return found


def _member(header: bytes, kind: bytes, pending: _Extension, what: str, offset: int) -> tuple[Member, int]:
    """The member, and where the next header is. `offset` is that of its payload."""
    path = pending.path if pending.path is not None else _name(header, what, offset)
    link_target = pending.link_target if pending.link_target is not None else _text(header[157:257], what, offset)
    in_header = _number(header[124:136], "size", what, offset)
    size = in_header if pending.size_bytes is None else pending.size_bytes
    # A writer leaves the field empty, or cut, when the size does not fit it.
    if size != in_header and in_header != 0 and size <= _MAX_OCTAL_SIZE:
        raise _refused(
            what, offset, f"says in its pax header that it has {size} bytes, and in its own {in_header}", path
        )
    if len(path.encode()) > _MAX_TEXT_BYTES or len(link_target.encode()) > _MAX_TEXT_BYTES:
        raise _refused(what, offset, f"has a name of more than {_MAX_TEXT_BYTES} bytes", path)
    mtime_s = pending.mtime_s if pending.mtime_s is not None else _mtime(header[136:148])
    # The oldest form has no type for directories. Some programs look at the whole name for the slash, some at the field.
    is_old_directory = kind == b"\0" and path.endswith("/")
    if kind == b"\0" and header[:100].rstrip(b"\0").endswith(b"/") != is_old_directory:
        raise _refused(what, offset, "is a directory to some programs and a file to others", path)
    if kind in _FILES and not is_old_directory:
        executable = bool(_lenient_octal(header[100:108]) & 0o111)
        member = Member(path, MemberKind.FILE, offset, size, "", executable, mtime_s)
        return member, _padded(offset + size, what)
    member_kind = _HEADER_ONLY.get(b"5" if kind == b"\0" else kind)
    if member_kind is None:
        shown = _REFUSED.get(kind, f"of the unknown type {kind!r}")
        raise _refused(
            what, offset, f"is {shown}, which is not mounted; pack the model with GNU tar or a ModelPack tool", path
        )
    if size:
        raise _refused(
            what, offset, f"is a {member_kind} with {size} bytes of its own; programs disagree on what follows", path
        )
    if member_kind not in (MemberKind.SYMLINK, MemberKind.HARDLINK):
        link_target = ""
    return Member(path, member_kind, 0, 0, link_target, False, mtime_s), offset


def _extended(kind: bytes, data: bytes, pending: _Extension, what: str, offset: int) -> _Extension:
    if kind in (b"L", b"K"):
        text = _text(data, what, offset)
        if pending.from_pax or (pending.path if kind == b"L" else pending.link_target) is not None:
            raise _refused(what, offset, "has two extended headers for one member")
        if kind == b"L":
            return replace(pending, path=text, from_gnu=True)
        return replace(pending, link_target=text, from_gnu=True)
    records = _pax_records(data, what, offset)
    if sparse := next((key for key in records if key.startswith("GNU.sparse")), None):
        raise _refused(
            what, offset, f"has a GNU sparse file ({sparse}), which is not mounted; pack it without --sparse"
        )
    if kind == b"g":
        if pending != _Extension():
            raise _refused(what, offset, "has a global header between a member and its extended header")
        if found := [key for key in _DECISIVE_KEYS if key in records]:
            raise _refused(what, offset, f"gives every member the same {found[0]} in a global header")
        return pending
    if pending.from_pax or pending.from_gnu:
        raise _refused(what, offset, "has two extended headers for one member")
    size = records.get("size")
    if size is not None and not (_PAX_NUMBER.fullmatch(size) and int(size) <= _MAX_SIZE):
        raise _refused(what, offset, f"has a pax size of {size[:40]!r}")
    return _Extension(
        path=records.get("path"),
        link_target=records.get("linkpath"),
        size_bytes=None if size is None else int(size),
        mtime_s=_pax_time(records.get("mtime")),
        from_pax=True,
    )


def _pax_records(data: bytes, what: str, offset: int) -> Mapping[str, str]:
    """`"30 mtime=1350244992.023960108\\n"` and so on; the length counts itself."""
    records: dict[str, str] = {}
    at = 0
    while at < len(data):
        found = _PAX_LENGTH.match(data, at)
        if found is None:
            if not data[at:].strip(b"\0"):
                break  # padding that a few writers count as content
            raise _refused(what, offset, "has a malformed pax header")
        length = int(found.group())
        record = data[found.end() : at + length]
        key, separator, value = record[:-1].partition(b"=")
        if length <= found.end() - at or at + length > len(data) or record[-1:] != b"\n" or not separator or not key:
            raise _refused(what, offset, "has a malformed pax header")
        at += length
        name = _text_or_none(key)
        if name is None or (name not in _DECISIVE_KEYS and name != "mtime" and not name.startswith("GNU.sparse")):
            continue
        text = _text_or_none(value)
        if text is None or "\0" in text:
            raise _refused(what, offset, f"has a pax {name} that is not UTF-8 text")
        if name in records:
            raise _refused(what, offset, f"has a pax header that says {name} twice")
        records[name] = text
    return {name: text for name, text in records.items() if text}


def _pax_time(text: str | None) -> int | None:
    """Whole seconds; None for what is no time, as a time decides nothing."""
    if text is None or not _PAX_TIME.fullmatch(text):
        return None
    return _clamped(int(text.partition(".")[0]))


def _name(header: bytes, what: str, offset: int) -> str:
    name = _text(header[:100], what, offset)
    if header[257:265] == b"ustar\x0000" and (prefix := _text(header[345:500], what, offset)):
        return f"{prefix}/{name}"
    return name


def _text(field: bytes, what: str, offset: int) -> str:
    text = _text_or_none(field.partition(b"\0")[0])
    if text is None:
        raise _refused(what, offset, "has a name that is not UTF-8 text")
    return text


def _text_or_none(field: bytes) -> str | None:
    try:
        return field.decode()
    except UnicodeDecodeError:
        return None


def _number(field: bytes, name: str, what: str, offset: int) -> int:
    """Octal digits, or GNU's base 256 with the top bit set. Raises: UnsupportedModelError, also for a negative one."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") & ~(0x80 << 8 * (len(field) - 1))
        if field[0] & 0x40 or value > _MAX_SIZE:
            raise _refused(what, offset, f"has a {name} that is negative or larger than 2^63-1")
        return value
    found = _OCTAL.fullmatch(field)
    if found is None:
        raise _refused(what, offset, f"has a {name} that is no number: {field!r}")
    return int(found.group(1) or b"0", 8)


def _lenient_octal(field: bytes) -> int:
    found = _OCTAL.fullmatch(field)
    return int(found.group(1) or b"0", 8) if found else 0


def _mtime(field: bytes) -> int:
    if field[0] & 0x80:
        return _clamped(
            int.from_bytes(field, "big", signed=True) if field[0] & 0x40 else int.from_bytes(field[1:], "big")
        )
    return _clamped(_lenient_octal(field))


def _clamped(mtime_s: int) -> int:
    return mtime_s if 0 <= mtime_s <= _MAX_MTIME_S else 0


def _check_sum(header: bytes, what: str, offset: int) -> None:
    found = _OCTAL.fullmatch(header[148:156])
    rest = header[:148] + header[156:]
    unsigned = 256 + sum(rest)  # the field counts as eight spaces
    told = int(found.group(1) or b"0", 8) if found else -1
    # Some old writers summed signed characters.
    if told != unsigned and told != unsigned - 256 * sum(byte > 127 for byte in rest):
        raise _refused(what, offset, "is no tar archive there: the header's checksum is wrong")


def _padded(offset: int, what: str) -> int:
    end = -(-offset // BLOCK_BYTES) * BLOCK_BYTES
    if end > _MAX_SIZE:
        raise _refused(what, offset, "has a member that ends beyond 2^63-1 bytes")
    return end


def _refused(what: str, offset: int, problem: str, path: str | None = None) -> UnsupportedModelError:
    member = f" (member {path[:200]!r})" if path is not None else ""
    return UnsupportedModelError(
        f"{what}: at byte {offset} of the archive{member}: it {problem}", path=path[:200] if path is not None else None
    )


def _ended(what: str, within: str, offset: int) -> SizeMismatchError:
    return SizeMismatchError(
        f"{what}: the archive ends within {within} (near byte {offset}); it was cut short when it was packed or pushed: "
        "push the model again",
        subject=what,
    )
