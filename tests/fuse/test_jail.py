"""Each forbidden thing, done for real by a process in the real jail; and that what it needs still works."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from csi.jail import landlock
from csi.jail.confinement import Policy, Role
from csi.jail.privileges import Capability

ROOT = Path(__file__).resolve().parents[2]
FORBIDDEN = {
    "read a file": "open('/etc/hostname').read()",
    "read another directory": "os.listdir('/etc')",
    "write below the cache": "open(DATA + '/new', 'w')",
    "change a mode": "os.chmod(DATA + '/file', 0o777)",
    "make a directory": "os.mkdir(DATA + '/new')",
    "remove": "os.unlink(DATA + '/file')",
    "write elsewhere": "os.open('/dev/shm', os.O_TMPFILE | os.O_RDWR)",
    "execute": "os.execv('/bin/true', ['true'])",
    "start a process": "subprocess.run(['/bin/true'])",
    "fork": "os._exit(0) if os.fork() == 0 else None",
    "internet socket": "socket.socket(socket.AF_INET)",
    "unix socket": "socket.socket(socket.AF_UNIX)",
    "netlink socket": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "mount": "call('mount', b'none', DATA.encode(), b'tmpfs', 0, None)",
    "unmount": "call('umount2', b'/proc', 2)",
    "trace": "call('ptrace', 16, os.getppid(), None, None)",
    "read another's memory": "call('process_vm_readv', os.getppid(), None, 0, None, 0, 0)",
    "new name space": "call('unshare', 0x10000000)",
    "kill": "os.kill(os.getppid(), 0)",
    "become root": "os.setuid(0)",
    "other limits": "call('prlimit', os.getppid(), 7, None, None)",
    "io_uring": "call('syscall', 425, 1, None)",
    "bpf": "call('syscall', 321 if platform.machine() == 'x86_64' else 280, 0, None, 0)",
    "user keyring": "call('syscall', 250 if platform.machine() == 'x86_64' else 219, 0, -3, 0)",
    "device control": "fcntl.ioctl(0, 0x5413)",
}
CHANGES = {"write below the cache", "make a directory", "remove"}
MAY = {
    Role.WORKER: set(),
    Role.FETCHER: CHANGES
    | {"read a file", "read another directory", "internet socket", "unix socket", "netlink socket"},
    Role.STORE: CHANGES,
}

pytestmark = pytest.mark.fuse  # needs root: to become another user


def jailed(role: Role, data_dir: Path, code: str, **changes: object) -> subprocess.CompletedProcess[str]:
    """Run `code` in the jail of `role`."""
    script = f"""
