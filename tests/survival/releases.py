"""Other releases, and other kernels: copies of the package with one thing changed, for containers to run."""

from __future__ import annotations

import shutil
from pathlib import Path

from survival.containers import ROOT


def changed(directory: Path, name: str, file: str, before: str, after: str) -> Path:
    """A checkout below `directory` in whose `file` the text `before` (there once) reads `after`."""
    checkout = directory / "releases" / name
    shutil.copytree(ROOT / "csi", checkout / "csi", ignore=shutil.ignore_patterns("__pycache__"))
    text = (checkout / file).read_text(encoding="utf-8")
    assert text.count(before) == 1, f"{file} has {before!r} {text.count(before)} times"
    (checkout / file).write_text(text.replace(before, after), encoding="utf-8")
    return checkout


def on_an_old_kernel(directory: Path) -> Path:
    """What a keeper sees before Linux 6.9: an INIT that does not offer RESEND. Nothing ever sends it then."""
    return changed(
        directory,
        "old-kernel",
        "csi/fuse/handshake.py",
        "return bool(request.offered & InitFlag.HAS_RESEND)",
        "return False",
    )


def whose_worker_crashes(directory: Path) -> Path:
    """A bad release: its workers end as soon as they start."""
    return changed(
        directory,
        "bad-worker",
        "csi/worker/main.py",
        '"""The process, in its jail. Returns the exit status."""',
        'raise SystemExit("a release whose worker crashes at start")',
    )
