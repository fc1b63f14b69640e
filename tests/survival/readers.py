"""Readers of one mounted model, and what they saw while something happened."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from survival.containers import Container, Spec, Volume
from survival.reader import FIELDS

SCRIPT = Path(__file__).with_name("reader.py")
_IN_CONTAINER = "/model"
_BEFORE_AND_AFTER = 3  # operations of each reader around an event, so that it is really seen by all
_PATIENCE_S = 60.0
_USER_NAMESPACE = 200_000


@dataclass(slots=True)
class Seen:
    """What all readers together saw. `longest_pause_s`: the slowest single operation, also one that was in work."""

    operations: int = 0
    errors: int = 0
    wrong: int = 0
    longest_pause_s: float = 0.0
    slowest: str = ""
    messages: tuple[str, ...] = ()


class Reader:
    """One running `reader.py`, in this name space or in a container."""

    def __init__(
        self, name: str, mode: str, path: Path, expected: Path, directory: Path, seed: int, pause_ms: int
    ) -> None:
        self.name = name
        self._journal, counters = directory / f"{name}.journal", directory / f"{name}.counters"
        self._journal.touch()
        self._journal.chmod(0o666)
        counters.write_bytes(bytes(FIELDS.size))
        counters.chmod(0o666)
        with open(counters, "r+b") as file:
            self._counters = mmap.mmap(file.fileno(), FIELDS.size)
        self._arguments = [mode, str(path), str(expected), str(self._journal), str(counters), str(seed), str(pause_ms)]
        self._process: subprocess.Popen[bytes] | None = None
        self._container: Container | None = None

    def start(self) -> None:
        """As a process of this name space."""
        self._process = subprocess.Popen([sys.executable, str(SCRIPT), *self._arguments])

    def start_in_container(self, directory: Path, model: Volume, *, user_namespace: int | None = None) -> None:
        """As a pod's container, with private propagation; `model` is all it has of the node besides its own files."""
        own = [Volume(source=directory, path=str(directory))]
        spec = Spec(
            arguments=[sys.executable, str(SCRIPT), *self._arguments],
            volumes=[*own, model],
            user_namespace=user_namespace,
        )
        self._container = Container(f"pod-{self.name}", spec, directory.parent)
        self._container.start()

    @property
    def ended(self) -> str | None:
        """How it ended; None while it runs. SIGBUS shows here."""
        if self._container is not None:
            return (
                None if self._container.running else f"status {self._container.wait(1)}: {self._container.log()[-300:]}"
            )
        assert self._process is not None
        status = self._process.poll()
        return None if status is None else f"status {status}"

    def stop(self) -> None:
        """SIGKILL."""
        if self._container is not None:
            self._container.kill()
        elif self._process is not None:
            self._process.kill()
            self._process.wait(30)

    @property
    def done(self) -> int:
        """Operations so far."""
        return int(FIELDS.unpack_from(self._counters)[0])

    def seen_since(self, began_ns: int, journal_offset: int, done_before: int) -> Seen:
        """Of the time from `began_ns` to now. An operation that began before and was in work then counts."""
        done, in_work_since, _, _ = FIELDS.unpack_from(self._counters)
        seen = Seen(operations=done - done_before)
        with open(self._journal, "rb") as file:
            file.seek(journal_offset)
            lines = [json.loads(line) for line in file.read().splitlines()]
        longest = max((line["end"] - line["start"] for line in lines), default=0)
        if in_work_since:
            longest = max(longest, time.monotonic_ns() - in_work_since)
        failed = [line["error"] for line in lines if line["error"]]
        wrong = [line["wrong"] for line in lines if line["wrong"]]
        seen.errors, seen.wrong = len(failed), len(wrong)
        seen.longest_pause_s, seen.slowest = longest / 1e9, self.name
        seen.messages = tuple(f"{self.name}: {text}" for text in (failed + wrong)[:3])
        if (ended := self.ended) is not None:
            seen.errors += 1
            seen.messages += (f"{self.name} ended: {ended}",)
        return seen

    def journal_size(self) -> int:
        """Bytes of the journal so far."""
        return os.stat(self._journal).st_size


class Readers:
    """All readers of one file. Use as a context manager."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(mode=0o777)
        directory.chmod(0o777)
        self.all: list[Reader] = []
        self.skipped: list[str] = []

    def __enter__(self) -> Readers:
        return self

    def __exit__(self, *exc: object) -> None:
        for reader in self.all:
            reader.stop()

    def add(self, name: str, mode: str, path: Path, expected: Path, *, pause_ms: int = 8) -> Reader:
        """One in this name space."""
        reader = Reader(name, mode, path, expected, self._directory, len(self.all), pause_ms)
        reader.start()
        self.all.append(reader)
        return reader

    def add_kinds(self, target: Path, name: str, expected: Path) -> None:
        """One of each kind there is among pods."""
        for mode in ("sequential", "random", "mmap", "names"):
            self.add(mode, mode, target / name, expected)
        # kubelet binds one file of a volume for a subPath, and the container gets that.
        self._add_contained("subpath", "random", Volume(source=target / name, path=f"/subpath/{name}"), expected)
        self._add_contained("private", "mmap", Volume(source=target, path=_IN_CONTAINER), expected, name)
        try:
            self._add_contained(
                "idmapped",
                "random",
                Volume(source=target, path=_IN_CONTAINER, read_only=True, idmap=_USER_NAMESPACE),
                expected,
                name,
                user_namespace=_USER_NAMESPACE,
            )
        except AssertionError as exc:
            self.skipped.append(f"no reader in a user name space with an idmapped mount: {str(exc)[-160:]}")

    def _add_contained(
        self,
        kind: str,
        mode: str,
        model: Volume,
        expected: Path,
        name: str = "",
        *,
        user_namespace: int | None = None,
    ) -> None:
        path = Path(model.path) / name if name else Path(model.path)
        reader = Reader(kind, mode, path, expected, self._directory, len(self.all), 8)
        reader.start_in_container(self._directory, model, user_namespace=user_namespace)
        self.all.append(reader)

    @contextmanager
    def watching(self, *, patience_s: float = _PATIENCE_S) -> Iterator[Seen]:
        """While the block runs and until every reader has done some more. The result is filled in at its end."""
        self.advance(patience_s)
        began_ns = time.monotonic_ns()
        before = [(reader, reader.journal_size(), reader.done) for reader in self.all]
        seen = Seen()
        try:
            yield seen
        finally:
            stuck = self.advance(patience_s)
            messages: list[str] = [f"{name}: did nothing for {patience_s:g} s" for name in stuck]
            seen.errors += len(stuck)
            for reader, offset, done in before:
                one = reader.seen_since(began_ns, offset, done)
                seen.operations += one.operations
                seen.errors += one.errors
                seen.wrong += one.wrong
                if one.longest_pause_s > seen.longest_pause_s:
                    seen.longest_pause_s, seen.slowest = one.longest_pause_s, one.slowest
                messages += one.messages
            seen.messages = tuple(messages)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """None of them does anything meanwhile; what is open and mapped stays so."""
        pause = self._directory / "pause"
        pause.touch()
        try:
            yield
        finally:
            pause.unlink()

    def advance(self, patience_s: float) -> list[str]:
        """Wait until each has done some operations more; the names of those that have not."""
        wanted = {reader.name: reader.done + _BEFORE_AND_AFTER for reader in self.all}
        deadline = time.monotonic() + patience_s
        while True:
            late = [reader.name for reader in self.all if reader.done < wanted[reader.name] and reader.ended is None]
            if not late or time.monotonic() > deadline:
                return late
            time.sleep(0.005)
