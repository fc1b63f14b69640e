"""Which bytes a reader will want next, from the reads of one file so far. Pure state; one instance per file.

Many readers may share a file (tensor-parallel ranks, `cat` beside a loader), so several streams are followed at
once, told apart by where they are; the kernel's own read-ahead makes their requests arrive out of order, hence the
tolerance.

Source: window growth tied to starvation (a miss), not to the number of bytes, as measured by S3-backed mounts.
"""

from __future__ import annotations

from dataclasses import dataclass

_MIB = 1024 * 1024
MAX_STREAMS = 32
FIRST_WINDOW_BYTES = 16 * _MIB
MAX_WINDOW_BYTES = 128 * _MIB
_FORWARD_TOLERANCE_BYTES = 32 * _MIB  # twice the kernel's read-ahead
_BACKWARD_TOLERANCE_BYTES = 16 * _MIB


@dataclass(slots=True)
class _Stream:
    position: int
    window: int
    asked_to: int


class ReadAhead:
    """Call `observe` for every read; it answers which range to fetch ahead, or None."""

    def __init__(self, size_bytes: int) -> None:
        self._size = size_bytes
        self._streams: list[_Stream] = []  # most recently used last

    def observe(self, offset: int, length: int, *, missed: bool) -> range | None:
        """`missed`: the read had to wait. The range is in bytes, not empty, within the file, and was not returned
        before for this stream.
        """
        end = offset + length
        stream = self._stream_at(offset)
        if stream is None:
            # The first read of a stream proves nothing yet, unless it starts the file.
            self._remember(_Stream(end, FIRST_WINDOW_BYTES if offset == 0 else 0, end))
            return None
        if missed:
            stream.window = min(MAX_WINDOW_BYTES, max(FIRST_WINDOW_BYTES, stream.window * 2))
        stream.position = max(stream.position, end)
        self._remember(stream)
        wanted_to = min(self._size, stream.position + stream.window)
        start = max(stream.asked_to, stream.position)
        # Asked for by halves of the window, so that a steady reader costs few messages.
        if wanted_to - start < stream.window // 2 and wanted_to < self._size:
            return None
        stream.asked_to = max(stream.asked_to, wanted_to)
        return range(start, wanted_to) if start < wanted_to else None

    def _stream_at(self, offset: int) -> _Stream | None:
        near = [
            stream
            for stream in self._streams
            if -_BACKWARD_TOLERANCE_BYTES <= offset - stream.position <= _FORWARD_TOLERANCE_BYTES
        ]
        if not near:
            return None
        best = min(near, key=lambda stream: abs(offset - stream.position))
        self._streams.remove(best)
        return best

    def _remember(self, stream: _Stream) -> None:
        self._streams.append(stream)
        del self._streams[:-MAX_STREAMS]
