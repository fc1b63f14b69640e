"""How many ranges are fetched at once: more as long as more brings more.

A registry across a slow link needs many requests under way, one that is near needs few, and where cores are what is
missing each more costs. None of that is known beforehand, so it is tried: a window of fetching at one width, then a few
more, kept only if they brought a tenth more. Pure state; the caller measures.

What is tried is how many ranges *bring* something at once. A range that still waits for its first byte brings nothing, so there
are as many more under way as wait at any moment (Little's law: a share of wait ÷ transfer of them).

Source: object stores are read fastest with 16 to 32 connections by published measurements, one on this machine with 4.
"""

from __future__ import annotations

WINDOW_S = 1.0
"""How long a width is tried: some ranges of each connection on any link worth streaming over."""
_WORTH_IT = 1.1
_FIRST_TRANSFER_S = 0.2
"""What a range takes to transfer, as long as none has: that for which its length is chosen, see `csi.stream.range_length`."""
_REST_WINDOWS = 30
"""After a try that brought nothing; links change, but not every second."""


class Width:
    """`first` to begin with, never more than `most`. `now` is how many ranges bring something at once, `ranges` how many are under
    way for that.
    """

    def __init__(self, first: int, most: int) -> None:
        self._first, self._most = first, max(first, most)
        self.now = first
        self._before: tuple[int, float] | None = None  # the width and rate that a try is compared with
        self._rest = 0
        self._wait_s, self._transfer_s = 0.0, _FIRST_TRANSFER_S

    @property
    def ranges(self) -> int:
        """From `now` to `most`."""
        return max(self.now, min(self._most, round(self.now * (1 + self._wait_s / self._transfer_s))))

    def waited(self, seconds: float) -> None:
        """From the request of a range to its first byte."""
        self._wait_s += (seconds - self._wait_s) / 4

    def transferred(self, seconds: float) -> None:
        """From the first byte of a range to its last."""
        self._transfer_s += (max(seconds, 1e-3) - self._transfer_s) / 4

    def observe(self, bytes_per_s: float) -> int:
        """What a window brought in which there was always something to fetch. The width from now on."""
        if self._before is not None:
            width, rate = self._before
            self._before = None
            if bytes_per_s < rate * _WORTH_IT:
                self.now, self._rest = width, _REST_WINDOWS
                return self.now
        if self.now < self._first:
            self.now += 1
        elif self._rest:
            self._rest -= 1
        elif self.now < self._most:
            self._before = (self.now, bytes_per_s)
            self.now = min(self._most, self.now + max(2, self.now // 2))
        return self.now

    def interrupted(self) -> None:
        """There was nothing to fetch for a while: what is being tried says nothing."""
        if self._before is not None:
            self.now, self._before = self._before[0], None

    def refused(self) -> int:
        """The registry asks for less (429, Retry-After). The width from now on: at least 2 where there may be so many, as the first
        of them is for readers only.
        """
        self._before, self._rest = None, _REST_WINDOWS
        self.now = max(min(2, self._first), min(self._first, self.now // 2))
        return self.now
