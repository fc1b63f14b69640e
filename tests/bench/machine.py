"""What is measured with: time, processor time, memory, page cache; and what the machine is."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from support.node_process import NodeProcess, children_of

MIB, GIB = 1 << 20, 1 << 30
_TICKS = os.sysconf("SC_CLK_TCK")


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    started = time.monotonic()
    work()
    return time.monotonic() - started


def cat(*paths: Path) -> None:
    """Read files to their end."""
    subprocess.run(["cat", *map(str, paths)], stdout=subprocess.DEVNULL, check=True)


def drop(path: Path) -> None:
    """The pages of one file, of its own file system only: behind a FUSE file the cache file's pages stay."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def touch_memory(size_bytes: int) -> None:
    """Make the machine give us `size_bytes` once, in a process of its own, so that they are free again after it.

    On virtual machines the first use of a page costs more than everything measured here, and a host that takes free pages
    back does so after two seconds: so this stands right before each timed part, the baseline's too. In large pages,
    because it is large ones that are taken back.
    """
    populate = 23  # MADV_POPULATE_WRITE, Linux 5.14
    code = (
        f"import mmap\nmemory = mmap.mmap(-1, {size_bytes}, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        f"memory.madvise(mmap.MADV_HUGEPAGE)\nmemory.madvise({populate})"
    )
    subprocess.run([sys.executable, "-S", "-c", code], check=True)


def cpu_seconds(pid: int) -> float:
    """User and system time a process has used; 0 for one that is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS


def our_processes(node: NodeProcess) -> list[int]:
    """Every process of a node."""
    return sorted({node.pid} | children_of(node.pid))


def cpu_of_ours(node: NodeProcess) -> float:
    """User and system time of all of them together, so far."""
    return sum(map(cpu_seconds, our_processes(node)))


def resident_kib(pid: int) -> tuple[int, int]:
    """Rss and Pss."""
    found = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in ("Rss", "Pss"):
            found[name] = int(rest.split()[0])
    return found["Rss"], found["Pss"]


def role_of(pid: int, serving: set[int]) -> str:
    """The verb a process was started with; a child that serves no mount yet is a spare."""
    arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    if "--all-in-one" in arguments:
        return "process tree parent"
    verb = next((argument for argument in arguments[3:] if not argument.startswith("-")), "?")
    return f"spare {verb}" if verb in ("worker", "fetcher") and pid not in serving else verb


def settled(node: NodeProcess) -> None:
    """Wait until nothing is fetched, hashed or copied any more, at most a minute."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        before = cpu_of_ours(node)
        time.sleep(0.5)
        if cpu_of_ours(node) - before < 0.03:
            return


def cache_files(node: NodeProcess) -> list[Path]:
    """The files with the bytes of the only model: of the proven blob, or what the mount has fetched."""
    cache = node.data_dir / "cache"
    found = sorted(cache.rglob("blobs/*/data")) or sorted(cache.rglob("seg-*"))
    return [path for path in found if path.stat().st_size >= MIB]


def description() -> str:
    """Of this machine, for the page that shows the figures."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / MIB
    return (
        f"{os.cpu_count()} cores ({model}), {memory:.0f} GiB of memory, Linux {platform.release().split('-')[0]}, "
        f"Python {platform.python_version()}"
    )
