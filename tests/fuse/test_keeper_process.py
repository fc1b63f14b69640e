"""The keeper as a process of its own: its protocol, its refusals, and what it leaves in mountinfo."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import select
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.node_process import COMMAND, mounts_below

from csi import mountinfo
from csi.control import endpoint, wire
from csi.control.keeper import KeeperClient
from csi.errors import ControlError, InvalidVolumeError, MountError
from csi.fuse.handshake import INIT_SET_VERSION, parse_init
from csi.keeper import syscalls

pytestmark = pytest.mark.fuse

MOUNT_ID = "ab" * 16


class KeeperProcess:
    """`modelmount keeper` below a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.client = KeeperClient(str(directory / "state"))
        self.start()

    def start(self, *flags: str) -> None:
        """Start one, and wait until it, and no other, answers."""
        command = [*COMMAND, "keeper", "--state-dir", str(self.directory / "state")]
        self.process = subprocess.Popen(
            [*command, "--target-root", str(self.directory), *flags], stderr=subprocess.DEVNULL
        )
        for _ in range(400):
            try:
                if self.client.ping()["pid"] == self.process.pid:
                    return
            except ControlError:
                pass
            select.select([], [], [], 0.02)
        raise AssertionError("the keeper did not start")

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()


@pytest.fixture
def keeper_process(tmp_path: Path) -> Iterator[KeeperProcess]:
    running = KeeperProcess(tmp_path)
    try:
        yield running
        for mount in running.client.mounts():
            running.client.unmount(mount.mount_id)
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(10) == 0
    except BaseException:  # nothing hung may be left behind
        running.kill()
        for mount_point in mounts_below(tmp_path):
            syscalls.detach(mount_point)
        raise
    assert mounts_below(tmp_path) == []
    assert os.listdir(tmp_path / "state" / "superblocks") == []


@pytest.fixture
def keeper(keeper_process: KeeperProcess) -> KeeperClient:
    return keeper_process.client


def test_a_mount_has_its_init_answered_and_its_read_ahead_raised(keeper: KeeperClient, tmp_path: Path) -> None:
    collected = keeper.mount(MOUNT_ID, 8192, "raw")
    mount, init = collected.mount, collected.init
    try:
        assert mount.init_set_version == INIT_SET_VERSION
        assert parse_init(init).major == 7
        assert Path(f"/sys/class/bdi/{mount.device}/read_ahead_kb").read_text().strip() == "8192"
        (entry,) = [entry for entry in mountinfo.read() if entry.device == mount.device]
        assert {"ro", "nosuid", "nodev", "noexec"} <= entry.options
        assert {"ro", "allow_other", "default_permissions"} <= entry.super_options
        again = keeper.mount(MOUNT_ID, 8192, "pyfuse3")
        assert os.path.sameopenfile(collected.table_fd, again.table_fd)
        again.close()
        assert (mount.existed, again.mount.existed) == (False, True)
        assert (mount.backend, again.mount.backend) == ("raw", "raw"), "a mount never changes its backend"
        assert (again.mount.device, again.init) == (mount.device, init)
        assert [held.mount_id for held in keeper.mounts()] == [MOUNT_ID]
    finally:
        collected.close()


def test_binds_are_read_only_stackless_and_removed(keeper: KeeperClient, tmp_path: Path) -> None:
    collected = keeper.mount(MOUNT_ID, 128, "raw")
    collected.close()
    mount = collected.mount
    odd = tmp_path / "with space \\ and\ttab"
    assert keeper.bind(MOUNT_ID, str(odd))
    assert not keeper.bind(MOUNT_ID, str(odd))
    (entry,) = mountinfo.at(mountinfo.read(), str(odd))
    assert entry.device == mount.device
    assert {"ro", "nosuid", "nodev", "noexec", "noatime"} <= entry.options
    keeper.unbind(str(odd))
    keeper.unbind(str(odd))
    assert not odd.exists()


