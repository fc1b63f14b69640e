"""Benchmarks: ours against a baseline in the same run, as ratios. `python tests/bench/run.py --directory DIR --tools DIR`.

Every ratio is our time ÷ theirs, median of the rounds, ours and theirs in turn. Before each timed part memory is
touched once: on virtual machines the first use of a page costs more than everything measured here, and whoever comes
second would find it done. Nothing fails on a time; goals are shown as met or not.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2] / "deploy" / "demo")]

from bench import backends, publishes  # noqa: E402
from bench.backends import cached_files, cat, drop, timed  # noqa: E402
from registry_process import RegistryProcess, find_or_install_registry  # noqa: E402
from support.node_process import COMMAND, NodeProcess, children_of  # noqa: E402

_MIB, _GIB = 1 << 20, 1 << 30
_CURLS = 4


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table and of bench.json. `goal` is the largest value that meets it, None for plain facts."""

    name: str
    value: float
    unit: str
    goal: float | None = None
    met: bool | None = None

    @classmethod
    def against(cls, name: str, value: float, unit: str, goal: float) -> Row:
        """A row with a goal."""
        return cls(name, round(value, 3), unit, goal, value <= goal)


def touch_memory(size_bytes: int) -> None:
    """Make the machine give us `size_bytes` once, in a process of its own, so that they are free again after it."""
    code = f"import mmap; mmap.mmap(-1, {size_bytes}, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)"
    subprocess.run([sys.executable, "-c", code], check=True)


def curl_into_one_file(url: str, size: int, path: Path) -> None:
    """The baseline: parallel ranged curl into one preallocated file, then cat."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.posix_fallocate(fd, 0, size)
    step = -(-size // _CURLS)
    running = []
    for first in range(0, size, step):
        out = os.open(path, os.O_WRONLY)
        os.lseek(out, first, os.SEEK_SET)
        command = ["curl", "-sf", "-r", f"{first}-{min(size, first + step) - 1}", url]
        running.append(subprocess.Popen(command, stdout=out))
        os.close(out)
    os.close(fd)
    for process in running:
        if process.wait():
            raise SystemExit(f"curl failed with status {process.returncode}")
    cat(path)


def push_random_model(registry: RegistryProcess, directory: Path, size: int) -> tuple[str, str]:
    """A model of one weight file: its pinned reference, and the URL of its blob."""
    directory.mkdir()
    path = directory / "model.safetensors"
    generator = random.Random(size)
    with open(path, "wb") as file:
        for _ in range(size // (16 * _MIB)):
            file.write(generator.randbytes(16 * _MIB))
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    name = f"{registry.host}/bench/model"
    pushed = subprocess.run(
        [*COMMAND, "push", str(directory), f"{name}:v1"], check=True, capture_output=True, text=True
    )
    shutil.rmtree(directory)
    return pushed.stdout.strip(), f"http://{registry.host}/v2/bench/model/blobs/sha256:{digest}"


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


def measure(directory: Path, tools: Path, size: int, rounds: int) -> list[Row]:
    """All rows."""
    registry = RegistryProcess(find_or_install_registry(tools), directory / "registry")
    registry.start()
    first_bytes: list[float] = []
    cold: list[float] = []
    baseline: list[float] = []
    warm: list[float] = []
    plain: list[float] = []
    sizes: dict[str, tuple[int, int]] = {}
    of_backends: list[tuple[str, float, str]] = []
    of_publishes: publishes.Rows = []
    try:
        print(f"pushing a model of {size / _GIB:.1f} GiB", flush=True)
        reference, url = push_random_model(registry, directory / "source", size)
        subprocess.run(["curl", "-sf", "-o", "/dev/null", url], check=True)
        for number in range(rounds):
            node_directory = directory / f"node-{number}"
            touch_memory(3 * size)
            with NodeProcess(node_directory) as node:
                target = node.target()
                weights = target / "model.safetensors"
                started = time.monotonic()
                node.publish(reference, target)
                published = time.monotonic()
                with open(weights, "rb", buffering=0) as file:
                    file.read(_MIB)
                first_bytes.append(time.monotonic() - started)
                cat(weights)
                cold.append(time.monotonic() - published)
                drop(weights)
                warm.append(timed(functools.partial(cat, weights)))
                plain.append(timed(functools.partial(cat, *cached_files(node))))
                mount = node.status()[0]
                serving = {mount["worker_pid"], mount["fetcher_pid"]}
                pids = sorted({node.pid} | children_of(node.pid))
                sizes = {role_of(pid, serving): resident_kib(pid) for pid in pids}
                node.unpublish(target)
            shutil.rmtree(node_directory)
            touch_memory(3 * size)
            baseline.append(timed(lambda: curl_into_one_file(url, size, directory / "baseline")))
            os.unlink(directory / "baseline")
            print(f"round {number + 1}: cold {cold[-1]:.2f} s, curl and cat {baseline[-1]:.2f} s", flush=True)
        print("the two FUSE backends", flush=True)
        of_backends = backends.measure(directory, reference, size, rounds)
        print("many publishes at once", flush=True)
        of_publishes = publishes.measure(directory, registry)
    finally:
        registry.stop()
    gib = size / _GIB
    ratios = [ours / theirs for ours, theirs in zip(cold, baseline, strict=True)]
    warm_ratios = [ours / theirs for ours, theirs in zip(warm, plain, strict=True)]
    rows = [
        Row("publish to first 1 MiB of a weight file", round(statistics.median(first_bytes) * 1000, 1), "ms"),
        Row.against(f"cold sequential {gib:g} GiB / {_CURLS} curl then cat", statistics.median(ratios), "ratio", 1.0),
        Row("cold sequential through the mount", round(gib / statistics.median(cold), 2), "GiB/s"),
        Row("4 curl then cat", round(gib / statistics.median(baseline), 2), "GiB/s"),
        Row.against("second read, FUSE pages dropped / cat of the cache", statistics.median(warm_ratios), "ratio", 4.0),
        Row("second read, FUSE pages dropped", round(gib / statistics.median(warm), 2), "GiB/s"),
    ]
    rows += [Row(*row) for row in (*of_backends, *of_publishes)]
    for name, (rss, pss) in sizes.items():
        rows.append(Row(f"RSS {name}", round(rss / 1024, 1), "MiB"))
        rows.append(Row(f"Pss {name}", round(pss / 1024, 1), "MiB"))
    return rows


def main() -> int:
    """Print the table, write bench.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True, help="made for the run, removed after it")
    parser.add_argument("--tools", type=Path, required=True, help="where the unpacked registry is kept")
    parser.add_argument("--gib", type=float, default=2.0, help="size of the model (default 2)")
    parser.add_argument("--rounds", type=int, default=5, help="medians of so many (default 5)")
    args = parser.parse_args()
    directory = args.directory.absolute()
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    try:
        rows = measure(directory, args.tools.absolute(), int(args.gib * 64) * 16 * _MIB, args.rounds)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    Path("bench.json").write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")
    print(f"\n{'':56} {'value':>9} {'':6} {'goal':>6}")
    for row in rows:
        goal = "" if row.goal is None else f"≤ {row.goal:g}"
        verdict = {None: "", True: "met", False: "missed"}[row.met]
        print(f"{row.name:56} {row.value:>9} {row.unit:6} {goal:>6} {verdict}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
