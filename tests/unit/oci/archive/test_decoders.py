"""gzip and zstd layers: decoded as the tools decode them, entered in the middle, and refused when they are not right."""

from __future__ import annotations

import gzip as gzip_module
import io
import itertools
import random
import sys
import zlib
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csi.errors import ContentError, SizeMismatchError, UnsupportedModelError
from csi.oci.archive import gzip, points, zstd
from csi.oci.archive.points import AccessPoint, Decoder

if sys.version_info >= (3, 14):
    from compression import zstd as zstd_module
else:
    from backports import zstd as zstd_module


def weights(size: int, seed: int = 1) -> bytes:
    """Bytes that compress a little, as weights do, with runs that compress well and some that do not at all."""
    rng = random.Random(seed)
    parts = [rng.randbytes(50_000), bytes(rng.choices(range(64), k=150_000)), bytes(100_000)]
    return (b"".join(rng.sample(parts, 3)) * (size // 300_000 + 1))[:size]


def decode(decoder: Decoder, data: bytes, feeds: Sequence[int] = ()) -> bytes:
    out = bytearray()
    at = 0
    for length in feeds:
        decoder.feed(data[at : at + length], out.extend)
        at += length
    decoder.feed(memoryview(data)[at:], out.extend)
    decoder.finish()
    assert decoder.decoded_bytes == len(out)
    return bytes(out)


def read_all_units(decoder: Decoder, data: bytes, decode_unit: Callable[[points.Unit, bytes, str], bytearray]) -> bytes:
    units = [
        points.unit(decoder.points, number, decoder.decoded_bytes, len(data)) for number in range(len(decoder.points))
    ]
    return b"".join(decode_unit(unit, data[unit.start : unit.end], "x") for unit in units)


PLAIN = weights(13_000_000)
_FORMS: dict[str, tuple[type[gzip.GzipDecoder] | type[zstd.ZstdDecoder], Callable[..., bytearray], bytes]] = {
    "gzip": (gzip.GzipDecoder, gzip.decode_unit, gzip_module.compress(PLAIN, 6)),
    "gzip stored": (gzip.GzipDecoder, gzip.decode_unit, gzip_module.compress(PLAIN, 0)),
    "gzip members": (
        gzip.GzipDecoder,
        gzip.decode_unit,
        b"".join(gzip_module.compress(PLAIN[at : at + 700_001], 1) for at in range(0, len(PLAIN), 700_001)),
    ),
    "gzip padded": (gzip.GzipDecoder, gzip.decode_unit, gzip_module.compress(PLAIN, 1) + bytes(1000)),
    "zstd frames": (
        zstd.ZstdDecoder,
        zstd.decode_unit,
        b"".join(zstd_module.compress(PLAIN[at : at + 300_001]) for at in range(0, len(PLAIN), 300_001)),
    ),
    "zstd one frame": (zstd.ZstdDecoder, zstd.decode_unit, zstd_module.compress(PLAIN)),
}


@pytest.mark.parametrize("form", _FORMS)
def test_every_unit_gives_the_bytes_of_the_whole(form: str) -> None:
    decoder_class, decode_unit, data = _FORMS[form]
    decoder = decoder_class("layer")
    assert decode(decoder, data, [1, 2, 3, 100_000, 1]) == PLAIN
    assert decoder.points[0].decoded == 0
    assert read_all_units(decoder, data, decode_unit) == PLAIN
    if form.startswith("gzip"):
        assert max(b.decoded - a.decoded for a, b in itertools.pairwise(decoder.points)) < 5_000_000


def test_empty_members_and_frames_give_nothing() -> None:
    empty = gzip_module.compress(b"")
    decoder = gzip.GzipDecoder("x")
    data = empty + gzip_module.compress(b"abc") + empty + empty + gzip_module.compress(b"def") + empty
    assert decode(decoder, data) == b"abcdef"
    assert read_all_units(decoder, data, gzip.decode_unit) == b"abcdef"
    frames = zstd_module.compress(b"") + b"\x50\x2a\x4d\x18\x04\x00\x00\x00skip" + zstd_module.compress(b"abc")
    assert decode(zstd.ZstdDecoder("x"), frames) == b"abc"


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 9), st.lists(st.integers(1, 400_000), max_size=6))
def test_gzip_in_pieces_of_any_length(seed: int, level: int, feeds: list[int]) -> None:
    plain = weights(random.Random(seed).randrange(600_000), seed)
    assert decode(gzip.GzipDecoder("x"), gzip_module.compress(plain, level), feeds) == plain


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["gzip", "zstd"]),
    st.lists(st.tuples(st.integers(0, 2**20), st.binary(min_size=1, max_size=4)), max_size=3),
    st.integers(0, 2**20) | st.none(),
    st.binary(max_size=10),
)
def test_damaged_streams_give_our_errors_and_never_other_bytes(
    form: str, damage: list[tuple[int, bytes]], cut: int | None, tail: bytes
) -> None:
    plain = weights(40_000)
    good = gzip_module.compress(plain) if form == "gzip" else zstd_module.compress(plain)
    data = bytearray(good)
    for at, value in damage:
        data[at % len(data) : at % len(data) + len(value)] = value
    if cut is not None:
        del data[cut % len(data) :]
    data += tail
    decoder: Decoder = gzip.GzipDecoder("layer") if form == "gzip" else zstd.ZstdDecoder("layer")
    try:
        decode(decoder, bytes(data))
    except ContentError:
        return
    if form == "gzip":  # its checksum covers everything
        assert zlib.decompress(bytes(data), 31) == plain


def test_a_stream_cut_short_says_so() -> None:
    for decoder, data in (
        (gzip.GzipDecoder("layer 3"), gzip_module.compress(PLAIN[:9999])),
        (zstd.ZstdDecoder("layer 3"), zstd_module.compress(PLAIN[:9999])),
    ):
        with pytest.raises(SizeMismatchError, match=r"layer 3: .*ends too early"):
            decode(decoder, data[:-5])


def test_what_follows_a_gzip_stream_may_only_be_zeros() -> None:
    with pytest.raises(ContentError):
        decode(gzip.GzipDecoder("x"), gzip_module.compress(b"abc") + b"\0\0x")
    with pytest.raises(ContentError):
        decode(gzip.GzipDecoder("x"), gzip_module.compress(b"abc") + b"x" * 20)


def test_a_window_beyond_128_mib_is_refused() -> None:
    out = io.BytesIO()
    options: dict[int, int] = {
        zstd_module.CompressionParameter.window_log: 28,
        zstd_module.CompressionParameter.content_size_flag: 0,
    }
    with zstd_module.ZstdFile(out, "w", options=options) as file:
        file.write(bytes(2**20))
    with pytest.raises(ContentError, match="memory"):
        decode(zstd.ZstdDecoder("x"), out.getvalue())


def test_a_bomb_is_refused_while_it_unfolds() -> None:
    data = gzip_module.compress(bytes(2**30), 9)
    decoder = gzip.GzipDecoder("layer")
    with pytest.raises(UnsupportedModelError, match="expand"):
        decoder.feed(data, lambda piece: points.check_ratio(decoder.decoded_bytes, len(data), "layer"))
    assert decoder.decoded_bytes < 300 * 2**20


def test_a_unit_of_other_bytes_is_an_error() -> None:
    for decode_unit in (gzip.decode_unit, zstd.decode_unit):
        with pytest.raises(ContentError):
            decode_unit(points.Unit(AccessPoint(0, 0), 100, 0, 20), b"\xff" * 20, "x")
