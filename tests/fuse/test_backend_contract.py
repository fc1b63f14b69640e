"""One contract, both backends: what a reader of the mount sees, and what happens when workers die or are replaced.

The raw backend is never helped by RESEND here, on any kernel.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from support.backend_mount import TIMEOUT_S, BackendMount
from support.backend_worker import pattern

from csi.fuse.handshake import BackendName
from csi.fuse.request_table import CONVICTED_AFTER, SUSPECT_AFTER
from csi.oci.digest import Digest
from csi.tree.model import BlobSpec, TreeFile, TreeSymlink

pytestmark = pytest.mark.fuse

MIB = 1 << 20
BLOB = BlobSpec(Digest.of(b"contract"), 1 << 40)
SIZES = {
    "pattern": 8 * MIB + 12345,
    "other": 3 * MIB,
    "empty": 0,
    "waits": 4096 * 64 * 1024,
    "fails": MIB,
    "bug": MIB,
    "dies": MIB,
    "deep/er/file": 100,
}
FILES: list[TreeFile | TreeSymlink] = [
    *(TreeFile(name, BLOB, 0, size, mtime_s=1_700_000_000) for name, size in SIZES.items()),
    TreeFile("run.sh", BLOB, 0, 10, executable=True),
    TreeSymlink("link", "deep/er/file"),
    TreeSymlink("dangling", "nowhere"),
    *(TreeFile(f"many/{number:05d}", BLOB, 0, number) for number in range(10_000)),
]

R = TypeVar("R")


@pytest.fixture(params=list(BackendName))
def mount(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BackendMount]:
    with BackendMount(tmp_path, request.param, FILES) as mounted:
        yield mounted


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def drop_pages(fd: int) -> None:
    """The kernel's own copy, so that the next read asks the worker."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def in_thread(work: Callable[[], R]) -> Callable[[], R]:
    """Start `work`; the result waits for it, and raises what it raised."""
    results: list[R] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as exc:
            errors.append(exc)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def result() -> R:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive(), "still waiting"
        if errors:
            raise errors[0]
        return results[0]

    return result


def reader_process(path: Path, offset: int, size: int = 4096, before: str = "") -> subprocess.Popen[str]:
    """A process that reads once and prints how many bytes it got. `before`: lines it runs first."""
    script = f"""
import mmap, os, signal
fd = os.open({str(path)!r}, os.O_RDONLY)
{before}
print(len(os.pread(fd, {size}, {offset})), flush=True)
os._exit(0)  # no timer may hit a half ended interpreter
"""
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)


# What a reader sees


def test_every_byte_and_the_ends_of_files(mount: BackendMount) -> None:
    for name, size in SIZES.items():
        if name in ("pattern", "other", "empty", "deep/er/file"):
            content = (mount.path / name).read_bytes()
            assert content == pattern(Path(name).name, 0, size)
    with opened(mount.path / "pattern") as fd:
        assert os.pread(fd, 100, SIZES["pattern"] - 10) == pattern("pattern", SIZES["pattern"] - 10, 10)
        assert os.pread(fd, 100, SIZES["pattern"]) == b""
        assert os.pread(fd, 100, SIZES["pattern"] + MIB) == b""


def test_random_reads_and_a_mapping_agree(mount: BackendMount) -> None:
    generator = random.Random(3)
    with opened(mount.path / "pattern") as fd, mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
        for _ in range(200):
            offset, size = generator.randrange(SIZES["pattern"]), generator.randrange(200_000)
            expected = pattern("pattern", offset, min(size, SIZES["pattern"] - offset))
            assert os.pread(fd, size, offset) == expected
            assert mapped[offset : offset + size] == expected
            if generator.random() < 0.1:
                drop_pages(fd)


def test_direct_reads(mount: BackendMount) -> None:
    """O_DIRECT goes past the page cache: one request per read, of the reader's own size."""
    fd = os.open(mount.path / "pattern", os.O_RDONLY | os.O_DIRECT)
    try:
        buffer = mmap.mmap(-1, 2 * MIB)
        assert os.preadv(fd, [buffer], MIB) == 2 * MIB
        assert buffer[:] == pattern("pattern", MIB, 2 * MIB)
    finally:
        os.close(fd)


