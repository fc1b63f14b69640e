"""Decodes gzip with places to start in the middle, by zlib itself.

Python's `zlib` module cannot start within a byte nor say where a deflate block ends, so this calls the library
(`inflatePrime`, `inflateGetDictionary`, `Z_BLOCK`) through ctypes, which lets other threads run meanwhile. Why not one of
the packages that index gzip: docs/adr has the measurements.

Source: zlib.h, and examples/zran.c of zlib for the method; RFC 1952 for members.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from typing import Any

from csi.errors import SizeMismatchError
from csi.oci.archive.points import UNIT_BYTES, AccessPoint, Sink, Unit, corrupt

_WINDOW_BYTES = 32768
_INPUT_BYTES = 256 * 1024
_OUTPUT_BYTES = 256 * 1024
_GZIP, _RAW = 15 + 16, -15
_Z_OK, _Z_STREAM_END, _Z_BUF_ERROR, _Z_MEM_ERROR = 0, 1, -5, -4
_Z_NO_FLUSH, _Z_BLOCK = 0, 5


class _ZStream(ctypes.Structure):
    _fields_ = (
        ("next_in", ctypes.c_void_p),
        ("avail_in", ctypes.c_uint),
        ("total_in", ctypes.c_ulong),
        ("next_out", ctypes.c_void_p),
        ("avail_out", ctypes.c_uint),
        ("total_out", ctypes.c_ulong),
        ("msg", ctypes.c_char_p),
        ("state", ctypes.c_void_p),
        ("zalloc", ctypes.c_void_p),
        ("zfree", ctypes.c_void_p),
        ("opaque", ctypes.c_void_p),
        ("data_type", ctypes.c_int),
        ("adler", ctypes.c_ulong),
        ("reserved", ctypes.c_ulong),
    )


def _load() -> Any:
    """zlib, which every Python that has `zlib` is linked with. Loaded on import, before any jail closes."""
    library = ctypes.CDLL(ctypes.util.find_library("z") or "libz.so.1")
    stream = ctypes.POINTER(_ZStream)
    library.zlibVersion.restype = ctypes.c_char_p
    library.inflateInit2_.argtypes = (stream, ctypes.c_int, ctypes.c_char_p, ctypes.c_int)
    library.inflate.argtypes = (stream, ctypes.c_int)
    library.inflateReset.argtypes = (stream,)
    library.inflateEnd.argtypes = (stream,)
    library.inflatePrime.argtypes = (stream, ctypes.c_int, ctypes.c_int)
    library.inflateSetDictionary.argtypes = (stream, ctypes.c_char_p, ctypes.c_uint)
    library.inflateGetDictionary.argtypes = (stream, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint))
    return library


_zlib = _load()


class _Inflate:
    """One z_stream. Its buffers must outlive each call, so they are kept here."""

    def __init__(self, window_bits: int) -> None:
        self.stream = _ZStream()
        code = _zlib.inflateInit2_(self.stream, window_bits, _zlib.zlibVersion(), ctypes.sizeof(_ZStream))
        if code != _Z_OK:
            raise MemoryError("zlib: cannot start decompressing")

    def __del__(self) -> None:
        _zlib.inflateEnd(self.stream)

    def message(self) -> str:
        return (self.stream.msg or b"the data is not gzip").decode("ascii", "replace")


class GzipDecoder:
    """See `Decoder`. Members one after another are one stream, as gzip(1) has it; zeros may follow, nothing else."""

    def __init__(self, what: str) -> None:
        """`what` names the layer in error messages."""
        self.points: list[AccessPoint] = []
        self.decoded_bytes = 0
        self._what = what
        self._zlib = _Inflate(_GZIP)
        self._input = (ctypes.c_ubyte * _INPUT_BYTES)()
        self._output = (ctypes.c_ubyte * _OUTPUT_BYTES)()
        self._view = memoryview(self._output).cast("B")
        self._fed = 0
        self._in_member = False
        self._padding = False

    def feed(self, data: bytes | memoryview, sink: Sink) -> None:
        """See `Decoder.feed`."""
        view = memoryview(data)
        for start in range(0, len(view), _INPUT_BYTES):
            piece = view[start : start + _INPUT_BYTES]
            memoryview(self._input).cast("B")[: len(piece)] = piece
            self._fed += len(piece)
            stream = self._zlib.stream
            stream.next_in, stream.avail_in = ctypes.addressof(self._input), len(piece)
            self._run(sink)

    def finish(self) -> None:
        """See `Decoder.finish`."""
        if self._in_member or not self.points:
            raise SizeMismatchError(
                f"{self._what}: its gzip stream ends too early; it was cut short when it was packed or pushed: push it again",
                subject=self._what,
            )

    def _run(self, sink: Sink) -> None:
        stream = self._zlib.stream
        while stream.avail_in or self._in_member:
            if not self._in_member and not self._begin_member():
                return
            before = stream.avail_in
            stream.next_out, stream.avail_out = ctypes.addressof(self._output), _OUTPUT_BYTES
            code = _zlib.inflate(stream, _Z_BLOCK)
            made = _OUTPUT_BYTES - stream.avail_out
            if made:
                self.decoded_bytes += made
                sink(self._view[:made])
            if code == _Z_STREAM_END:
                _zlib.inflateReset(stream)
                self._in_member = False
                continue
            if code == _Z_MEM_ERROR:
                raise MemoryError("zlib: out of memory")
            if code not in (_Z_OK, _Z_BUF_ERROR):
                raise corrupt(self._what, self._zlib.message())
            # Bit 7: at the end of a block or of the header; bit 6: that was the last block, only a trailer follows.
            if stream.data_type & 0xC0 == 0x80:
                self._note_point(stream)
            if stream.avail_in == 0 and made == 0 and before == 0:
                return

    def _begin_member(self) -> bool:
        """Whether a member begins here; zeros up to the end are skipped, as some writers pad."""
        stream = self._zlib.stream
        used = stream.next_in - ctypes.addressof(self._input)
        left = memoryview(self._input).cast("B")[used : used + stream.avail_in]
        if self._padding or (self.points and left[0] == 0):
            self._padding = True
            if any(left):
                raise corrupt(self._what, "other data follows its end")
            stream.avail_in = 0
            return False
        self._in_member = True
        return True

    def _note_point(self, stream: _ZStream) -> None:
        in_header = stream.total_out == 0
        last = self.points[-1].decoded if self.points else -UNIT_BYTES
        if in_header and self.points and last == self.decoded_bytes:
            self.points.pop()  # the member before gave nothing
        elif not in_header and self.decoded_bytes - last < UNIT_BYTES:
            return
        window = b""
        if not in_header:
            buffer, length = ctypes.create_string_buffer(_WINDOW_BYTES), ctypes.c_uint()
            _zlib.inflateGetDictionary(stream, buffer, length)
            window = buffer.raw[: length.value]
        self.points.append(AccessPoint(self.decoded_bytes, self._fed - stream.avail_in, stream.data_type & 7, window))


def decode_unit(unit: Unit, encoded: bytes | bytearray | memoryview, what: str) -> bytearray:
    """The bytes of a unit, out of the blob's bytes `unit.start` to `unit.end`.

    Raises: ContentError when they are not what they were when the points were found.
    """
    out = bytearray(unit.length)
    if not unit.length:
        return out
    inflate = _Inflate(_RAW)
    stream, data = inflate.stream, bytes(encoded)
    skipped = 0
    if unit.point.bits:
        skipped = 1
        _zlib.inflatePrime(stream, unit.point.bits, data[0] >> (8 - unit.point.bits))
    if unit.point.window:
        _zlib.inflateSetDictionary(stream, bytes(unit.point.window), len(unit.point.window))
    stream.next_in = (ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0) + skipped
    stream.avail_in = len(data) - skipped
    target = (ctypes.c_ubyte * unit.length).from_buffer(out)
    stream.next_out, stream.avail_out = ctypes.addressof(target), unit.length
    code = _zlib.inflate(stream, _Z_NO_FLUSH)
    if stream.avail_out or code not in (_Z_OK, _Z_STREAM_END, _Z_BUF_ERROR):
        raise corrupt(what, inflate.message())
    return out