def test_a_superblock_that_somebody_has_unmounted_is_not_bound_as_the_directory_below_it(
    keeper: KeeperClient, tmp_path: Path
) -> None:
    collected = keeper.mount(MOUNT_ID, 128, "raw")
    collected.close()
    (place,) = [entry.mount_point for entry in mountinfo.read() if entry.device == collected.mount.device]
    syscalls.detach(place)
    with pytest.raises(MountError, match="bind mount failed"):
        keeper.bind(MOUNT_ID, str(tmp_path / "target"))
    assert not (tmp_path / "target").exists()


def test_a_stranger_at_the_target_is_left_alone(keeper: KeeperClient, tmp_path: Path) -> None:
    keeper.mount(MOUNT_ID, 128, "raw").close()
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
    keeper.mount(MOUNT_ID, 128, "raw").close()
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


def test_a_killed_keeper_gets_its_connections_back(keeper_process: KeeperProcess, tmp_path: Path) -> None:
    keeper = keeper_process.client
    held = keeper.mount(MOUNT_ID, 128, "raw")
    keeper.keep(MOUNT_ID, "worker", {"pid": 7}, (held.root_fd,))
    keeper_process.kill()
    keeper_process.start()
    (mount,) = keeper.mounts()
    assert (mount.device, mount.connected) == (held.mount.device, False)
    with pytest.raises(MountError, match="nobody brought"):
        keeper.collect(MOUNT_ID)
    with pytest.raises(ControlError, match="on its way back"):  # tried again, and no reason to do without passthrough
        keeper.back(MOUNT_ID, held.table_fd)
    assert keeper.bind(MOUNT_ID, str(tmp_path / "target")), "a bind needs no connection"
    with pytest.raises(ControlError, match="needs the descriptors"):
        keeper.restore(MOUNT_ID, held.root_fd, held.table_fd)
    keeper.restore(MOUNT_ID, held.fuse_fd, held.table_fd)
    keeper.restore(MOUNT_ID, held.fuse_fd, held.table_fd)
    keeper.settle()
    again = keeper.collect(MOUNT_ID)
    assert (again.init, again.slots, again.mount.backend) == (held.init, {}, "raw")
    assert os.path.sameopenfile(again.table_fd, held.table_fd)
    assert poll_events(again.fuse_fd) & select.POLLERR == 0
    keeper.unbind(str(tmp_path / "target"))
    keeper.unmount(MOUNT_ID)
    assert poll_events(again.fuse_fd) & select.POLLERR == 0, "the O_PATH descriptors pin the detached mount"
    held.close()
    wire.close_all([again.root_fd, again.table_fd])
    assert poll_events(again.fuse_fd) & select.POLLERR
    os.close(again.fuse_fd)


def test_a_keeper_that_nobody_brings_a_connection_removes_the_mount(keeper_process: KeeperProcess) -> None:
    keeper = keeper_process.client
    keeper.mount(MOUNT_ID, 128, "raw").close()
    keeper_process.kill()
    keeper_process.start()
    assert [mount.connected for mount in keeper.mounts()] == [False]
    keeper.settle()
    assert keeper.mounts() == []
    assert mounts_below(keeper_process.directory) == []


def test_a_mount_that_was_being_made_when_the_keeper_died_is_removed(
    keeper_process: KeeperProcess, tmp_path: Path
) -> None:
    keeper = keeper_process.client
    held = keeper.mount(MOUNT_ID, 128, "raw")
    keeper_process.kill()
    record = tmp_path / "state" / "superblocks" / MOUNT_ID
    whole = json.loads(record.read_text())
    for damaged in ({"device": "", "init": ""}, {"device": "0:1"}, {"boot_id": "00" * 16}):
        record.write_text(json.dumps(whole | damaged))
        keeper_process.start()
        assert keeper.mounts() == []
        assert mounts_below(tmp_path) == []
        keeper.mount(MOUNT_ID, 128, "raw").close()
        keeper_process.kill()
    held.close()
    record.write_text("{")
    keeper_process.start()
    assert keeper.mounts() == []


