"""Fixtures shared by all tests. Nothing here replaces a part under test."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from fakes.registry import FakeRegistry
from registry_process import RegistryProcess, RegistryUnavailableHereError, find_or_install_registry
from support.node_process import NodeProcess, is_root, mounts_below

# No test fails on a time: hypothesis gives an example 200 ms unless told otherwise.
hypothesis.settings.register_profile("modelmount", deadline=None)
hypothesis.settings.load_profile("modelmount")

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """FUSE tests without root or /dev/fuse are visible skips."""
    if is_root():
        return
    skip = pytest.mark.skip(reason="needs root and /dev/fuse")
    for item in items:
        if item.get_closest_marker("fuse"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def no_unexpected_logs(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A warning or an error in the log of this process fails the test, unless it is marked `allow_logs`."""
    yield
    if request.node.get_closest_marker("allow_logs"):
        return
    unexpected = [
        record
        for record in caplog.get_records("call")
        if record.levelno >= logging.WARNING and record.name.startswith("csi")
    ]
    assert not unexpected, [record.getMessage() for record in unexpected]


@pytest.fixture
def fake_registry() -> Iterator[FakeRegistry]:
    """A registry in this process that misbehaves on order."""
    with FakeRegistry() as registry:
        yield registry


@pytest.fixture(scope="session")
def registry_binary() -> Path:
    """Debian's docker-registry."""
    try:
        return find_or_install_registry(ROOT / ".tools")
    except RegistryUnavailableHereError as exc:
        pytest.skip(str(exc))


@pytest.fixture(scope="session")
def docker_registry(registry_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryProcess]:
    """A real registry process on loopback, anonymous."""
    registry = RegistryProcess(registry_binary, tmp_path_factory.mktemp("registry"))
    registry.start()
    yield registry
    registry.stop()


@pytest.fixture(scope="session")
def private_registry(registry_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryProcess]:
    """A real registry process on loopback that wants Basic credentials."""
    registry = RegistryProcess(registry_binary, tmp_path_factory.mktemp("private"), htpasswd=True)
    registry.start()
    yield registry
    registry.stop()


@pytest.fixture(scope="session")
def shared_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A real all-in-one node with a read deadline short enough for tests. Use `modelmount_node`."""
    with NodeProcess(tmp_path_factory.mktemp("node"), "--read-deadline=5") as node:
        yield node


@pytest.fixture
def modelmount_node(shared_node: NodeProcess) -> Iterator[NodeProcess]:
    """The shared node, without any mount before and after the test."""
    yield shared_node
    shared_node.unpublish_all()
    assert mounts_below(shared_node.directory) == []