import ctypes, errno, fcntl, mmap, os, platform, socket, subprocess, sys, threading
sys.path.insert(0, {str(ROOT)!r})
from csi.jail.confinement import Confinement, Policy, Role, narrow_to
DATA = {str(data_dir)!r}
AREA = os.open(DATA + '/area', os.O_RDONLY)
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
level = Confinement(role=Role({str(role)!r}), policy=Policy.DEGRADE, data_dir=DATA, uid=64199, gid=64199,
                    **{changes!r}).enter()
{textwrap.dedent(code)}
"""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, cwd="/")


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """As a jailed user finds it: a readable file, an area of its own."""
    os.chown(tmp_path, 64199, 64199)
    (tmp_path / "file").write_text("content")
    for name in ("area", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "block").write_text(name)
        os.chown(tmp_path / name, 64199, 64199)
        os.chown(tmp_path / name / "block", 64199, 64199)
    os.chown(tmp_path / "file", 64199, 64199)
    for directory in (tmp_path, *tmp_path.parents):
        if directory.stat().st_mode & 0o001 == 0:
            directory.chmod(directory.stat().st_mode | 0o011)
    return tmp_path


@pytest.fixture(scope="module", autouse=True)
def needs_landlock() -> None:
    if landlock.abi() < 4:
        pytest.skip("this kernel has no Landlock for files and TCP (Linux 6.7)")


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("what", list(FORBIDDEN))
def test_what_is_forbidden(role: Role, what: str, data_dir: Path) -> None:
    expected = "done" if what in MAY[role] else "denied"
    done = jailed(
        role,
        data_dir,
        f"""
        try:
            {FORBIDDEN[what]}
        except OSError as exc:
            assert exc.errno in (errno.EPERM, errno.EACCES), exc
            print("denied")
        else:
            print("done")
        """,
    )
    assert (done.stdout.strip(), done.returncode) == (expected, 0), done.stderr


@pytest.mark.parametrize("role", list(Role))
def test_what_a_role_needs(role: Role, data_dir: Path) -> None:
    done = jailed(
        role,
        data_dir,
        """
        assert level.missing == () and level.seccomp and level.own_user, level
        assert open(DATA + '/file').read() == 'content'
        fd = os.memfd_create('x')
        os.write(fd, b'abc')
        assert mmap.mmap(fd, 3)[:] == b'abc'
        thread = threading.Thread(target=print, args=('thread',))
        thread.start()
        thread.join()
        ours, theirs = socket.socketpair()
        socket.send_fds(ours, [b'x'], [fd])
        assert socket.recv_fds(theirs, 1, 1)[0] == b'x'
        """,
    )
    assert (done.stdout.strip(), done.returncode) == ("thread", 0), done.stderr


def test_a_worker_reads_its_area_only_once_it_knows_it(data_dir: Path) -> None:
    done = jailed(
        Role.WORKER,
        data_dir,
        """
        assert os.open('other/block', os.O_RDONLY, dir_fd=os.open(DATA, os.O_RDONLY))
        narrow_to(Role.WORKER, AREA)
        assert os.read(os.open('block', os.O_RDONLY, dir_fd=AREA), 9) == b'area'
        for path in ('/other/block', '/file', '/area/../other/block'):
            try:
                open(DATA + path)
            except PermissionError:
                print('denied')
        """,
    )
    assert (done.stdout.split(), done.returncode) == (["denied"] * 3, 0), done.stderr


def test_a_fetcher_changes_its_area_only_once_it_knows_it(data_dir: Path) -> None:
    done = jailed(
        Role.FETCHER,
        data_dir,
        """
        narrow_to(Role.FETCHER, AREA)
        os.mkdir('blob', dir_fd=AREA)
        fd = os.open('blob/seg', os.O_RDWR | os.O_CREAT, 0o640, dir_fd=AREA)
        os.posix_fallocate(fd, 0, 100)
        os.pwrite(fd, b'x', 5)
        os.rename('blob/seg', 'blob/other', src_dir_fd=AREA, dst_dir_fd=AREA)
        for attempt in (lambda: open(DATA + '/new', 'w'), lambda: open(DATA + '/other/block', 'r+'),
                        lambda: os.unlink(DATA + '/file'), lambda: os.rename(DATA + '/area/blob', DATA + '/blob')):
            try:
                attempt()
            except OSError as exc:
                assert exc.errno in (errno.EACCES, errno.EPERM, errno.EXDEV), exc
                print('denied')
        """,
    )
    assert (done.stdout.split(), done.returncode) == (["denied"] * 4, 0), done.stderr


def test_a_fetcher_connects_and_does_not_listen(data_dir: Path) -> None:
    done = jailed(
        Role.FETCHER,
        data_dir,
        """
        try:
            socket.create_connection(('127.0.0.1', 1), timeout=5)
        except ConnectionRefusedError:
            print('tried')
        assert socket.getaddrinfo('localhost', 80)
        listener = socket.socket()
        try:
            listener.bind(('127.0.0.1', 8099))
        except PermissionError:
            print('denied')
        """,
    )
    assert (done.stdout.split(), done.returncode) == (["tried", "denied"], 0), done.stderr


def test_who_outgrows_its_memory_ends_alone(data_dir: Path) -> None:
    done = jailed(Role.WORKER, data_dir, "hold = [bytes(1 << 20) for _ in range(600)]", memory_mib=256)
    assert done.returncode == 1
    assert "MemoryError" in done.stderr


def test_a_jail_that_does_not_hold_is_seen() -> None:
    """The self-test, where there is no jail at all, finds every hole it looks for but the mount, which needs root."""
    script = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from csi.jail.confinement import Level, Role, escapes
os.setresuid(64199, 64199, 64199)
print('; '.join(escapes(Role.WORKER, Level(own_user=True, landlock_abi=7, seccomp=True))))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, cwd="/")
    found = done.stdout.strip().split("; ")
    assert {"creating a file in /dev/shm", "reading /etc/passwd", "execve", "ptrace", "fork", "socket"} <= set(found), (
        done.stderr
    )


def test_only_the_wanted_capabilities_are_left() -> None:
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from csi.jail.privileges import Capability, keep_only
keep_only({{Capability.KILL, Capability.SETUID}})
print(open('/proc/self/status').read())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True)
    facts = dict(line.split(":\t", 1) for line in done.stdout.splitlines() if ":\t" in line)
    wanted = 1 << Capability.KILL | 1 << Capability.SETUID
    assert [int(facts[name], 16) for name in ("CapPrm", "CapEff", "CapBnd")] == [wanted] * 3
    assert [int(facts[name], 16) for name in ("CapInh", "CapAmb")] == [0, 0]


def test_a_kernel_without_a_part(data_dir: Path) -> None:
    """Refused or degraded, as the administrator says. In a child: a jail is for good."""
    code = """
import sys
sys.path.insert(0, {root!r})
from csi.jail import landlock
landlock.abi = lambda: 0
from csi.jail.confinement import Confinement, Policy, Role
level = Confinement(role=Role.WORKER, policy=Policy({policy!r}), data_dir={data!r}, uid=64199, gid=64199).enter()
print(level.landlock_abi, level.missing)
"""
    results = {}
    for policy in Policy:
        script = code.format(root=str(ROOT), policy=str(policy), data=str(data_dir))
        results[policy] = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=30, cwd="/"
        )
    assert results[Policy.REQUIRE].returncode == 1
    assert "this kernel lacks Landlock" in results[Policy.REQUIRE].stderr
    assert results[Policy.DEGRADE].returncode == 0, results[Policy.DEGRADE].stderr
    assert results[Policy.DEGRADE].stdout.startswith("0 (")
    assert "weaker jail" in results[Policy.DEGRADE].stderr
