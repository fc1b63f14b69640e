"""A tar scan over bytes that come in order, as a decoder gives them."""

from __future__ import annotations

from csi.oci.archive import tar
from csi.oci.archive.table import MemberTable


class TarStream:
    """Feed it what comes; only what the scan asks for is copied."""

    def __init__(self, what: str) -> None:
        self._scan: tar.Scan | None = tar.scan(what)
        self._asked = next(self._scan)
        self._position = 0
        self._part = bytearray()
        self._members = MemberTable()

    def feed(self, data: memoryview) -> None:
        """The next bytes. Raises: what `tar.scan` raises."""
        start, end = self._position, self._position + len(data)
        self._position = end
        while self._scan is not None and self._asked.offset < end:
            first = max(self._asked.offset + len(self._part), start) - start
            wanted = self._asked.length - len(self._part)
            self._part += data[first : first + wanted]
            if len(self._part) < self._asked.length:
                return
            self._answer(bytes(self._part))

    def finish(self) -> MemberTable:
        """There are no more. Raises: SizeMismatchError when there should be."""
        while self._scan is not None:
            self._answer(None if self._asked.offset > self._position else bytes(self._part))
        return self._members

    def _answer(self, data: bytes | None) -> None:
        assert self._scan is not None
        self._part.clear()
        try:
            self._asked = self._scan.send(data)
        except StopIteration as end:
            self._members, self._scan = end.value, None
