"""Fixtures of tests that mount."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.node_process import NodeProcess


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeProcess]:
    """A node of the test's own, whose cache it may look at and damage."""
    with NodeProcess(tmp_path / "node", "--read-deadline=10") as started:
        yield started
        started.unpublish_all()
