"""How many blocks one range asks for: each request costs, and a block demanded while it is the last of a range waits for those
before it. So as many as a connection brings in a fifth of a second. Pure state; the caller measures.

Source: docker-registry spends 3 ms of processor time on each request, here half of what it spends on 8 MiB. Measured: a cold read takes 9 %
less with 32 MiB at most than with 16, and no less with 64.
"""

from __future__ import annotations

from csi.stream import blocks

_RANGE_S = 0.2
SHORTEST, LONGEST = 2, 8


class RangeLength:
    """`now` is how many blocks: at first the fewest."""

    def __init__(self) -> None:
        self._block_s = _RANGE_S / SHORTEST

    @property
    def now(self) -> int:
        """From `SHORTEST` to `LONGEST`."""
        return max(SHORTEST, min(LONGEST, int(_RANGE_S / self._block_s)))

    def observe(self, size_bytes: int, seconds: float) -> None:
        """What receiving a block took. Short ones say nothing."""
        if size_bytes == blocks.BLOCK_BYTES:
            self._block_s += (max(seconds, 1e-6) - self._block_s) / 8