def test_a_keeper_is_taken_over_by_the_next_with_all_it_holds(keeper_process: KeeperProcess, tmp_path: Path) -> None:
    keeper = keeper_process.client
    held = keeper.mount(MOUNT_ID, 128, "raw")
    other = "cd" * 16
    keeper.mount(other, 128, "raw").close()
    watching = keeper.watch(5.0)
    read_end, write_end = os.pipe()
    keeper.keep(MOUNT_ID, "worker", {"pid": 7}, (read_end, write_end))
    keeper.keep(MOUNT_ID, "fetcher", {}, (read_end,))
    wire.close_all([read_end, write_end])
    before = keeper_process.process
    keeper_process.start("--take-over")
    assert before.wait(10) == 0
    with watching:
        assert watching.recv(1) == b"", "whoever watched the old one learns of the new one"
    assert sorted(mount.mount_id for mount in keeper.mounts() if mount.connected) == sorted([MOUNT_ID, other])
    again = keeper.collect(MOUNT_ID)
    assert (again.init, again.mount) == (held.init, dataclasses.replace(held.mount, existed=True))
    assert os.path.sameopenfile(again.table_fd, held.table_fd)
    assert {name: (slot.note, len(slot.fds)) for name, slot in again.slots.items()} == {
        "worker": ({"pid": 7}, 2),
        "fetcher": ({}, 1),
    }
    os.write(again.slots["worker"].fds[1], b"still the same pipe")
    assert os.read(again.slots["fetcher"].fds[0], 100) == b"still the same pipe"
    again.close()
    keeper.drop(MOUNT_ID, "worker")
    keeper.drop(MOUNT_ID, "never-there")
    last = keeper.collect(MOUNT_ID)
    assert list(last.slots) == ["fetcher"]
    last.close()
    held.close()


def test_a_path_that_changes_while_it_is_walked_never_leads_out_of_the_roots(
    keeper_process: KeeperProcess, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Somebody swaps a component for a link to a directory outside, again and again."""
    outside = tmp_path_factory.mktemp("outside")
    (outside / "pod").mkdir()
    keeper = keeper_process.client
    keeper.mount(MOUNT_ID, 128, "raw").close()
    (tmp_path / "real" / "pod").mkdir(parents=True)
    (tmp_path / "link").symlink_to(outside)
    for source in ("real", "link"):
        os.rename(tmp_path / source, tmp_path / f"{source}-swap")
    os.rename(tmp_path / "real-swap", tmp_path / "volumes")
    stop = threading.Event()

    def swap() -> None:
        libc = ctypes.CDLL(None)
        here, there = os.fsencode(tmp_path / "volumes"), os.fsencode(tmp_path / "link-swap")
        while not stop.is_set():
            libc.renameat2(-100, here, -100, there, 2)  # RENAME_EXCHANGE

    swapper = threading.Thread(target=swap)
    swapper.start()
    outcomes = {"bound": 0, "refused": 0}
    try:
        for _ in range(300):
            try:
                keeper.bind(MOUNT_ID, str(tmp_path / "volumes" / "pod" / "mount"))
                outcomes["bound"] += 1
            except MountError:
                outcomes["refused"] += 1
            assert os.listdir(outside / "pod") == []
            assert mounts_below(outside) == []
            try:
                keeper.unbind(str(tmp_path / "volumes" / "pod" / "mount"))
            except MountError:
                continue
    finally:
        stop.set()
        swapper.join()
        for place in ("volumes", "link-swap"):
            if not (tmp_path / place).is_symlink():
                for entry in mountinfo.at(mountinfo.read(), str(tmp_path / place / "pod" / "mount")):
                    syscalls.detach(entry.mount_point)
    assert min(outcomes.values()) > 0, outcomes


def poll_events(fd: int) -> int:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return sum(events for _, events in poll.poll(0))
