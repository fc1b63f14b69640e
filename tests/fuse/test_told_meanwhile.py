"""What a mount is told while its fetcher is being replaced reaches the new one: at any moment from the kill on."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from fakes.registry import FakeRegistry
from support.node_process import NodeProcess
from support.separate_processes import wait_for

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(200)]

MIB = 1024 * 1024
BLOCK = 4 * MIB
_STEP_S = 0.001
ROUNDS = 10
_OLD_S = 1.1
"""So old a fetcher did not die of its start, and the next one is not put off."""


def kill_fetcher(node: NodeProcess, target: Path) -> None:
    (mount,) = [mount for mount in node.status() if str(target) in mount["targets"]]
    os.kill(mount["fetcher_pid"], signal.SIGKILL)


@pytest.mark.allow_logs
def test_logins(tmp_path: Path) -> None:
    content = random.Random(3).randbytes(ROUNDS * BLOCK)
    with FakeRegistry("user", "0") as registry, NodeProcess(tmp_path / "n", "--read-deadline=4") as node:
        digest = registry.add_model("team/private", "v1", {"w.bin": content}, indexed=True)
        reference, target = f"{registry.host}/team/private@{digest}", node.target()

        def publish(password: str) -> None:
            secrets = {"username": "user", "password": password}
            node.publish(reference, target, secrets=secrets, attributes={"prefetch": "ondemand"})

        publish("0")
        order = list(range(ROUNDS))
        random.Random(4).shuffle(order)  # so that no read-ahead brings what a later round is to fetch
        file = os.open(target / "w.bin", os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        for number, block in enumerate(order):
            time.sleep(_OLD_S)
            registry.expect("user", str(number))
            kill_fetcher(node, target)
            time.sleep(number * _STEP_S)
            publish(str(number))
            try:
                found = os.pread(file, 4096, block * BLOCK)
            except OSError as exc:
                pytest.fail(f"round {number}: {exc}; {node.log()}")
            assert found == content[block * BLOCK :][:4096]
        os.close(file)
        node.unpublish(target)


@pytest.mark.allow_logs
def test_that_the_whole_model_is_wanted(tmp_path: Path, fake_registry: FakeRegistry) -> None:
    with NodeProcess(tmp_path / "n") as node:
        for number in range(ROUNDS):
            content = random.Random(number).randbytes(3 * BLOCK)
            digest = fake_registry.add_model(f"team/m{number}", "v1", {"w.bin": content}, indexed=True)
            reference = f"{fake_registry.host}/team/m{number}@{digest}"
            first, second = node.target(f"first{number}"), node.target(f"second{number}")
            node.publish(reference, first, f"first{number}", attributes={"prefetch": "ondemand"})
            kill_fetcher(node, first)
            time.sleep(number * _STEP_S)
            node.publish(reference, second, f"second{number}", attributes={"prefetch": "full"})

            def is_whole(target: Path = second) -> bool:
                (mount,) = [mount for mount in node.status() if str(target) in mount["targets"]]
                blobs = mount["progress"].get("blobs", [])
                return bool(blobs) and all(blob["present_blocks"] == blob["blocks"] for blob in blobs)

            wait_for(node, "all of the model", is_whole)
            node.unpublish(first, f"first{number}")
            node.unpublish(second, f"second{number}")
