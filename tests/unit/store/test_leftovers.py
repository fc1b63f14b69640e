"""A cache in another layout goes, unless somebody uses it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from csi.store import leftovers


def test_what_another_version_left_is_removed_but_not_what_is_locked(tmp_path: Path) -> None:
    for path in (
        "shared/blobs/sha256-aa/seg-00000", "shared/mounts/1111/sha256-aa/seg-00000", "shared/mounts/1111/sha256-aa/map",
        "shared/mounts/2222/sha256-aa/seg-00000", "ns-team/mounts/3333/sha256-bb/seg-00000", "shared/blobs/pins",
    ):  # fmt: skip
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"x" * 10_000)
    used_fd = os.open(tmp_path / "shared/mounts/2222", os.O_RDONLY)
    version_fd = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(used_fd, fcntl.LOCK_SH)
        assert leftovers.remove(version_fd) >= 5 * 10_000
        left = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
        assert left == ["shared/mounts/2222/sha256-aa/seg-00000"]
    finally:
        os.close(used_fd)
    assert leftovers.remove(version_fd) >= 10_000
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert leftovers.remove(version_fd) == 0
    os.close(version_fd)
