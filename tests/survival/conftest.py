"""One node of three containers per backend, with a filled model and readers of every kind for all of its tests."""

from __future__ import annotations

import itertools
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fakes.registry import FakeRegistry, Fault
from survival.containers import ROOT, RUNC, TINI
from survival.node import ContainerNode
from survival.readers import Readers, Seen
from survival.releases import on_an_old_kernel
from survival.table import Table

from csi.control.supervisor import is_verified

_TABLE = pytest.StashKey[Table]()
MODEL_BYTES = 24 * 1024 * 1024 + 4321
COLD_BYTES = 40 * 1024 * 1024
READ_DEADLINE_S = 8
IDLE_EXIT_S = 3


def pytest_addoption(parser: pytest.Parser) -> None:
    """The long form is `--kills 1000`."""
    group = parser.getgroup("survival")
    group.addoption("--kills", type=int, default=30, help="random kills, over all cases (default 30)")
    group.addoption("--seed", type=int, default=20, help="of the random kills (default 20)")
    group.addoption("--old-kernel", action="store_true", help="every event without RESEND too (default: some)")
    group.addoption("--table", type=Path, default=ROOT / "survival.json", help="where the table goes, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    """One table for the run."""
    config.stash[_TABLE] = Table()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The table, on the terminal and as JSON."""
    table = config.stash[_TABLE]
    if table.rows:
        terminalreporter.section("what readers saw")
        for line in table.lines():
            terminalreporter.write_line(line)
        table.write(config.getoption("--table"))


@dataclass(frozen=True, slots=True)
class Cold:
    """A model of which nothing is cached, from a slow registry, with readers of its own."""

    target: str
    here: Path
    readers: Readers


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A node, a model on it that is complete in the cache, and the readers of it."""

    backend: str
    node: ContainerNode
    registry: FakeRegistry
    readers: Readers
    reference: str
    target: str
    here: Path
    """The target as this name space sees it."""
    small_model: str
    small_content: bytes
    directory: Path
    expected: Path
    table: Table
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @contextmanager
    def event(self, name: str, note: str = "", *, readers: Readers | None = None) -> Iterator[Seen]:
        """A line of the table. No reader may see an error or a wrong byte."""
        with (readers or self.readers).watching() as seen:
            yield seen
        self.table.add(name, self.backend, seen, note)
        assert (seen.errors, seen.wrong) == (0, 0), f"{seen.messages}\n{self.node.logs()}"

    @contextmanager
    def cold_model(self, name: str) -> Iterator[Cold]:
        """See `Cold`; only what is read is fetched. Taken away afterwards."""
        content = random.Random(name).randbytes(COLD_BYTES)
        repository = f"team/{name}-{self.backend}"
        digest = self.registry.add_model(repository, "v1", {"cold.bin": content}, indexed=True)
        slow = Fault(match=f"{repository}/blobs", times=1 << 30, stall_s=0.15)
        self.registry.faults.append(slow)
        target, here = self.node.target(name)
        directory = self.directory / f"readers-{name}"
        try:
            with Readers(directory) as readers:
                expected = directory / "expected.bin"
                expected.write_bytes(content)
                self.node.publish(
                    f"{self.registry.host}/{repository}@{digest}",
                    target,
                    f"vol-{name}",
                    attributes={"prefetch": "ondemand"},
                )
                for mode in ("sequential", "random", "mmap"):
                    readers.add(mode, mode, here / "cold.bin", expected)
                yield Cold(target, here, readers)
        finally:
            self.registry.faults.remove(slow)
            self.node.unpublish(target)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Everything on both backends, one after the other; kills also where the kernel reads what is complete by itself."""
    if "backend" in metafunc.fixturenames:
        kinds = ["raw", "pyfuse3"]
        if metafunc.definition.get_closest_marker("old_kernel") or metafunc.config.getoption("--old-kernel"):
            kinds.append(OLD_KERNEL)
        if metafunc.definition.get_closest_marker("old_pyfuse3"):
            kinds.append(OLD_PYFUSE3)
        if metafunc.module.__name__.endswith("_kills"):
            kinds.append("passthrough")
        metafunc.parametrize("backend", kinds, scope="session")


OLD_KERNEL = "no-resend"
"""The raw backend as on a kernel before 6.9, which nobody can ask to give requests out again."""
OLD_PYFUSE3 = "pyfuse3-no-resend"
"""pyfuse3 on such a kernel: it gets through what is planned."""


def supervisor_flags(backend: str) -> list[str]:
    """`raw` and `pyfuse3`: every read is answered by the worker."""
    if backend == "passthrough":
        return ["--fuse-backend=raw", "--passthrough=auto", "--cache-min-free=0"]
    backend = {OLD_KERNEL: "raw", OLD_PYFUSE3: "pyfuse3"}.get(backend, backend)
    return [f"--fuse-backend={backend}", "--passthrough=off", "--seal=never", "--cache-min-free=0"]


@pytest.fixture(scope="session")
def table(pytestconfig: pytest.Config) -> Table:
    """The rows of this run."""
    return pytestconfig.stash[_TABLE]


@pytest.fixture(scope="session")
def place() -> Iterator[Path]:
    """A directory that other users and short socket paths get along with."""
    entries = Path("/proc/self/mountinfo").read_text().splitlines()
    if not any(line.split()[4] == "/" and "shared:" in line for line in entries):
        pytest.skip("the root of this mount name space is not shared; 'make test-survival' makes one whose root is")
    missing = [name for name, path in (("runc", RUNC), ("tini", shutil.which(TINI))) if not path]
    if missing:
        pytest.skip(f"no containers: {', '.join(missing)} missing; 'make test-survival' installs them")
    path = Path(tempfile.mkdtemp(prefix="mms-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def registry() -> Iterator[FakeRegistry]:
    """One that misbehaves on order."""
    with FakeRegistry() as running:
        yield running


@pytest.fixture(scope="session")
def stage(backend: str, place: Path, registry: FakeRegistry, table: Table) -> Iterator[Stage]:
    """See `Stage`."""
    directory = place / backend
    directory.mkdir()
    content, small = random.Random(7).randbytes(MODEL_BYTES), random.Random(8).randbytes(1 << 20)
    digest = registry.add_model("team/model", "v1", {"weights.bin": content}, indexed=True)
    small_digest = registry.add_model("team/small", "v1", {"small.bin": small}, indexed=True)
    flags = [*supervisor_flags(backend), f"--read-deadline={READ_DEADLINE_S}", f"--idle-exit={IDLE_EXIT_S}"]
    is_old = backend in (OLD_KERNEL, OLD_PYFUSE3)
    checkouts = {"keeper": on_an_old_kernel(directory)} if is_old else {}
    with ContainerNode(directory, {"supervisor": flags}, checkouts) as node, Readers(directory / "readers") as readers:
        target, here = node.target("readers")
        reference = f"{registry.host}/team/model@{digest}"
        node.publish(reference, target, "vol-readers")
        assert node.status(target)["can_resend"] != is_old
        node.wait_until("the model to be complete", lambda: is_verified(node.status(target)))
        expected = directory / "readers" / "expected.bin"
        expected.write_bytes(content)
        readers.add_kinds(here, "weights.bin", expected)
        yield Stage(
            backend=backend,
            node=node,
            registry=registry,
            readers=readers,
            reference=reference,
            target=target,
            here=here,
            small_model=f"{registry.host}/team/small@{small_digest}",
            small_content=small,
            directory=directory,
            expected=expected,
            table=table,
        )