def test_attributes(mount: BackendMount) -> None:
    status = (mount.path / "pattern").stat()
    assert (status.st_mode, status.st_size, status.st_uid, status.st_gid) == (0o100444, SIZES["pattern"], 0, 0)
    assert (status.st_mtime_ns, status.st_blocks, status.st_blksize) == (1_700_000_000 * 10**9, 16409, MIB)
    assert (mount.path / "run.sh").stat().st_mode == 0o100555
    assert (mount.path / "deep" / "er").stat().st_mode == 0o40555
    with opened(mount.path / "pattern") as fd:
        assert os.fstat(fd).st_ino == status.st_ino


def test_names_that_are_not_there_stay_so(mount: BackendMount) -> None:
    for _ in range(3):
        for name in ("nothing", "deep/nothing", "n" * 255):
            with pytest.raises(FileNotFoundError):
                (mount.path / name).stat()
    with pytest.raises(NotADirectoryError):
        (mount.path / "pattern" / "x").stat()
    with pytest.raises(OSError, match="too long"):
        (mount.path / ("n" * 256)).stat()


def test_a_directory_of_ten_thousand(mount: BackendMount) -> None:
    names = [f"{number:05d}" for number in range(10_000)]
    for _ in range(2):
        assert sorted(os.listdir(mount.path / "many")) == names
    with os.scandir(mount.path / "many") as entries:
        assert all(entry.is_file() and entry.stat().st_size == int(entry.name) for entry in entries)
    with pytest.raises(NotADirectoryError):
        os.listdir(mount.path / "pattern")


def test_a_listing_goes_on_in_another_worker(mount: BackendMount) -> None:
    with os.scandir(mount.path / "many") as entries:
        first = [next(entries).name for _ in range(3)]
        mount.hand_over()
        rest = [entry.name for entry in entries]
    assert sorted(first + rest) == [f"{number:05d}" for number in range(10_000)]


def test_symlinks(mount: BackendMount) -> None:
    assert os.readlink(mount.path / "link") == "deep/er/file"
    assert (mount.path / "link").read_bytes() == pattern("file", 0, 100)
    assert (mount.path / "link").lstat().st_mode & 0o170000 == 0o120000
    assert {entry.name for entry in os.scandir(mount.path) if entry.is_symlink()} == {"link", "dangling"}
    with pytest.raises(FileNotFoundError):
        (mount.path / "dangling").read_bytes()
    with pytest.raises(OSError, match="Too many levels"):
        os.open(mount.path / "link", os.O_RDONLY | os.O_NOFOLLOW)
    with pytest.raises(OSError, match="Invalid argument"):
        os.readlink(mount.path / "pattern")


