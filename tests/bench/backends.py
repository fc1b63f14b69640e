"""The two FUSE backends against reading the cache's own files, in the same run and in turn.

Two request sizes: 1 MiB (the default read-ahead) and 128 KiB (the kernel's own read-ahead, what random-ish readers
get). Cold: the first sequential read, fetching included. Warm: the kernel's FUSE pages dropped, the cache's kept, so
every byte passes through the worker. CPU: user and system time of the worker. Latency: 4 KiB at random offsets with
no read-ahead, each one request.
"""

from __future__ import annotations

import functools
import os
import random
import shutil
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from support.node_process import NodeProcess

GIB = 1 << 30
BACKENDS = ("pyfuse3", "raw")
READ_AHEAD_KB = {"1 MiB": 16384, "128 KiB": 128}
_LATENCY_READS = 2000
_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """User and system time a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def measure(directory: Path, reference: str, size: int, rounds: int) -> list[tuple[str, float, str]]:
    """Rows of name, value, unit; medians of `rounds`."""
    found: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds):
        for request, read_ahead in READ_AHEAD_KB.items():
            for backend in BACKENDS if number % 2 else reversed(BACKENDS):
                place = directory / f"{backend}-{read_ahead}"
                with NodeProcess(place, f"--fuse-backend={backend}", f"--read-ahead-kb={read_ahead}") as node:
                    _one(node, reference, size, f"{backend}, {request} requests", found)
                shutil.rmtree(place)
    rows = []
    for name, values in found.items():
        unit = name.rpartition(", ")[2]
        rows.append((name.rpartition(", ")[0], round(statistics.median(values), 3), unit))
    return rows


def _one(node: NodeProcess, reference: str, size: int, name: str, found: dict[str, list[float]]) -> None:
    target = node.target()
    node.publish(reference, target)
    weights = target / "model.safetensors"
    gib = size / GIB
    worker = node.status()[0]["worker_pid"]
    before = cpu_seconds(worker)
    found[f"{name}: cold, GiB/s"].append(gib / timed(functools.partial(cat, weights)))
    found[f"{name}: cold worker CPU, s/GiB"].append((cpu_seconds(worker) - before) / gib)
    settled(node)
    segments = cached_files(node)
    cat(*segments)
    drop(weights)
    before = cpu_seconds(worker)
    warm = timed(functools.partial(cat, weights))
    found[f"{name}: warm worker CPU, s/GiB"].append((cpu_seconds(worker) - before) / gib)
    native = timed(functools.partial(cat, *segments))
    found[f"{name}: warm, GiB/s"].append(gib / warm)
    found[f"{name}: warm / native, ratio"].append(warm / native)
    drop(weights)
    found[f"{name}: one random read of 4 KiB, us"].append(latency(weights, size) * 1e6)
    status = Path(f"/proc/{worker}/status").read_text()
    rss = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    found[f"{name}: worker RSS, MiB"].append(int(rss.split()[1]) / 1024)
    node.unpublish(target)


def cached_files(node: NodeProcess) -> list[Path]:
    """The files with the bytes of the only model: of the proven blob, or what the mount has fetched."""
    cache = node.data_dir / "cache"
    return sorted(cache.rglob("blobs/*/data")) or sorted(cache.rglob("seg-*"))


def settled(node: NodeProcess) -> None:
    """Wait until nothing is fetched or hashed any more."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        fetcher = node.status()[0]["fetcher_pid"]
        before = cpu_seconds(fetcher)
        time.sleep(0.5)
        if cpu_seconds(fetcher) - before < 0.02:
            return


def latency(path: Path, size: int) -> float:
    """Seconds, the median."""
    generator = random.Random(1)
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        times = []
        for _ in range(_LATENCY_READS):
            offset = generator.randrange(size // 4096) * 4096
            started = time.perf_counter()
            os.pread(fd, 4096, offset)
            times.append(time.perf_counter() - started)
        return statistics.median(times)
    finally:
        os.close(fd)


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    started = time.monotonic()
    work()
    return time.monotonic() - started


def cat(*paths: Path) -> None:
    """Read files to their end."""
    subprocess.run(["cat", *map(str, paths)], stdout=subprocess.DEVNULL, check=True)


def drop(path: Path) -> None:
    """The FUSE pages of one file; the cache file's pages stay."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
