"""Workers, fetchers and the store are forked from a nursery: what they keep of it, and what its death costs."""

from __future__ import annotations

import os
import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fakes.registry import FakeRegistry
from support.node_process import NodeProcess, alive, children_of

from csi.control.supervisor import SupervisorClient

pytestmark = pytest.mark.fuse

FILES = {"config.json": b"{}", "model.safetensors": os.urandom(5 * 1024 * 1024)}


def arguments_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode().split("\0")


def running(node: NodeProcess, verb: str) -> list[int]:
    return [pid for pid in children_of(node.pid) if alive(pid) and arguments_of(pid)[3:4] == [verb]]


def nursery_of(node: NodeProcess) -> int:
    (pid,) = running(node, "nursery")
    return pid


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def sockets_of(pid: int) -> set[str]:
    links = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
    return {link for link in links if link.startswith("socket:")}


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_children_have_a_session_and_arguments_of_their_own_and_no_socket_of_the_nursery(
    modelmount_node: NodeProcess, fake_registry: FakeRegistry
) -> None:
    for number in range(2):
        fake_registry.add_model("team/model", f"v{number}", FILES | {"number": str(number).encode()})
        target = modelmount_node.target()
        modelmount_node.publish(f"{fake_registry.host}/team/model:v{number}", target, f"vol-{number}")
    nursery_pid = nursery_of(modelmount_node)
    kinds = [shlex.split(one.removeprefix("--child=")) for one in arguments_of(nursery_pid) if "--child=" in one]
    assert [verb for verb, *_ in kinds] == ["worker", "fetcher", "store"]
    seen: set[str] = set()
    (store,) = running(modelmount_node, "store")
    assert parent_of(store) == nursery_pid
    for mount in modelmount_node.status():
        for role, *flags in kinds[:2]:
            pid = mount[f"{role}_pid"]
            assert parent_of(pid) == nursery_pid
            assert os.getsid(pid) == pid
            assert arguments_of(pid)[3:5] == [role, "--control-fd"]
            assert arguments_of(pid)[6:] == flags
            sockets = sockets_of(pid)
            assert not sockets & sockets_of(nursery_pid)
            assert not sockets & seen, "no child has what was opened for another"
            seen |= sockets
            assert mount["jail"][role]["own_user"]
            assert mount["jail"][role]["seccomp"]


def test_how_a_child_ended_is_told(modelmount_node: NodeProcess, fake_registry: FakeRegistry) -> None:
    fake_registry.add_model("team/model", "v1", FILES)
    target = modelmount_node.target()
    modelmount_node.publish(f"{fake_registry.host}/team/model:v1", target)
    os.kill(modelmount_node.status()[0]["worker_pid"], signal.SIGKILL)
    assert (target / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    eventually(lambda: "status -9" in str(modelmount_node.status()[0]["events"]))


@pytest.mark.parametrize("spares", [0, 1])
def test_a_nursery_that_is_killed_costs_no_mount_and_is_there_again(
    tmp_path: Path, fake_registry: FakeRegistry, spares: int
) -> None:
    for number in range(3):
        fake_registry.add_model("team/model", f"v{number}", FILES | {"number": str(number).encode()})
    with NodeProcess(tmp_path, f"--spares={spares}") as node:
        targets = [node.target() for _ in range(3)]
        node.publish(f"{fake_registry.host}/team/model:v0", targets[0], "vol-0")
        before = nursery_of(node)
        os.kill(before, signal.SIGKILL)
        assert (targets[0] / "model.safetensors").read_bytes() == FILES["model.safetensors"]
        for number in (1, 2):  # the first may get a spare
            node.publish(f"{fake_registry.host}/team/model:v{number}", targets[number], f"vol-{number}")
            assert (targets[number] / "number").read_bytes() == str(number).encode()
        (first,) = [mount for mount in node.status() if "vol-0" in mount["volumes"]]
        os.kill(first["worker_pid"], signal.SIGKILL)
        os.kill(first["fetcher_pid"], signal.SIGKILL)
        eventually(lambda: all(mount["worker_alive"] and mount["fetcher_alive"] for mount in node.status()))
        assert (targets[0] / "number").read_bytes() == b"0"
        assert nursery_of(node) != before
        assert SupervisorClient(str(node.state_dir)).cache("df")["used_bytes"], "the store has lived on"
        node.unpublish_all()
