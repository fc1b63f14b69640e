"""What was found out about one archive layer, as bytes: its members, and where its decoding can start.

Kept beside the layer's blob in the cache, so that the next worker, and the next mount of the model on this node, need not
read the layer again. Everything is read in place: a million members or a hundred thousand points cost page cache only.

    header   magic "MMLAYER", version, how the layer is read, sizes and counts, sha256 of everything else in the file
    members  see `csi.oci.archive.table`
    points   32 bytes each
    windows  what gzip needs at each point, up to 32 KiB each

All numbers little endian. A file of another version, or one that does not check out, is as good as none.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from csi.errors import ContentError
from csi.oci.archive.points import MAX_UNIT_BYTES, AccessPoint, PointTable
from csi.oci.archive.table import RECORD_BYTES, MemberTable

VERSION = 2
_MAGIC = b"MMLAYER"
_HEADER = struct.Struct("<7sBBQQQQQQ32s")  # magic version access encoded decoded members names points windows sha256
_POINT = struct.Struct("<QQQIB3x")  # decoded encoded window_offset window_len bits
_WINDOW_BYTES = 32768
_SHA256_BYTES = 32


class Access(IntEnum):
    """How bytes of the layer are reached."""

    DIRECT = 0
    """They lie in the blob as they are (tar)."""
    POINTS = 1
    """Decoded from the nearest point before them."""
    SPOOL = 2
    """Decoded once into a file of its own."""
    FILE = 3
    """It is a file, although it might have been a packed directory: `members` has the first member that was found in it, if
    there was one.
    """


@dataclass(frozen=True, slots=True)
class LayerIndex:
    """`encoded_bytes` is the blob's size, `decoded_bytes` that of the tar stream. `points` only with `POINTS`."""

    access: Access
    encoded_bytes: int
    decoded_bytes: int
    members: MemberTable
    points: Sequence[AccessPoint] | PointTable = ()


class _StoredPoints:
    """Points read from the file when they are asked for."""

    def __init__(self, records: memoryview, windows: memoryview) -> None:
        self._records, self._windows = records, windows

    def __len__(self) -> int:
        return len(self._records) // _POINT.size

    def __getitem__(self, position: int) -> AccessPoint:
        if not 0 <= position < len(self):
            raise IndexError(position)
        decoded, encoded, start, length, bits = _POINT.unpack_from(self._records, position * _POINT.size)
        return AccessPoint(decoded, encoded, bits, bytes(self._windows[start : start + length]))


def dump(index: LayerIndex) -> bytes:
    """The bytes of an index file."""
    records, names = index.members.sections()
    points, windows = bytearray(), bytearray()
    for position in range(len(index.points)):
        point = index.points[position]
        points += _POINT.pack(point.decoded, point.encoded, len(windows), len(point.window), point.bits)
        windows += point.window
    body = b"".join((records, names, points, windows))
    header = _HEADER.pack(
        _MAGIC,
        VERSION,
        index.access,
        index.encoded_bytes,
        index.decoded_bytes,
        len(index.members),
        len(names),
        len(index.points),
        len(windows),
        bytes(_SHA256_BYTES),
    )[:-_SHA256_BYTES]
    return header + _digest(header, body) + body


def load(data: bytes | memoryview, encoded_bytes: int) -> LayerIndex:
    """The index of a layer of `encoded_bytes`; `data` must not change while it is used.

    Raises: ContentError for another version, a damaged or a foreign file, and for one that speaks of bytes the layer does
    not have.
    """
    view = memoryview(data).cast("B")
    try:
        magic, version, access, encoded, decoded, members, names, points, windows, digest = _HEADER.unpack_from(view)
        known_access = Access(access)
    except (struct.error, ValueError) as exc:
        raise ContentError("layer index: damaged") from exc
    if magic != _MAGIC or version != VERSION:
        raise ContentError(f"layer index: not one of version {VERSION}")
    sizes = (members * RECORD_BYTES, names, points * _POINT.size, windows)
    body = view[_HEADER.size :]
    right = len(body) == sum(sizes) and _digest(view[: _HEADER.size - _SHA256_BYTES], body) == digest
    if encoded != encoded_bytes or not right:
        raise ContentError("layer index: damaged, or of another layer")
    parts, at = [], 0
    for size in sizes:
        parts.append(body[at : at + size])
        at += size
    table = MemberTable(parts[0], parts[1])
    table.check(decoded)
    stored = _StoredPoints(parts[2], parts[3])
    _check_points(stored, known_access, encoded, decoded)
    return LayerIndex(known_access, encoded, decoded, table, stored)


def _digest(header: bytes | memoryview, body: bytes | memoryview) -> bytes:
    digest = hashlib.sha256(header)
    digest.update(body)
    return digest.digest()


def _check_points(points: _StoredPoints, access: Access, encoded_bytes: int, decoded_bytes: int) -> None:
    if (access is Access.POINTS and decoded_bytes > 0) != (len(points) > 0):
        raise ContentError("layer index: points where there should be none, or none where there should be")
    before = AccessPoint(0, 0)
    for position in range(len(points)):
        point = points[position]
        fits = (
            before.encoded <= point.encoded <= encoded_bytes
            and (before.decoded < point.decoded if position else point.decoded == 0)
            and point.bits < 8
            and point.encoded >= bool(point.bits)
            and len(point.window) <= _WINDOW_BYTES
        )
        if not fits or point.decoded - before.decoded > MAX_UNIT_BYTES:
            raise ContentError(f"layer index: point {position} is out of order")
        before = point
    if len(points) and not 0 <= decoded_bytes - before.decoded <= MAX_UNIT_BYTES:
        raise ContentError("layer index: its last point is out of order")