def test_statfs(mount: BackendMount) -> None:
    total = sum(file.length for file in FILES if isinstance(file, TreeFile))
    found = os.statvfs(mount.path)
    assert (found.f_blocks, found.f_bfree, found.f_frsize, found.f_namemax) == (-(-total // 4096), 0, 4096, 255)
    assert (found.f_files, found.f_ffree) == (len(FILES) + 4, 0)  # the root, deep, er, many


@pytest.mark.parametrize(
    ("call", "number"),
    [
        (lambda path: os.open(path / "pattern", os.O_WRONLY), errno.EROFS),
        (lambda path: os.open(path / "pattern", os.O_RDONLY | os.O_TRUNC), errno.EROFS),
        (lambda path: os.mkdir(path / "new"), errno.EROFS),
        (lambda path: os.unlink(path / "pattern"), errno.EROFS),
        (lambda path: os.getxattr(path / "pattern", "user.x"), errno.ENOTSUP),
        (lambda path: os.listxattr(path / "pattern"), errno.ENOTSUP),
        (lambda path: (path / "fails").read_bytes(), errno.EIO),
    ],
)
def test_what_is_refused(mount: BackendMount, call: Callable[[Path], object], number: int) -> None:
    for _ in range(2):
        with pytest.raises(OSError) as caught:
            call(mount.path)
        assert caught.value.errno == number
    assert (mount.path / "other").read_bytes() == pattern("other", 0, SIZES["other"])


def test_a_bug_costs_one_read_and_not_the_mount(mount: BackendMount) -> None:
    with pytest.raises(OSError, match="Input/output error"):
        (mount.path / "bug").read_bytes()
    assert (mount.path / "other").read_bytes() == pattern("other", 0, SIZES["other"])


# Reads that wait


def test_four_thousand_waiting_reads_let_others_pass(mount: BackendMount) -> None:
    with opened(mount.path / "waits") as fd:
        for number in range(4096):
            os.posix_fadvise(fd, number * 64 * 1024, 4096, os.POSIX_FADV_WILLNEED)
        mount.wait_for_waiting(4096)
        assert (mount.path / "other").read_bytes() == pattern("other", 0, SIZES["other"])
        assert len(os.listdir(mount.path / "many")) == 10_000
        assert (mount.path / "deep" / "er" / "file").stat().st_size == 100
        mount.command("release")
        for number in (0, 4095, 17):
            assert os.pread(fd, 4096, number * 64 * 1024) == pattern("waits", number * 64 * 1024, 4096)


def test_a_killed_reader_is_gone_at_once_and_takes_nobody_with_it(mount: BackendMount) -> None:
    reader = reader_process(mount.path / "waits", 0)
    mount.wait_for_waiting(1)
    reader.kill()
    reader.communicate(timeout=TIMEOUT_S)
    assert reader.returncode == -signal.SIGKILL
    assert (mount.path / "other").read_bytes() == pattern("other", 0, SIZES["other"])
    mount.command("release")
    with opened(mount.path / "waits") as fd:
        assert os.pread(fd, 4096, 0) == pattern("waits", 0, 4096)


TIMER = "signal.signal(signal.SIGALRM, lambda *_: None); signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)"


@pytest.mark.parametrize(
    "before",
    [
        TIMER,
        f"os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM); {TIMER}",
        f"{TIMER}; m = mmap.mmap(fd, 0, prot=mmap.PROT_READ); m.madvise(mmap.MADV_RANDOM); m[1 << 20]",
    ],
    ids=["sequential", "random", "mapping"],
)
def test_a_signal_that_does_not_kill_ends_no_read(mount: BackendMount, before: str) -> None:
    """Timers interrupt readers all the time; an error in reply would be SIGBUS in a mapping."""
    reader = reader_process(mount.path / "waits", 0, before=before)
    mount.wait_for_waiting(1)
    time.sleep(0.3)
    assert reader.poll() is None
    mount.command("release")
    assert (reader.communicate(timeout=TIMEOUT_S)[0].strip(), reader.returncode) == ("4096", 0)


def test_readers_killed_between_any_two_steps_freeze_nobody(mount: BackendMount) -> None:
    """A request may be withdrawn while a worker is about to read it."""
    stop = threading.Event()

    def read_on() -> int:
        generator, count = random.Random(), 0
        with opened(mount.path / "pattern") as fd:
            while not stop.is_set():
                drop_pages(fd)
                offset = generator.randrange(SIZES["pattern"] - 5000)
                assert os.pread(fd, 5000, offset) == pattern("pattern", offset, 5000)
                count += 1
        return count

    others = [in_thread(read_on) for _ in range(2)]
    generator = random.Random(11)
    victim = "while True: os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED); os.pread(fd, 4096, 0); os.stat(f'/proc/self/fd/{fd}')"
    deadline = time.monotonic() + 6
    kills = 0
    while time.monotonic() < deadline:
        victims = [reader_process(mount.path / name, 0, 4096, victim) for name in ("other", "pattern")]
        time.sleep(0.1 + generator.random() * 0.05)
        for process in victims:
            process.kill()
            process.communicate(timeout=TIMEOUT_S)
            kills += 1
    stop.set()
    assert all(result() > 100 for result in others)
    assert kills >= 10


# Workers that die and are replaced


def needs_resend(mount: BackendMount) -> None:
    if mount.backend is BackendName.PYFUSE3 and not mount.can_resend:
        pytest.skip("this kernel has no FUSE_NOTIFY_RESEND (Linux 6.9)")


def test_reads_that_a_killed_worker_had_taken_are_answered_by_the_next(mount: BackendMount) -> None:
    needs_resend(mount)
    with opened(mount.path / "waits") as fd:
        results = [
            in_thread(lambda offset=number * MIB: os.pread(fd, 10_000, offset))  # type: ignore[misc]
            for number in range(8)
        ]
        mount.wait_for_waiting(8)
        mount.kill()
        mount.start_after_crash()
        assert (mount.path / "other").read_bytes() == pattern("other", 0, SIZES["other"])
        mount.kill()
        mount.start_after_crash()
        mount.command("release")
        for number, result in enumerate(results):
            assert result() == pattern("waits", number * MIB, 10_000)


def test_requests_made_while_nobody_serves_wait_for_the_next_worker(mount: BackendMount) -> None:
    mount.kill()
    status = in_thread(lambda: (mount.path / "deep" / "er" / "file").stat().st_size)
    content = in_thread((mount.path / "other").read_bytes)
    time.sleep(0.1)
    mount.start_after_crash()
    assert status() == 100
    assert content() == pattern("other", 0, SIZES["other"])


def test_a_planned_hand_over_loses_nothing(mount: BackendMount) -> None:
    stop = threading.Event()

    def read_on() -> int:
        count = 0
        with opened(mount.path / "pattern") as fd:
            while True:  # once more after the last hand-over
                last = stop.is_set()
                drop_pages(fd)
                assert os.pread(fd, 300_000, count % 7 * MIB) == pattern("pattern", count % 7 * MIB, 300_000)
                assert not (mount.path / f"absent-{count}").exists()
                count += 1
                if last:
                    return count

    readers = [in_thread(read_on) for _ in range(3)]
    for _ in range(5):
        mount.hand_over()
    stop.set()
    assert all(result() > 0 for result in readers)


def test_a_waiting_read_survives_a_hand_over_that_does_not_wait_for_it(mount: BackendMount) -> None:
    needs_resend(mount)
    with opened(mount.path / "waits") as fd:
        result = in_thread(lambda: os.pread(fd, 10_000, 0))
        mount.wait_for_waiting(1)
        mount.command("stop")
        with pytest.raises(AssertionError):
            mount.expect("stopped", timeout_s=0.3)
        mount.kill()
        mount.start_after_crash()
        mount.command("release")
        assert result() == pattern("waits", 0, 10_000)


def test_random_kills_under_load(mount: BackendMount) -> None:
    needs_resend(mount)
    script = f"""
import mmap, os, random, sys
sys.path[:0] = {sys.path!r}
from support.backend_worker import pattern
fd = os.open({str(mount.path / "pattern")!r}, os.O_RDONLY)
mapped = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
count = 0
while not os.path.exists({str(mount.path.parent / "stop")!r}):
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    offset, size = random.randrange({SIZES["pattern"]} - 200000), random.randrange(200000)
    expected = pattern('pattern', offset, size)
    assert os.pread(fd, size, offset) == expected
    assert mapped[offset:offset + size] == expected
    assert not os.path.exists({str(mount.path)!r} + f'/absent-{{random.random()}}')
    count += 1
print(count)
"""
    readers = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    generator = random.Random(5)
    for _ in range(12):
        time.sleep(0.05 + generator.random() * 0.3)
        mount.kill()
        mount.start_after_crash()
    (mount.path.parent / "stop").touch()
    results = [(int(reader.communicate(timeout=TIMEOUT_S)[0] or 0), reader.returncode) for reader in readers]
    assert all(status == 0 and count > 10 for count, status in results), results


@pytest.mark.parametrize("mount", [BackendName.RAW], indirect=True)
def test_a_request_that_kills_every_worker_is_refused_alone(mount: BackendMount) -> None:
    """Only the raw backend can tell: it knows what was being worked on."""
    with opened(mount.path / "waits") as fd:
        waiting = in_thread(lambda: os.pread(fd, 4096, 0))
        mount.wait_for_waiting(1)
        poison = in_thread((mount.path / "dies").read_bytes)
        deaths = 0
        while mount.died(within_s=3.0):
            deaths += 1
            mount.start_after_crash()
        # The kernel asks for a page again after its read-ahead failed: one conviction each.
        assert deaths == 2 * (SUSPECT_AFTER + CONVICTED_AFTER)
        with pytest.raises(OSError, match="Input/output error"):
            poison()
        assert (mount.path / "other").read_bytes() == pattern("other", 0, SIZES["other"])
        mount.command("release")
        assert waiting() == pattern("waits", 0, 4096)


def test_the_end_of_the_connection_ends_the_worker(mount: BackendMount) -> None:
    assert (mount.path / "other").read_bytes() == pattern("other", 0, SIZES["other"])
    mount.unmount()
    mount.expect("stopped")
