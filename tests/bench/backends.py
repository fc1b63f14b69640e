"""The two FUSE backends against reading the cache's own files, in the same round and in turn.

Two request sizes: 1 MiB (the default read-ahead) and 128 KiB (the kernel's own read-ahead, what random-ish readers
get). Cold and warm as in `cases.py`. CPU: user and system time of the worker. Latency: 4 KiB at random offsets with no
read-ahead, each one request.
"""

from __future__ import annotations

import functools
import os
import random
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from bench.machine import GIB, cache_files, cat, cpu_seconds, drop, resident_kib, settled, timed, touch_memory
from bench.table import Row, Samples
from support.node_process import NodeProcess

BACKENDS = ("pyfuse3", "raw")
READ_AHEAD_KB = {"1 MiB": 16384, "128 KiB": 128}
_LATENCY_READS = 2000
_UNITS = {
    "cold": "GiB/s",
    "cold worker CPU": "s/GiB",
    "warm": "GiB/s",
    "warm worker CPU": "s/GiB",
    "warm ÷ the plain file": "ratio",
    "one random read of 4 KiB": "us",
    "worker RSS": "MiB",
}


def backend_rows(samples: Samples) -> Iterator[Row]:
    """Rows of what `measure_round` brought."""
    for request in READ_AHEAD_KB:
        for backend in BACKENDS:
            for what, unit in _UNITS.items():
                yield from samples.fact(f"{backend}, {request} requests: {what}", unit)


def measure_round(directory: Path, reference: str, size: int, samples: Samples) -> None:
    """Both backends with both request sizes; who is first changes from round to round."""
    number = len(samples.values[f"raw, 1 MiB requests: {next(iter(_UNITS))}"])
    for request, read_ahead in READ_AHEAD_KB.items():
        for backend in BACKENDS if number % 2 else reversed(BACKENDS):
            place = directory / f"{backend}-{read_ahead}"
            flags = (f"--fuse-backend={backend}", f"--read-ahead-kb={read_ahead}", "--passthrough=off")
            with NodeProcess(place, *flags) as node:
                _one(node, reference, size, f"{backend}, {request} requests", samples)
            shutil.rmtree(place)


def _one(node: NodeProcess, reference: str, size: int, name: str, samples: Samples) -> None:
    target = node.target()
    touch_memory(3 * size)
    node.publish(reference, target)
    weights = target / "model.safetensors"
    gib = size / GIB
    worker = node.status()[0]["worker_pid"]
    before = cpu_seconds(worker)
    samples.add(f"{name}: cold", gib / timed(functools.partial(cat, weights)))
    samples.add(f"{name}: cold worker CPU", (cpu_seconds(worker) - before) / gib)
    settled(node)
    files = cache_files(node)
    cat(*files)
    drop(weights)
    before = cpu_seconds(worker)
    warm = timed(functools.partial(cat, weights))
    samples.add(f"{name}: warm worker CPU", (cpu_seconds(worker) - before) / gib)
    samples.add(f"{name}: warm", gib / warm)
    samples.add(f"{name}: warm ÷ the plain file", warm / timed(functools.partial(cat, *files)))
    drop(weights)
    samples.add(f"{name}: one random read of 4 KiB", latency(weights, size) * 1e6)
    samples.add(f"{name}: worker RSS", resident_kib(worker)[0] / 1024)
    node.unpublish(target)


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
