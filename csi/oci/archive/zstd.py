"""Decodes zstd; decoding can start at frames, so one of many frames can be entered, one of a single frame cannot.

Source: RFC 8878 for frames and windows; the module is Python 3.14's `compression.zstd`.
"""

from __future__ import annotations

import sys

from csi.errors import SizeMismatchError
from csi.oci.archive.points import AccessPoint, Sink, Unit, corrupt

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_LEAST_UNIT_BYTES = 1024 * 1024  # smaller frames are taken together
_OUTPUT_BYTES = 256 * 1024
_MAX_WINDOW_LOG = 27  # 128 MiB, what `zstd` decompresses without being told to


def _decompressor() -> zstd.ZstdDecompressor:
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _MAX_WINDOW_LOG})


class ZstdDecoder:
    """See `Decoder`. Frames one after another are one stream; skippable ones give nothing."""

    def __init__(self, what: str) -> None:
        """`what` names the layer in error messages."""
        self.points: list[AccessPoint] = []
        self.decoded_bytes = 0
        self._what = what
        self._frame: zstd.ZstdDecompressor | None = None
        self._fed = 0

    def feed(self, data: bytes | bytearray | memoryview, sink: Sink) -> None:
        """See `Decoder.feed`."""
        data = bytes(data)
        self._fed += len(data)
        while data or (self._frame is not None and not self._frame.needs_input):
            if self._frame is None:
                self._frame = _decompressor()
                if not self.points or self.decoded_bytes - self.points[-1].decoded >= _LEAST_UNIT_BYTES:
                    self.points.append(AccessPoint(self.decoded_bytes, self._fed - len(data)))
            try:
                out = self._frame.decompress(data, _OUTPUT_BYTES)
            except zstd.ZstdError as exc:
                raise corrupt(self._what, str(exc)) from exc
            data = b""
            if out:
                self.decoded_bytes += len(out)
                sink(memoryview(out))
            if self._frame.eof:
                data, self._frame = self._frame.unused_data, None

    def finish(self) -> None:
        """See `Decoder.finish`."""
        if self._frame is not None or not self.points:
            raise SizeMismatchError(
                f"{self._what}: its zstd stream ends too early; it was cut short when it was packed or pushed: push it again",
                subject=self._what,
            )


def decode_unit(unit: Unit, encoded: bytes | bytearray | memoryview, what: str) -> bytearray:
    """The bytes of a unit, out of the blob's bytes `unit.start` to `unit.end`.

    Raises: ContentError when they are not what they were when the points were found.
    """
    out = bytearray()
    decoder = ZstdDecoder(what)

    def keep(data: memoryview) -> None:
        out.extend(data)
        if len(out) > unit.length:
            raise corrupt(what, "it gives more bytes than it did before")

    decoder.feed(encoded, keep)
    if len(out) != unit.length:
        raise corrupt(what, "it gives fewer bytes than it did before")
    return out
