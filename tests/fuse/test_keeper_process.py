"""The keeper as a process of its own: its protocol, its refusals, and what it leaves in mountinfo."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.node_process import COMMAND, mounts_below

from csi import mountinfo
from csi.control import endpoint
from csi.control.keeper import KeeperClient
from csi.control.wire import close_all
from csi.errors import ControlError, InvalidVolumeError, MountError
from csi.fuse.handshake import INIT_SET_VERSION, parse_init

pytestmark = pytest.mark.fuse

MOUNT_ID = "ab" * 16


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[KeeperClient]:
    process = subprocess.Popen(
        [*COMMAND, "keeper", "--state-dir", str(tmp_path / "state"), "--target-root", str(tmp_path)],
        stderr=subprocess.DEVNULL,
    )
    client = KeeperClient(str(tmp_path / "state"))
    for _ in range(400):
        try:
            client.ping()
            break
        except ControlError:
            select.select([], [], [], 0.02)
    yield client
    for mount in client.mounts():
        client.unmount(mount.mount_id)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    assert mounts_below(tmp_path) == []


def test_a_mount_has_its_init_answered_and_its_read_ahead_raised(keeper: KeeperClient, tmp_path: Path) -> None:
    mount, fd, table_fd, init = keeper.mount(MOUNT_ID, 8192, "raw")
    try:
        assert mount.init_set_version == INIT_SET_VERSION
        assert parse_init(init).major == 7
        assert Path(f"/sys/class/bdi/{mount.device}/read_ahead_kb").read_text().strip() == "8192"
        (entry,) = [entry for entry in mountinfo.read() if entry.device == mount.device]
        assert {"ro", "nosuid", "nodev", "noexec"} <= entry.options
        assert {"ro", "allow_other", "default_permissions"} <= entry.super_options
        again, second_fd, second_table_fd, second_init = keeper.mount(MOUNT_ID, 8192, "pyfuse3")
        assert os.path.sameopenfile(table_fd, second_table_fd)
        os.close(second_fd)
        os.close(second_table_fd)
        assert (mount.existed, again.existed) == (False, True)
        assert (mount.backend, again.backend) == ("raw", "raw"), "a mount never changes its backend"
        assert (again.device, second_init) == (mount.device, init)
        assert [held.mount_id for held in keeper.mounts()] == [MOUNT_ID]
    finally:
        os.close(fd)
        os.close(table_fd)


def test_binds_are_read_only_stackless_and_removed(keeper: KeeperClient, tmp_path: Path) -> None:
    mount, *fds, _ = keeper.mount(MOUNT_ID, 128, "raw")
    close_all(fds)
    odd = tmp_path / "with space \\ and\ttab"
    assert keeper.bind(MOUNT_ID, str(odd))
    assert not keeper.bind(MOUNT_ID, str(odd))
    (entry,) = mountinfo.at(mountinfo.read(), str(odd))
    assert entry.device == mount.device
    assert {"ro", "nosuid", "nodev", "noexec", "noatime"} <= entry.options
    keeper.unbind(str(odd))
    keeper.unbind(str(odd))
    assert not odd.exists()


def test_a_stranger_at_the_target_is_left_alone(keeper: KeeperClient, tmp_path: Path) -> None:
    _, *fds, _ = keeper.mount(MOUNT_ID, 128, "raw")
    close_all(fds)
    target = tmp_path / "foreign"
    target.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(target)], check=True)
    try:
        with pytest.raises(MountError, match="tmpfs"):
            keeper.bind(MOUNT_ID, str(target))
        with pytest.raises(MountError, match="tmpfs"):
            keeper.unbind(str(target))
        assert len(mountinfo.at(mountinfo.read(), str(target))) == 1
    finally:
        subprocess.run(["umount", str(target)], check=True)
    (tmp_path / "file").write_text("x")
    for call in (lambda: keeper.bind(MOUNT_ID, str(tmp_path / "file")), lambda: keeper.unbind(str(tmp_path / "file"))):
        with pytest.raises(MountError):
            call()
    assert (tmp_path / "file").read_text() == "x"


def test_paths_outside_its_roots_and_through_links_are_refused(keeper: KeeperClient, tmp_path: Path) -> None:
    _, *fds, _ = keeper.mount(MOUNT_ID, 128, "raw")
    close_all(fds)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for path, error in (
        ("/etc/modelmount-test", InvalidVolumeError),
        (str(tmp_path) + "/../escape", InvalidVolumeError),
        ("relative/path", InvalidVolumeError),
        (str(tmp_path) + "/", InvalidVolumeError),
        (str(tmp_path / "link" / "mount"), MountError),
        (str(tmp_path / "absent" / "mount"), MountError),
    ):
        with pytest.raises(error):
            keeper.bind(MOUNT_ID, path)
    assert os.listdir(tmp_path / "real") == []


def test_unknown_mounts_ids_and_operations_are_refused(keeper: KeeperClient, tmp_path: Path) -> None:
    with pytest.raises(MountError, match="publish again"):
        keeper.bind("00" * 16, str(tmp_path / "t"))
    with pytest.raises(InvalidVolumeError):
        keeper.mount("../../etc", 128, "raw")
    with pytest.raises(InvalidVolumeError, match="nfs"):
        keeper.mount(MOUNT_ID, 128, "nfs")
    with pytest.raises(ControlError, match="unknown operation"):
        endpoint.call(str(tmp_path / "state" / "keeper.sock"), "format-disk", 5.0)
    keeper.unmount("00" * 16)
    assert not (tmp_path / "t").exists()


def test_a_second_keeper_says_that_one_runs(keeper: KeeperClient, tmp_path: Path) -> None:
    command = [*COMMAND, "keeper", "--state-dir", str(tmp_path / "state")]
    second = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert second.returncode == 1
    assert "another process listens" in second.stderr
    assert keeper.ping()


def test_another_user_may_not_ask(keeper: KeeperClient, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    path = tmp_path / "state" / "keeper.sock"
    (tmp_path / "state").chmod(0o755)
    path.chmod(0o777)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.chdir(tmp_path / "state")
            os.setresuid(64999, 64999, 64999)
            endpoint.call("keeper.sock", "list", 5.0)
        except ControlError as exc:
            status = 0 if "may not ask" in str(exc) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
