"""Many publishes at once, against the same ones one after the other in the same run. Alone:
`python tests/bench/publishes.py --directory DIR --tools DIR`.

Three storms, as kubelet makes them: a hundred pods of one model, the same hundred again (what a restarted kubelet does), and
twenty models nobody had on the node. Latency is a call's, measured by the caller; memory is the proportional share (Pss) of
everything the node runs, while the twenty are mounted.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2] / "deploy" / "demo")]

from registry_process import RegistryProcess, find_or_install_registry  # noqa: E402
from support.node_process import COMMAND, NodeProcess, children_of  # noqa: E402

PODS, MODELS, ALONE = 100, 20, 5
Rows = list[tuple[str, float, str]]


def measure(directory: Path, registry: RegistryProcess) -> Rows:
    """Rows of name, value, unit."""
    references = [_push(registry, directory, number) for number in range(1 + ALONE + MODELS)]
    one, alone, many = references[0], references[1 : 1 + ALONE], references[1 + ALONE :]
    rows: Rows = []
    with NodeProcess(directory / "publishes") as node:
        targets = [node.target() for _ in range(PODS)]
        rows += _storm(
            f"{PODS} publishes of one model at once", [_call(node, one, targets[n], f"one-{n}") for n in range(PODS)]
        )
        rows += _storm(f"{PODS} republishes at once", [_call(node, one, targets[n], f"one-{n}") for n in range(PODS)])
        node.unpublish_all()
        time.sleep(12)  # spares are there again
        single = [_call(node, reference, node.target(), f"alone-{n}")() for n, reference in enumerate(alone)]
        rows.append(("one model nobody had, alone, p50", _ms(statistics.median(single)), "ms"))
        node.unpublish_all()
        time.sleep(12)
        calls = [_call(node, reference, node.target(), f"many-{n}") for n, reference in enumerate(many)]
        started = time.monotonic()
        rows += _storm(f"{MODELS} models nobody had, at once", calls)
        all_s = time.monotonic() - started
        ratio = all_s / (MODELS * statistics.median(single))
        rows.append((f"{MODELS} at once / one after the other", round(ratio, 2), "ratio"))
        pids = {node.pid} | children_of(node.pid)
        rows.append((f"processes with {MODELS} models mounted", len(pids), ""))
        rows.append((f"their memory (Pss) with {MODELS} models mounted", round(sum(map(_pss_kib, pids)) / 1024), "MiB"))
        node.unpublish_all()
    return rows


def _push(registry: RegistryProcess, directory: Path, number: int) -> str:
    """A small model of its own, pinned."""
    source = directory / f"source-{number}"
    source.mkdir()
    (source / "config.json").write_text(f'{{"model_type": "bench", "number": {number}}}', encoding="utf-8")
    (source / "model.safetensors").write_bytes(os.urandom(1 << 20))
    name = f"{registry.host}/bench/small-{number}:v1"
    pushed = subprocess.run([*COMMAND, "push", str(source), name], check=True, capture_output=True, text=True)
    shutil.rmtree(source)
    return pushed.stdout.strip()


def _publish(node: NodeProcess, reference: str, target: Path, volume_id: str) -> float:
    started = time.monotonic()
    node.publish(reference, target, volume_id)
    return time.monotonic() - started


def _call(node: NodeProcess, reference: str, target: Path, volume_id: str) -> Callable[[], float]:
    return lambda: _publish(node, reference, target, volume_id)


def _storm(name: str, calls: Sequence[Callable[[], float]]) -> Rows:
    with ThreadPoolExecutor(max_workers=len(calls)) as threads:
        seconds = sorted(threads.map(lambda call: call(), calls))
    percentile = {"p50": statistics.median(seconds), "p99": seconds[max(0, round(len(seconds) * 0.99) - 1)]}
    return [(f"{name}, {which}", _ms(value), "ms") for which, value in percentile.items()]


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)


def _pss_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    return 0


def main() -> int:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True, help="made for the run, removed after it")
    parser.add_argument("--tools", type=Path, required=True, help="where the unpacked registry is kept")
    args = parser.parse_args()
    directory = args.directory.absolute()
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    registry = RegistryProcess(find_or_install_registry(args.tools.absolute()), directory / "registry")
    registry.start()
    try:
        for name, value, unit in measure(directory, registry):
            print(f"{name:56} {value:>9} {unit}")
    finally:
        registry.stop()
        shutil.rmtree(directory, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
