"""`modelmount node --all-in-one` as a process tree: what cannot come up is said, and leaves nothing running."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest
from support.node_process import COMMAND

pytestmark = pytest.mark.fuse


def test_a_node_that_cannot_come_up_ends_the_tree_with_its_reason(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = subprocess.run(
            [
                *COMMAND,
                *("node", "--all-in-one", f"--endpoint=unix://{tmp_path}/csi.sock", "--no-registration"),
                *(f"--state-dir={tmp_path}/state", f"--data-dir={tmp_path}/data", f"--metrics-address={address}"),
            ],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1, done.stderr
    assert address in done.stderr
    assert "node ended at its start" in done.stderr
    assert not list(tmp_path.rglob("*.sock")), "keeper and supervisor were stopped, their sockets are gone"
