"""What the suite found out: one line per event and backend. Written to the terminal and, as JSON, to a file."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

from survival.readers import Seen


@dataclass(frozen=True, slots=True)
class Row:
    """One event. `skipped`: why it was not done; then nothing was measured."""

    event: str
    backend: str
    operations: int = 0
    errors: int = 0
    wrong: int = 0
    longest_pause_s: float = 0.0
    slowest: str = ""
    note: str = ""
    skipped: str = ""


class Table:
    """Rows in the order they were found."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def add(self, event: str, backend: str, seen: Seen, note: str = "") -> None:
        """One event and what readers saw of it."""
        self.rows.append(
            Row(
                event,
                backend,
                seen.operations,
                seen.errors,
                seen.wrong,
                round(seen.longest_pause_s, 3),
                seen.slowest,
                note,
            )
        )

    def skip(self, event: str, backend: str, reason: str) -> None:
        """An event that could not be done here."""
        self.rows.append(Row(event, backend, skipped=reason))

    def write(self, path: Path) -> None:
        """As JSON, with the machine it was measured on."""
        machine = {"kernel": platform.release(), "cores": os.cpu_count()}
        path.write_text(json.dumps({"machine": machine, "rows": [asdict(row) for row in self.rows]}, indent=1) + "\n")

    def lines(self) -> list[str]:
        """For people."""
        width = max((len(row.event) for row in self.rows), default=5)
        head = f"{'event':{width}}  {'backend':10}  {'reads':>7}  errors  wrong  longest pause"
        lines = [head]
        for row in self.rows:
            start = f"{row.event:{width}}  {row.backend:10}"
            if row.skipped:
                lines.append(f"{start}  not done: {row.skipped}")
                continue
            pause = f"{row.longest_pause_s:8.3f} s ({row.slowest})"
            note = f"  {row.note}" if row.note else ""
            lines.append(f"{start}  {row.operations:7}  {row.errors:6}  {row.wrong:5}  {pause}{note}")
        return lines
