"""Processes that do not die but stand still, starve or outgrow their budget, and the requests of readers that are killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from survival.conftest import Stage
from survival.events import another, kill, stopped

pytestmark = [pytest.mark.fuse, pytest.mark.survival, pytest.mark.timeout(600)]
STOP_S = 1.0


@pytest.mark.parametrize("role", ["worker", "fetcher", "store"])
def test_a_child_stands_still(stage: Stage, role: str) -> None:
    """Statistics are answered, and another model comes and goes, meanwhile."""
    with stage.event(f"SIGSTOP {role} for {STOP_S:g} s"), stopped([stage.node.process(role)], STOP_S):
        assert stage.node.stats(stage.target).usage
        target, here = stage.node.target(f"beside-{role}")
        stage.node.publish(stage.small_model, target, f"vol-beside-{role}")
        assert (here / "small.bin").read_bytes() == stage.small_content
        stage.node.unpublish(target)


@pytest.mark.parametrize("component", ["supervisor", "keeper", "node"])
def test_a_component_stands_still(stage: Stage, component: str) -> None:
    container = stage.node.container(component)
    with stage.event(f"SIGSTOP {component} for {STOP_S:g} s"), stopped(container.pids_of(component), STOP_S):
        pass


@pytest.mark.parametrize("component", ["supervisor", "keeper", "node"])
def test_a_container_starves(stage: Stage, component: str) -> None:
    """All of it gets 3 % of a core; the supervisor's is the one with worker, fetcher and store in it."""
    with stage.event(f"3 % of a core for {component}'s container, 2 s"):
        stage.node.container(component).limit(cpus=0.03)
        try:
            time.sleep(2)
        finally:
            stage.node.container(component).limit(cpus=0)


@pytest.mark.parametrize("role", ["worker", "fetcher"])
def test_a_child_outgrows_its_budget(stage: Stage, role: str) -> None:
    """Its own limit stops it, and its successor has a whole budget again; nobody else dies of it."""
    others = {name: stage.node.process(name) for name in ("worker", "fetcher", "store") if name != role}
    with stage.event(f"{role} gets no more memory"):
        pid = stage.node.process(role)
        # As if it had grown up to its budget: what it has, it keeps; what it asks for, it does not get.
        allow_no_more_memory(pid)
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and not another(stage, role, pid):
            stage.readers.advance(60)
    assert {name: stage.node.process(name) for name in others} == others
    kill(stage, role)  # one that could do without more is not left crippled


@pytest.mark.old_kernel
def test_readers_are_killed_between_any_two_steps(stage: Stage) -> None:
    """cat, ls and stat on the very mount; each is gone at once, and the others read on."""
    chosen = random.Random(3)
    path = stage.here / "weights.bin"
    commands = (
        ["cat", str(path)],
        ["ls", "-l", str(stage.here)],
        ["cmp", str(path), str(path)],
        ["tail", "-c1", str(path)],
    )
    with stage.event("SIGKILL of 120 readers at any step"), open(os.devnull, "wb") as nowhere:
        for _ in range(120):
            victim = subprocess.Popen(chosen.choice(commands), stdout=nowhere, stderr=nowhere)
            drop_page_cache(path)
            time.sleep(chosen.random() * 0.015)
            victim.kill()
            victim.wait(20)


@pytest.mark.old_kernel
def test_readers_are_killed_while_the_worker_stands_still(stage: Stage) -> None:
    """Their requests are in its hands, or wait for it; it must not answer the wrong ones afterwards."""
    path = stage.here / "weights.bin"
    with stage.event("SIGKILL of 10 readers of a stopped worker"), open(os.devnull, "wb") as nowhere:
        with stopped([stage.node.process("worker")], 0.3):
            victims = [subprocess.Popen(["cat", str(path)], stdout=nowhere, stderr=nowhere) for _ in range(10)]
            time.sleep(0.1)
            for victim in victims:
                victim.kill()
        for victim in victims:
            victim.wait(20)
    assert all(victim.returncode == -signal.SIGKILL for victim in victims)


def allow_no_more_memory(pid: int) -> None:
    """Lower RLIMIT_DATA below what it has. As its own user: root may lack CAP_SYS_RESOURCE."""
    lines = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    uid, gid = (int(lines[name].split()[0]) for name in ("Uid", "Gid"))
    command = ["prlimit", f"--pid={pid}", f"--data={1 << 20}"]
    subprocess.run(command, check=True, user=uid, group=gid, extra_groups=[])


def drop_page_cache(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
