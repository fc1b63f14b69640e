"""Real loaders on a real model get from the mount what they get from a local copy, while the worker is killed under them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fakes.registry import Fault
from run import find_model
from survival.conftest import Stage
from survival.loaders import GGUF, WEIGHTS, write_encoder, write_gguf

pytestmark = [pytest.mark.fuse, pytest.mark.survival, pytest.mark.timeout(600)]
_KILLS = 4  # of one worker within seconds; one more, and the supervisor takes it for one that cannot start
_BETWEEN_KILLS_S = 0.4
_FILES = {"onnx": ("model.onnx", WEIGHTS), "safetensors": (WEIGHTS,), "gguf": (GGUF,)}
"""What each loads, the weights last."""
SCRIPT = Path(__file__).with_name("loaders.py")


@pytest.fixture(scope="module")
def local_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model, the ONNX graph over its weights, and the same weights as GGUF."""
    directory = tmp_path_factory.mktemp("local")
    shutil.copy(find_model() / WEIGHTS, directory)
    write_encoder(directory)
    write_gguf(directory)
    return directory


@pytest.mark.parametrize("loader", list(_FILES))
def test_a_loader_whose_worker_is_killed_in_mid_load(stage: Stage, local_copy: Path, loader: str) -> None:
    repository = f"team/{loader}-{stage.backend}"
    files = {name: (local_copy / name).read_bytes() for name in _FILES[loader]}
    weights = _FILES[loader][-1]
    digest = stage.registry.add_model(repository, "v1", files, indexed=True)
    slow = Fault(match=f"{repository}/blobs", times=1 << 30, stall_s=0.2)
    stage.registry.faults.append(slow)
    target, here = stage.node.target(loader)
    try:
        stage.node.publish(
            f"{stage.registry.host}/{repository}@{digest}", target, f"vol-{loader}", attributes={"prefetch": "ondemand"}
        )
        killed: list[int] = []
        with stage.event(f"{loader} loads, its worker killed in mid-load"):
            command = [sys.executable, str(SCRIPT), loader]
            running = subprocess.Popen([*command, str(here)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            while running.poll() is None:
                if len(killed) < _KILLS and has_opened(here / weights, running.pid):
                    if (pid := worker_of(stage, target)) not in (0, *killed):
                        os.kill(pid, signal.SIGKILL)
                        killed.append(pid)
                    time.sleep(_BETWEEN_KILLS_S)
                time.sleep(0.02)
            found, errors = running.communicate()
        assert running.returncode == 0, errors
        assert killed, "it was loaded before anybody was killed"
        expected = subprocess.run([*command, str(local_copy)], capture_output=True, text=True, check=True).stdout
        assert found == expected
    finally:
        stage.registry.faults.remove(slow)
        stage.node.unpublish(target)


def has_opened(path: Path, pid: int) -> bool:
    """Whether the process has the weights open or mapped."""
    try:
        if str(path) in Path(f"/proc/{pid}/maps").read_text():
            return True
        return any(os.readlink(f"/proc/{pid}/fd/{fd}") == str(path) for fd in os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return False


def worker_of(stage: Stage, target: str) -> int:
    try:
        return stage.node.process("worker", target)
    except ProcessLookupError:
        return 0
