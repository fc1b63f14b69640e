"""What a reader of a volume sees."""

from __future__ import annotations

import os
from pathlib import Path

from formats.artifacts import Contents


def mounted(target: Path) -> Contents:
    """Path → content, of everything below `target`. Raises: OSError also for a directory that cannot be listed."""

    def unlisted(error: OSError) -> None:
        raise error

    shown: dict[str, bytes | str | None] = {}
    for directory, subdirectories, names in os.walk(target, onerror=unlisted):
        for name in [*subdirectories, *names]:
            path = Path(directory, name)
            relative = str(path.relative_to(target))
            if path.is_symlink():
                shown[relative] = os.readlink(path)
            else:
                shown[relative] = None if path.is_dir() else path.read_bytes()
    return shown
