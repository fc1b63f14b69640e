"""What readers were lent past a slow disk is not kept once it is on the disk."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from fakes.registry import FakeRegistry
from support.node_process import NodeProcess
from support.separate_processes import wait_for

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(120)]

MIB = 1024 * 1024
SIZE = 64 * MIB
_SLOW_DISK = Path(__file__).parents[1] / "support" / "slow_disk"


def lent_memory_kib(pid: int) -> int:
    """What of a process's resident memory is lent blocks."""
    found, ours = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if not line[0].isupper():
            ours = "memfd:blocks" in line
        elif ours and line.startswith("Rss:"):
            found += int(line.split()[1])
    return found


def test_lent_memory_goes_back(tmp_path: Path, fake_registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(_SLOW_DISK))
    monkeypatch.setenv("MODELMOUNT_TEST_WRITE_BYTES_PER_S", str(20 * MIB))
    data = random.Random(1).randbytes(SIZE)
    digest = fake_registry.add_model("team/m", "v1", {"w.bin": data}, indexed=True)
    with NodeProcess(tmp_path / "n", "--passthrough=off", "--seal=never") as node:
        target = node.target()
        node.publish(f"{fake_registry.host}/team/m@{digest}", target)
        assert (target / "w.bin").read_bytes() == data
        mount = node.status()[0]
        assert mount["progress"]["lent_blocks"] > 0
        pids = [mount["worker_pid"], mount["fetcher_pid"]]
        assert max(map(lent_memory_kib, pids)) > 0
        wait_for(node, "lent memory to go back", lambda: not any(map(lent_memory_kib, pids)))
        mount = node.status()[0]
        assert [mount["worker_pid"], mount["fetcher_pid"]] == pids, "by giving it back, not by ending"
        blob = mount["progress"]["blobs"][0]
        assert blob["present_blocks"] == blob["blocks"]
        node.unpublish(target)
