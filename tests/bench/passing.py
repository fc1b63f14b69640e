"""FUSE passthrough, plain files, and the same reads through the worker, against the plain file in the cache: in one run, in turn.

Every ratio is our time ÷ that of the cache's own file, read in the same way. Warm: the file's pages are in memory (and, through
the worker, the mount's own are dropped before). Cold: they are dropped too, so the disk is read.
"""

from __future__ import annotations

import functools
import mmap
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.backends import latency
from bench.machine import GIB, MIB, cat, cpu_seconds, drop, settled, timed
from bench.table import Row, Samples
from support.node_process import NodeProcess

_PAGE = 4096
_TURNS = 3
"""Of each warm read in a round: one takes a tenth of a second."""
_WAYS = {
    "passthrough": ("--passthrough=auto", "--seal=never"),
    "sealed": ("--passthrough=off", "--seal=always"),
    "through the worker": ("--passthrough=off", "--seal=never"),
}
_GOALS = {"sealed: warm, 1 MiB reads ÷ the plain file": 1.03}
_UNITS = {
    "warm, 1 MiB reads ÷ the plain file": "ratio",
    "warm, 1 MiB reads": "GiB/s",
    "warm, 1 MiB reads, worker CPU": "s/GiB",
    "warm, mapped ÷ the plain file": "ratio",
    "warm, mapped": "GiB/s",
    "warm, mapped, worker CPU": "s/GiB",
    "warm, 4 KiB at random ÷ the plain file": "ratio",
    "cold disk, 1 MiB reads ÷ the plain file": "ratio",
    "cold disk, 1 MiB reads": "GiB/s",
}


def passing_rows(samples: Samples) -> Iterator[Row]:
    """Rows of what `measure_round` brought."""
    for way in _WAYS:
        for what, unit in _UNITS.items():
            name = f"{way}: {what}"
            yield from samples.fact(name, unit, _GOALS.get(name))


def measure_round(directory: Path, reference: str, size: int, samples: Samples) -> None:
    """All ways; who is first changes from round to round."""
    number = len(samples.values[f"passthrough: {next(iter(_UNITS))}"])
    for way in _WAYS if number % 2 else reversed(_WAYS):
        place = directory / "way"
        try:
            with NodeProcess(place, *_WAYS[way]) as node:
                _one(node, reference, size, way, samples)
        finally:
            shutil.rmtree(place, ignore_errors=True)


def _one(node: NodeProcess, reference: str, size: int, way: str, samples: Samples) -> None:
    target = node.target()
    node.publish(reference, target)
    weights = target / "model.safetensors"
    cat(weights)
    _until(lambda: bool(_proven(node)))
    settled(node)
    if way == "passthrough":
        _until(lambda: bool(node.status()[0]["passthrough"]["blobs"]))
    if way == "sealed":
        node.unpublish(target)
        node.publish(reference, target)
        if not node.status()[0]["sealed"]["targets"]:
            raise SystemExit(f"the model is not shown as plain files: {node.status()[0]['sealed']}")
    (plain,) = _proven(node)
    worker, gib = node.status()[0]["worker_pid"], size / GIB
    reads: dict[str, Callable[[Path], object]] = {
        "warm, 1 MiB reads": functools.partial(read_by, MIB),
        "warm, mapped": touch_pages,
    }
    for name, read in reads.items():
        ours: list[float] = []
        theirs: list[float] = []
        cpu = 0.0
        for _ in range(_TURNS):
            _warm(plain, weights)
            before = cpu_seconds(worker)
            ours.append(timed(functools.partial(read, weights)))
            cpu += cpu_seconds(worker) - before
            theirs.append(timed(functools.partial(read, plain)))
        samples.add(f"{way}: {name}, worker CPU", cpu / gib / _TURNS)
        samples.add(f"{way}: {name}", gib / statistics.median(ours))
        samples.add(f"{way}: {name} ÷ the plain file", statistics.median(ours) / statistics.median(theirs))
    _warm(plain, weights)
    plain_s = latency(plain, size)
    samples.add(f"{way}: warm, 4 KiB at random ÷ the plain file", latency(weights, size) / plain_s)
    times = []
    for path in (weights, plain):
        drop(weights)
        drop(plain)
        times.append(timed(functools.partial(read_by, MIB, path)))
    samples.add(f"{way}: cold disk, 1 MiB reads ÷ the plain file", times[0] / times[1])
    samples.add(f"{way}: cold disk, 1 MiB reads", gib / times[0])
    node.unpublish(target)


def _warm(plain: Path, shown: Path) -> None:
    """The cache's file in memory, and nothing of the mount's own. In this order: the two may be one file."""
    drop(shown)
    cat(plain)


def _proven(node: NodeProcess) -> list[Path]:
    return list((node.data_dir / "cache").rglob("blobs/sha256-*/data"))


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("the blob was never proven, or is not passed through; see the node's status")
        time.sleep(0.1)


def read_by(length: int, path: Path) -> None:
    """Read a file to its end into one buffer."""
    buffer = memoryview(mmap.mmap(-1, length))
    fd = os.open(path, os.O_RDONLY)
    while os.readv(fd, [buffer]):
        pass
    os.close(fd)


def touch_pages(path: Path) -> None:
    """Map a file and look at one byte of each page."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        for start in range(0, len(mapped), 64 * MIB):
            bytes(memoryview(mapped)[start : start + 64 * MIB : _PAGE])
