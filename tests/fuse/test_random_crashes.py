"""SIGKILL of worker, fetcher or store at random instants while readers compare every byte.

Short by default; `MODELMOUNT_CRASH_ROUNDS=200` is the long form. The seed is printed, and may be given as
`MODELMOUNT_CRASH_SEED`.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fakes.registry import FakeRegistry
from support.node_process import NodeProcess, children_of

from csi.cache import format as fmt
from csi.control.supervisor import SupervisorClient
from csi.errors import ControlError
from csi.oci.digest import Digest
from csi.stream.blocks import BLOCK_BYTES

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(3600)]

ROUNDS = int(os.environ.get("MODELMOUNT_CRASH_ROUNDS", "10"))
SEED = int(os.environ.get("MODELMOUNT_CRASH_SEED", "20"))
SIZE = 9 * BLOCK_BYTES + 4321
BLOCKS = 10
BLOCK_S = 0.5
"""What the registry takes for a block: so that some rounds begin in the middle of the download."""


def pid_of(node: NodeProcess, role: str) -> int | None:
    if role != "store":
        mounts = node.status()
        return mounts[0][f"{role}_pid"] if mounts else None
    for pid in children_of(node.pid):
        with contextlib.suppress(OSError):
            if b"store" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                return pid
    return None


def test_random_kills_cost_no_byte_and_nothing_proven_is_fetched_again(
    tmp_path: Path, fake_registry: FakeRegistry
) -> None:
    chosen = random.Random(SEED)
    print(f"seed {SEED}, {ROUNDS} rounds")
    content = chosen.randbytes(SIZE)
    digest = str(Digest.of(content))
    fake_registry.add_model("team/m", "v1", {"w.bin": content}, indexed=True)
    del fake_registry.blobs[digest]
    fake_registry.blob_readers[digest] = (SIZE, paced(content))
    wrong: list[str] = []
    reads = [0]
    partial = 0
    stop = threading.Event()
    with NodeProcess(tmp_path / "node") as node:
        target = node.target()
        node.publish(f"{fake_registry.host}/team/m:v1", target)

        def read(seed: int) -> None:
            own = random.Random(seed)
            with open(target / "w.bin", "rb", buffering=0) as file:
                while not stop.is_set() and not wrong:
                    offset, length = own.randrange(SIZE), own.randrange(1, 400_000)
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    try:
                        if os.pread(file.fileno(), length, offset) != content[offset : offset + length]:
                            wrong.append(f"other bytes at {offset}+{length}")
                    except OSError as exc:
                        wrong.append(f"{exc} at {offset}+{length}")
                    reads[0] += 1
                    time.sleep(0.002)

        readers = [threading.Thread(target=read, args=(seed,)) for seed in range(2)]
        for reader in readers:
            reader.start()
        try:
            for _ in range(ROUNDS):
                role = chosen.choice(["worker", "fetcher", "store"])
                time.sleep(chosen.random() * 0.3)
                there = blocks_there(node, digest)
                asked = len(fake_registry.requests(digest))
                with contextlib.suppress(ProcessLookupError):
                    if (pid := pid_of(node, role)) is not None:
                        os.kill(pid, signal.SIGKILL)
                before, deadline = reads[0], time.monotonic() + 60
                while reads[0] < before + 4 and not wrong:
                    assert time.monotonic() < deadline, f"no read came back after a kill of the {role}: {node.log()}"
                    time.sleep(0.01)
                for request in fake_registry.requests(digest)[asked:]:
                    again = there & blocks_of(request.range)
                    assert not again, f"after a kill of the {role}, blocks {again} are fetched again: {node.log()}"
                partial += 0 < len(there) < BLOCKS
        finally:
            stop.set()
            for reader in readers:
                reader.join(130)
        assert wrong == []
        print(f"{reads[0]} reads, {partial} rounds began in the middle of the download")
        assert (target / "w.bin").read_bytes() == content
        deadline = time.monotonic() + 60
        while not is_proven(node, digest):
            # Killed in the middle of its work the store says nothing; the next mount asks again.
            if time.monotonic() > deadline - 40:
                node.unpublish_all()
                target = node.target()
                node.publish(f"{fake_registry.host}/team/m:v1", target)
                assert (target / "w.bin").read_bytes() == content
            assert time.monotonic() < deadline, node.log()
            time.sleep(0.5)
        fake_registry.seen.clear()
        for role in ("fetcher", "store", "worker"):
            with contextlib.suppress(ProcessLookupError):  # the one of before, which is being replaced
                if (pid := pid_of(node, role)) is not None:
                    os.kill(pid, signal.SIGKILL)
            assert (target / "w.bin").read_bytes() == content
        assert fake_registry.requests(digest) == [], "what is proven is checked, not fetched"
        node.unpublish_all()


def paced(content: bytes) -> Callable[[int, int], bytes]:
    def read(offset: int, length: int) -> bytes:
        time.sleep(BLOCK_S * length / BLOCK_BYTES)
        return content[offset : offset + length]

    return read


def blocks_there(node: NodeProcess, digest: str) -> set[int]:
    """Of one mount: they are marked, so their hashes were right."""
    (path,) = (node.data_dir / "cache").glob(f"v*/*/mounts/*/{Digest.parse(digest).path_name}/{fmt.MAP_NAME}")
    marks = path.read_bytes()[fmt.HEADER_BYTES :]
    return {block for block, mark in enumerate(marks) if mark != fmt.Mark.ABSENT}


def blocks_of(header: str | None) -> set[int]:
    """Those that a request with that Range asks for, wholly or in part."""
    if header is None:
        return set(range(BLOCKS))
    first, last = map(int, header.removeprefix("bytes=").split("-"))
    return set(range(first // BLOCK_BYTES, last // BLOCK_BYTES + 1))


def is_proven(node: NodeProcess, digest: str) -> bool:
    try:
        entries = SupervisorClient(str(node.state_dir)).cache("ls")["entries"]
    except ControlError:
        return False
    return digest in {entry["name"] for entry in entries}
