"""Mounts that read with all their might, past a cache that takes nothing, hold no more memory than the node's budget."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest
from fakes.registry import FakeRegistry
from support.node_process import NodeProcess

from csi.supervisor.memory import LEAST

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(200)]

MIB = 1024 * 1024
MOUNTS, READERS, SIZE = 6, 6, 40 * MIB
BUDGET = 64 * MIB


def memory_of(pids: list[int]) -> int:
    """Bytes that would be free without these processes."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                total += int(line.split()[1]) * 1024
    return total


def processes(node: NodeProcess) -> list[int]:
    return [mount[f"{role}_pid"] for mount in node.status() for role in ("worker", "fetcher")]


def test_many_busy_mounts_stay_within_the_budget(tmp_path: Path, fake_registry: FakeRegistry) -> None:
    flags = (f"--memory-budget={BUDGET // MIB}MiB", "--cache-limit=1", "--idle-exit=0")
    with NodeProcess(tmp_path / "n", *flags) as node:
        content = {}
        for number in range(MOUNTS):
            data = random.Random(number).randbytes(SIZE)
            digest = fake_registry.add_model(f"team/m{number}", "v1", {"w.bin": data}, indexed=True)
            target = node.target(f"t{number}")
            node.publish(f"{fake_registry.host}/team/m{number}@{digest}", target, f"vol-{number}")
            content[target] = data
        shares = [mount["memory_budget_bytes"] for mount in node.status()]
        assert sum(shares) <= BUDGET + MOUNTS * LEAST.size_bytes
        before, wrong, most = memory_of(processes(node)), [0], [0]
        stop = threading.Event()

        def read(target: Path, data: bytes, seed: int) -> None:
            chosen, fd = random.Random(seed), os.open(target / "w.bin", os.O_RDONLY)
            for _ in range(12):
                offset = chosen.randrange(SIZE - MIB)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                wrong[0] += os.pread(fd, MIB, offset) != data[offset : offset + MIB]
            os.close(fd)

        def watch() -> None:
            while not stop.wait(0.1):
                most[0] = max(most[0], memory_of(processes(node)))

        threads = [
            threading.Thread(target=read, args=(target, data, number))
            for target, data in content.items()
            for number in range(READERS)
        ]
        watcher = threading.Thread(target=watch)
        watcher.start()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stop.set()
        watcher.join()
        assert wrong == [0]
        grown = most[0] - before
        lent = sum(mount["reads"]["lent_reads"] for mount in node.status())
        print(
            f"{before / MIB:.0f} MiB before, {grown / MIB:.0f} MiB more while {lent} reads were answered from lent memory"
        )
        assert lent > 0
        assert grown < BUDGET
        node.unpublish_all()
