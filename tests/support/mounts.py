"""What tests of real mounts ask of a node again and again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.node_process import NodeProcess

from csi.control.supervisor import SupervisorClient


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    """Until `condition` holds; the test fails with `what` when it never does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def mount_at(node: NodeProcess, target: Path) -> dict[str, Any]:
    """The status of the mount that a target shows."""
    return next(mount for mount in node.status() if str(target) in mount["targets"])


def events(node: NodeProcess, target: Path) -> list[str]:
    """The reasons of what happened to that mount."""
    return [event["reason"] for event in mount_at(node, target)["events"]]


def cache(node: NodeProcess, verb: str, **fields: Any) -> dict[str, Any]:
    """`modelmount cache`."""
    return SupervisorClient(str(node.state_dir)).cache(verb, **fields)


def proven_blobs(node: NodeProcess) -> dict[str, dict[str, Any]]:
    """What the store has proven, by digest."""
    return {entry["name"]: entry for entry in cache(node, "ls")["entries"] if entry["kind"] == "blob"}


def drop_pages(path: Path) -> None:
    """The kernel's own copy of a file, so that the next read asks the worker."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
