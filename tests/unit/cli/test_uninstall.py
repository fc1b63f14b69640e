"""What `modelmount uninstall clean` takes away, and what it leaves."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from csi import mountinfo
from csi.cli import uninstall
from csi.cli.main import main

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def directories(tmp_path: Path) -> list[str]:
    """The flags that name them; each holds something of every name of ours, and a stranger's file."""
    for directory, names in (("state", uninstall.STATE_NAMES), ("data", uninstall.DATA_NAMES)):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "strangers").write_text("kept")
        for name in names:
            path = tmp_path / directory / name
            if name.endswith(".sock"):
                path.touch()
            else:
                (path / "deep").mkdir(parents=True)
    return [f"--state-dir={tmp_path}/state", f"--data-dir={tmp_path}/data"]


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def clean(*flags: str) -> int:
    """In a mount name space of its own: models that others have mounted on this machine are none of this test's."""
    command = [sys.executable, "-m", "csi.cli.main", "uninstall", "clean", *flags]
    alone = ["unshare", "--mount", "--propagation", "private"] if os.geteuid() == 0 else []
    return subprocess.run([*alone, *command]).returncode


def test_everything_of_ours_goes_and_nothing_else(directories: list[str], tmp_path: Path) -> None:
    assert clean(*directories) == 0
    assert names_in(tmp_path / "state") == names_in(tmp_path / "data") == ["strangers"]
    assert clean(*directories) == 0, "again: nothing to do"


def test_only_models_below_the_drivers_own_directories_are_unmounted() -> None:
    lines = b"""31 25 0:40 / /run/modelmount/mounts/ab ro - fuse.modelmount modelmount ro
32 25 0:40 / /var/lib/kubelet/pods/1/volumes/kubernetes.io~csi/m/mount ro - fuse.modelmount modelmount ro
33 25 0:41 / /run/modelmount-by-hand/mounts/cd ro - fuse.modelmount modelmount ro
34 25 0:42 / /var/lib/kubelet/pods/1/volumes/kubernetes.io~csi/s/mount rw - fuse.s3 s3 rw
"""
    entries = mountinfo.parse(lines)
    roots = ["/run/modelmount", "/var/lib/kubelet/pods"]
    assert [entry.mount_no for entry in entries if uninstall.is_ours(entry, roots)] == [31, 32]


def test_the_cache_stays_where_that_is_asked(directories: list[str], tmp_path: Path) -> None:
    assert clean("--keep-cache", *directories) == 0
    assert names_in(tmp_path / "data") == sorted(["strangers", *uninstall.DATA_NAMES])


def test_a_driver_that_runs_loses_nothing(
    directories: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "state" / "keeper.sock").unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as keeper:
        monkeypatch.chdir(tmp_path / "state")  # the whole path may be too long for a socket
        keeper.bind("keeper.sock")
        keeper.listen()
        assert main(["uninstall", "clean", "--timeout=0.1", *directories]) == 1
    assert "still running on this node: keeper" in capsys.readouterr().err
    assert names_in(tmp_path / "data") == sorted(["strangers", *uninstall.DATA_NAMES])


def test_every_directory_the_code_makes_is_among_the_names() -> None:
    for attribute, names in (("state_dir", uninstall.STATE_NAMES), ("data_dir", uninstall.DATA_NAMES)):
        pattern = re.compile(rf'os\.path\.join\((?:\w+\.)?{attribute}, "([^"]+)"')
        found = {name for path in (ROOT / "csi").rglob("*.py") for name in pattern.findall(path.read_text("utf-8"))}
        assert found
        assert found <= set(names)
