"""Samples of the rounds, and the table that is made of them."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Row:
    """One line. `goal` is the largest value that meets it, None for plain facts; `least` and `most` are the rounds'."""

    name: str
    value: float
    unit: str
    least: float
    most: float
    rounds: int
    goal: float | None = None

    @property
    def verdict(self) -> str:
        """`met`, `missed`, or nothing."""
        return "" if self.goal is None else ("met" if self.value <= self.goal else "missed")

    @classmethod
    def of(cls, name: str, unit: str, values: list[float], goal: float | None = None) -> Row:
        """The median of some values."""
        return cls(
            name,
            round(statistics.median(values), 3),
            unit,
            round(min(values), 3),
            round(max(values), 3),
            len(values),
            goal,
        )


@dataclass(frozen=True, slots=True)
class Samples:
    """What the rounds brought, by name. A round that has no value for a name is left out of its rows."""

    values: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    facts: list[tuple[str, float, str]] = field(default_factory=list)
    """What is measured once: name, value, unit."""

    def add(self, name: str, value: float) -> None:
        """One more."""
        self.values[name].append(value)

    def ratio(self, name: str, ours: str, theirs: str, goal: float | None = None) -> Iterable[Row]:
        """The median of ours ÷ theirs, round by round; nothing when one of them was not measured."""
        pairs = list(zip(self.values.get(ours, ()), self.values.get(theirs, ()), strict=False))
        if pairs:
            yield Row.of(name, "ratio", [our / their for our, their in pairs], goal)

    def fact(self, name: str, unit: str, goal: float | None = None, *, of: str | None = None) -> Iterable[Row]:
        """The median itself."""
        if values := self.values.get(of or name):
            yield Row.of(name, unit, values, goal)


def as_text(rows: Iterable[Row]) -> str:
    """For a terminal."""
    lines = [f"{'':72} {'median':>9} {'least':>8} {'most':>8} {'':6} {'goal':>6}"]
    for row in rows:
        goal = "" if row.goal is None else f"≤ {row.goal:g}"
        lines.append(
            f"{row.name:72} {row.value:>9g} {row.least:>8g} {row.most:>8g} {row.unit:6} {goal:>6} {row.verdict}"
        )
    return "\n".join(lines)


def as_markdown(rows: Iterable[Row]) -> str:
    """For a page."""
    lines = ["| case ÷ baseline | median | least to most | goal | |", "|---|---|---|---|---|"]
    for row in rows:
        goal = "" if row.goal is None else f"≤ {row.goal:g}"
        unit = "" if row.unit == "ratio" else f" {row.unit}"
        lines.append(f"| {row.name} | {row.value:g}{unit} | {row.least:g} to {row.most:g} | {goal} | {row.verdict} |")
    return "\n".join(lines) + "\n"
