"""How long the next process waits where one before it has ended. Readers wait as long."""

from __future__ import annotations

_FREE_DEATHS = 3
"""So many in a row may end soon after their start, killed perhaps, and the next one does not wait."""


class Restarts:
    """Counts processes that end within `soon_s` of their start; from the fourth in a row on each waits, twice as long as the
    one before it, from `first_s` up to `longest_s`.
    """

    def __init__(self, *, soon_s: float, first_s: float, longest_s: float) -> None:
        self._soon_s, self._first_s, self._longest_s = soon_s, first_s, longest_s
        self._quick_deaths = 0

    def note_death(self, lived_s: float) -> None:
        """One that was to live has ended."""
        self._quick_deaths = 0 if lived_s > self._soon_s else self._quick_deaths + 1

    @property
    def delay_s(self) -> float:
        """Before the next one starts."""
        if self._quick_deaths <= _FREE_DEATHS:
            return 0.0
        return min(self._longest_s, self._first_s * 2.0 ** min(self._quick_deaths - _FREE_DEATHS - 1, 10))
