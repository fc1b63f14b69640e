"""Places in a compressed layer where decoding can start, and what lies between two of them.

Decoding is the work of `csi.oci.archive.gzip` and `zstd`; both give and take these values. Each decoder is fed once from
the start to find the points; later reads decode only the units they touch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from csi.errors import ContentError, UnsupportedModelError

UNIT_BYTES = 4 * 1024 * 1024
"""Decoded bytes from point to point, where the format leaves the choice: the most a small read costs."""
MAX_UNIT_BYTES = 16 * 1024 * 1024
"""Units are decoded whole and kept in memory, so a format that cannot be entered for longer is spooled."""
MAX_RATIO = 100
_FREE_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class AccessPoint:
    """Decoding can start at byte `encoded` of the blob and gives the bytes from `decoded` on.

    gzip: the top `bits` bits of the byte before `encoded` belong to what follows, and `window` is the text that back
    references reach into.
    """

    decoded: int
    encoded: int
    bits: int = 0
    window: bytes = b""


@dataclass(frozen=True, slots=True)
class Unit:
    """The smallest piece that is decoded: `length` bytes from `point`, out of the blob's bytes `start` to `end`."""

    point: AccessPoint
    length: int
    start: int
    end: int


class PointTable(Protocol):
    """The points of one layer, in order; the first is at decoded byte 0 unless the layer is empty."""

    def __len__(self) -> int: ...
    def __getitem__(self, position: int, /) -> AccessPoint: ...


class Decoder(Protocol):
    """One pass over a compressed layer from its start."""

    points: list[AccessPoint]
    decoded_bytes: int
    """How much came out so far."""

    def feed(self, data: bytes | memoryview, sink: Sink) -> None:
        """Decode the next bytes of the layer. `sink` gets what comes out; each view is good until the next.

        Raises: ContentError for bytes that are not of that format.
        """

    def finish(self) -> None:
        """The layer has ended. Raises: SizeMismatchError when it should not have."""


class Sink(Protocol):
    """Takes decoded bytes in order."""

    def __call__(self, data: memoryview, /) -> None: ...


def unit_at(points: PointTable | Sequence[AccessPoint], offset: int) -> int:
    """The number of the unit that decoded byte `offset` lies in."""
    low, high = 0, len(points)
    while low < high:
        middle = (low + high) // 2
        if points[middle].decoded <= offset:
            low = middle + 1
        else:
            high = middle
    return low - 1


def unit(points: PointTable | Sequence[AccessPoint], number: int, decoded_bytes: int, encoded_bytes: int) -> Unit:
    """Unit `number`. Its bytes end where the next one's begin, the byte they share included."""
    point = points[number]
    after = points[number + 1] if number + 1 < len(points) else AccessPoint(decoded_bytes, encoded_bytes)
    return Unit(point, after.decoded - point.decoded, point.encoded - (1 if point.bits else 0), after.encoded)


def check_ratio(decoded_bytes: int, encoded_bytes: int, what: str) -> None:
    """Raises: UnsupportedModelError when a layer of `encoded_bytes` has grown beyond what a model's can."""
    limit = max(_FREE_BYTES, MAX_RATIO * encoded_bytes)
    if decoded_bytes > limit:
        raise UnsupportedModelError(
            f"{what}: its {encoded_bytes} bytes expand to more than {limit}, which no model does; push it uncompressed if "
            "that is what it is"
        )


def corrupt(what: str, problem: str) -> ContentError:
    """The error for bytes that cannot be decoded."""
    return ContentError(
        f"{what}: cannot be decompressed: {problem}; it was damaged before it was pushed: push it again", subject=what
    )
