"""Members in a compact form: a layer may have a million of them, and a Python object each would be half a gigabyte."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import overload

from csi.errors import ContentError
from csi.oci.archive.member import Member, MemberKind

_RECORD = struct.Struct("<BBHHIqqq")  # kind executable path_len link_len names_offset offset size mtime
_KINDS = tuple(MemberKind)
_CODES = {kind: code for code, kind in enumerate(_KINDS)}
RECORD_BYTES = _RECORD.size
"""34 bytes a member, besides its name and link target."""


class MemberTable(Sequence[Member]):
    """The members of one layer in archive order. A `Member` is made when it is asked for, and not kept.

    Built with `append`; or over the two byte strings of `sections`, which then must not change.
    """

    def __init__(self, records: bytes | bytearray | memoryview = b"", names: bytes | bytearray | memoryview = b""):
        """Raises: ContentError when the sections do not fit together."""
        count, rest = divmod(len(records), _RECORD.size)
        if rest:
            raise ContentError(f"member table: {len(records)} bytes are not a whole number of records")
        self._records = records or bytearray()
        self._names = names or bytearray()
        self._count = count

    def append(self, member: Member) -> None:
        """`path` and `link_target` together: fewer than 65 536 bytes each, 4 GiB over all members."""
        assert isinstance(self._records, bytearray)
        assert isinstance(self._names, bytearray)
        path, link = member.path.encode(), member.link_target.encode()
        self._records += _RECORD.pack(
            _CODES[member.kind],
            member.executable,
            len(path),
            len(link),
            len(self._names),
            member.offset,
            member.size_bytes,
            member.mtime_s,
        )
        self._names += path
        self._names += link
        self._count += 1

    def sections(self) -> tuple[bytes | bytearray | memoryview, bytes | bytearray | memoryview]:
        """Records and names, for the constructor of another process."""
        return self._records, self._names

    def check(self, decoded_bytes: int) -> None:
        """Every member can be made, and lies within a tar stream of that many bytes. Raises: ContentError."""
        try:
            for member in self:
                if not 0 <= member.offset <= member.offset + member.size_bytes <= decoded_bytes:
                    raise ContentError(f"member table: {member.path[:200]!r} lies outside its layer")
        except ValueError as exc:  # names that are not UTF-8
            raise ContentError("member table: a record is damaged") from exc

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, position: int) -> Member: ...
    @overload
    def __getitem__(self, position: slice) -> Sequence[Member]: ...
    def __getitem__(self, position: int | slice) -> Member | Sequence[Member]:
        if isinstance(position, slice):
            return [self[index] for index in range(*position.indices(self._count))]
        if position < 0:
            position += self._count
        if not 0 <= position < self._count:
            raise IndexError(position)
        kind, executable, path_length, link_length, start, offset, size, mtime = _RECORD.unpack_from(
            self._records, position * _RECORD.size
        )
        middle, end = start + path_length, start + path_length + link_length
        if end > len(self._names) or kind >= len(_KINDS):
            raise ContentError("member table: a record is damaged")
        return Member(
            path=bytes(self._names[start:middle]).decode(),
            kind=_KINDS[kind],
            offset=offset,
            size_bytes=size,
            link_target=bytes(self._names[middle:end]).decode(),
            executable=bool(executable),
            mtime_s=mtime,
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MemberTable):
            return NotImplemented
        return bytes(self._records) == bytes(other._records) and bytes(self._names) == bytes(other._names)

    __hash__ = None  # type: ignore[assignment]
