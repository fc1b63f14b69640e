"""Which descriptors the keeper takes for passthrough."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from csi.keeper import backing

OWNER = os.geteuid()


def refusal(fd: int, owner: int = OWNER) -> str | None:
    try:
        return backing.refusal_of(fd, owner)
    finally:
        os.close(fd)


@pytest.fixture
def proven(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.write_bytes(b"proven")
    path.chmod(0o444)
    return path


def test_a_proven_file_open_for_reading_is_taken(proven: Path) -> None:
    assert refusal(os.open(proven, os.O_RDONLY)) is None


@pytest.mark.parametrize("flags", [os.O_PATH, os.O_WRONLY, os.O_RDWR])
def test_a_descriptor_that_gives_another_right_is_not(proven: Path, flags: int) -> None:
    proven.chmod(0o644)
    fd = os.open(proven, flags)
    proven.chmod(0o444)
    assert "reading alone" in str(refusal(fd))


@pytest.mark.parametrize("mode", [0o644, 0o464, 0o446])
def test_a_file_that_somebody_may_write_is_not(proven: Path, mode: int) -> None:
    proven.chmod(mode)
    assert "writable by nobody" in str(refusal(os.open(proven, os.O_RDONLY)))


def test_a_file_of_another_user_is_not(proven: Path) -> None:
    assert f"uid {OWNER + 1}" in str(refusal(os.open(proven, os.O_RDONLY), OWNER + 1))


def test_what_is_no_regular_file_is_not(tmp_path: Path) -> None:
    assert "regular" in str(refusal(os.open(tmp_path, os.O_RDONLY)))
    assert "regular" in str(refusal(os.open("/dev/null", os.O_RDONLY)))


def test_descriptors_of_one_file_have_one_name(proven: Path, tmp_path: Path) -> None:
    os.link(proven, tmp_path / "link")
    fds = [os.open(path, os.O_RDONLY) for path in (proven, tmp_path / "link")]
    assert len({backing.name_of(fd) for fd in fds}) == 1
    for fd in fds:
        os.close(fd)
