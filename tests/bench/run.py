"""Benchmarks: ours against a baseline in the same run, as ratios. `python tests/bench/run.py --directory DIR --tools DIR`.

Every ratio is our time ÷ theirs, the median of the rounds, ours and theirs in turn against the same local registry.
Nothing fails on a time; goals are shown as met or missed. What each case does: `cases.py`. Reads of the whole model, which
its size decides, use one of --gib; cases that compare our own reads with each other one of a quarter of that, which takes
a quarter of the time. What is a fact about many publishes or two backends is measured once.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2] / "deploy" / "demo")]

from bench.backends import backend_rows  # noqa: E402
from bench.cases import CASES, CURLS, Bench  # noqa: E402
from bench.machine import GIB, MIB, description  # noqa: E402
from bench.models import push_random, put_sparse  # noqa: E402
from bench.passing import passing_rows  # noqa: E402
from bench.servers import Front  # noqa: E402
from bench.table import Row, Samples, as_markdown, as_text  # noqa: E402
from registry_process import RegistryProcess, find_or_install_registry  # noqa: E402

_SPARSE_GB = (1, 100)
_LARGE = ("sequential", "tls")
_ONCE = ("backends", "publishes")
_PSS_GOAL_MIB = 64 + 64
"""64 MiB, and the budget: the memory in which blocks are lent."""


def rows(samples: Samples, gib: float) -> Iterator[Row]:
    """The table."""
    ratio, fact = samples.ratio, samples.fact
    yield from ratio(f"cold sequential ÷ {CURLS} curl then cat", "cold", "curl", 0.7)
    yield from ratio("cold sequential ÷ our fetcher alone, then cat", "cold", "alone", 1.2)
    yield from ratio(f"cold sequential over TLS ÷ {CURLS} curl then cat", "cold TLS", "curl TLS", 1.0)
    yield from ratio("cold sequential over TLS ÷ our fetcher alone, then cat", "cold TLS", "alone TLS", 1.0)
    yield from ratio("cold sequential at 250 MB/s ÷ the download alone", "cold capped", "curl capped", 1.05)
    yield from ratio("cold, 16 readers of 2 MiB in no order ÷ sequential", "cold scattered", "cold between", 1.25)
    yield from ratio("cold, mapped, in tensor order ÷ sequential", "cold mapped", "cold between", 1.25)
    yield from ratio("cold at 20 ms a request ÷ at 1 ms", "cold 20 ms", "cold 1 ms", 1.25)
    yield from ratio("cold at 100 ms a request ÷ at 1 ms", "cold 100 ms", "cold 1 ms")
    yield from ratio("cold, cache writes of 100 MB/s ÷ unlimited", "cold slow disk", "cold quick disk", 1.25)
    yield from ratio("warm, through the worker ÷ the plain file", "warm", "plain file", 4.0)
    yield from ratio("warm, in the kernel's cache ÷ the plain file", "kernel-warm", "plain file")
    yield from ratio("cold ÷ rclone mount", "cold nginx", "cold rclone", 0.67)
    yield from ratio("warm, through the worker ÷ rclone mount", "warm nginx", "warm rclone", 0.67)
    small, large = (f"first byte {gigabytes} GB" for gigabytes in _SPARSE_GB)
    yield from ratio("publish to first byte, 100 GB ÷ 1 GB", large, small, 1.2)
    yield from fact("CPU until the last byte is read, TLS, chunk, all our processes", "s/GiB", 2.0, of="CPU TLS")
    yield from fact("CPU until nothing is left to do, TLS, chunk", "s/GiB", of="CPU TLS settled")
    yield from fact("Pss of all our processes, one busy mount", "MiB", _PSS_GOAL_MIB, of="Pss")
    for name, what in (("cold", "cold sequential"), ("curl", "curl then cat"), ("warm", "warm, through the worker")):
        if values := samples.values.get(name):
            yield Row.of(what, "GiB/s", [gib / value for value in values])
    for gigabytes in _SPARSE_GB:
        yield from fact(f"publish to first byte, {gigabytes} GB", "s", of=f"first byte {gigabytes} GB")
    for name in sorted(samples.values):
        if name.startswith(("Pss ", "RSS ")):
            yield from fact(name, "MiB")
    yield from backend_rows(samples)
    yield from passing_rows(samples)
    yield from (Row.of(name, unit, [value]) for name, value, unit in samples.facts)


def measure(args: argparse.Namespace, directory: Path, samples: Samples, save: Callable[[], object]) -> list[str]:
    """All rounds of all cases, until a signal ends them; `save` after each round. What failed."""
    binary = find_or_install_registry(args.tools)
    registry = RegistryProcess(binary, directory / "registry")
    registry.start()
    failed: list[str] = []
    try:
        sizes = [int(gib * 64) * 16 * MIB for gib in (args.gib, _part_gib(args.gib))]
        print("pushing models of " + " and ".join(f"{size / GIB:g} GiB" for size in sizes), flush=True)
        models = {size: push_random(registry, directory / f"source-{size}", size) for size in set(sizes)}
        large, part = (models[size] for size in sizes)
        front = Front(args.tools, directory / "front", registry)
        try:
            for model in models.values():
                subprocess.run(["curl", "-sf", "-o", "/dev/null", model.url(registry.host)], check=True)
            sparse = {gigabytes: put_sparse(registry, gigabytes * 10**9) for gigabytes in _SPARSE_GB}
            bench = Bench(directory, args.tools, binary, registry, front, large, sparse, samples)
            smaller = dataclasses.replace(bench, model=part)
            for number in range(args.rounds):
                for name in args.only or CASES:
                    if number and name in _ONCE:
                        continue
                    started = time.monotonic()
                    try:
                        CASES[name](bench if name in _LARGE else smaller)
                    except (Exception, SystemExit) as exc:  # the others are worth knowing
                        failed.append(f"round {number + 1}: {name} failed: {exc!r}")
                        print(failed[-1], flush=True)
                    print(
                        f"round {number + 1} of {args.rounds}: {name}, {time.monotonic() - started:.0f} s", flush=True
                    )
                save()
        except KeyboardInterrupt:
            failed.append("interrupted: the table is of what was measured before")
        finally:
            front.stop()
    finally:
        registry.stop()
    return failed


def _part_gib(gib: float) -> float:
    return min(gib, max(1.0, gib / 4))


def write(samples: Samples, gib: float) -> str:
    """Write bench.json and bench.md; the table as text."""
    table = list(rows(samples, int(gib * 64) / 64))
    rounds = max((row.rounds for row in table if row.unit == "ratio"), default=0)
    made = f"{gib:g} GiB (cases of our own against each other: {_part_gib(gib):g} GiB), {rounds} rounds, {datetime.date.today()}, {description()}"
    Path("bench.json").write_text(
        json.dumps({"made": made, "rows": [{**asdict(row), "verdict": row.verdict} for row in table]}, indent=2) + "\n",
        encoding="utf-8",
    )
    Path("bench.md").write_text(f"{made}\n\n{as_markdown(table)}", encoding="utf-8")
    return f"\n{made}\n{as_text(table)}"


def main() -> int:
    """Print the table; write bench.json, and bench.md for docs/benchmarks.md. Ctrl-C ends it with the table so far."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True, help="made for the run, removed after it")
    parser.add_argument("--tools", type=Path, required=True, help="where unpacked programs are kept")
    parser.add_argument("--gib", type=float, default=4.0, help="size of the model (default 4)")
    parser.add_argument("--rounds", type=int, default=5, help="medians of so many (default 5)")
    parser.add_argument("--quick", action="store_true", help="1 GiB, 3 rounds")
    parser.add_argument("--only", action="append", choices=sorted(CASES), help="this case; may be given again")
    args = parser.parse_args()
    if args.quick:
        args.gib, args.rounds = 1.0, 3
    args.tools = args.tools.absolute()
    directory = args.directory.absolute()
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    samples = Samples()
    try:
        failed = measure(args, directory, samples, lambda: write(samples, args.gib))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    print(write(samples, args.gib))
    print(*failed, sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
