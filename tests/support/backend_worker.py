"""A process that serves one connection with one backend, for the contract tests: the real backend, a scripted reader.

What a file's bytes are follows from its name and the offset; how a read of it behaves follows from its name:

    waits*   does not return before it is released
    fails    raises RegistryUnavailableError
    bug      raises ZeroDivisionError
    dies     ends the process
    others   return at once

Commands on stdin: `release`, `stop`, `waiting`. Lines on stdout: `serving`, `waiting N`, `stopped`.
"""

from __future__ import annotations

import os
import sys

import trio

from csi.errors import ModelMountError, RegistryUnavailableError
from csi.fuse.port import Backend, Connection, Namespace
from csi.fuse.pyfuse3_backend import Pyfuse3Backend
from csi.fuse.raw_backend import RawBackend
from csi.tree.file_format import Tree
from csi.tree.model import Entry

PERIOD = 1_000_003  # prime, so that no offset that anybody aligns to shows the same bytes as another


def pattern(name: str, offset: int, size: int) -> bytes:
    """The bytes of a file."""
    start = offset % PERIOD
    return (_period(name) * (2 + size // PERIOD))[start : start + size]


def _period(name: str, made: dict[str, bytes] = {}) -> bytes:  # noqa: B006 - made once per name
    if name not in made:
        import random

        made[name] = random.Random(name).randbytes(PERIOD)
    return made[name]


class ScriptedReader:
    """Implements ContentReader."""

    def __init__(self) -> None:
        self.released = trio.Event()
        self.waiting = 0

    def read_now(self, entry: Entry, offset: int, size: int) -> memoryview | None:
        name = entry.name.decode()
        if name == "bug":
            raise ZeroDivisionError
        if name == "dies":
            os._exit(9)
        return None if name == "fails" or name.startswith("waits") else self._content(name, entry, offset, size)

    def refuse(self, entry: Entry, offset: int, size: int, error: ModelMountError) -> None:
        """Nothing is remembered."""

    async def read(self, entry: Entry, offset: int, size: int) -> memoryview:
        name = entry.name.decode()
        if name == "fails":
            raise RegistryUnavailableError("the registry is on fire")
        if name == "bug":
            raise ZeroDivisionError
        if name == "dies":
            os._exit(9)
        if name.startswith("waits"):
            self.waiting += 1
            try:
                await self.released.wait()
            finally:
                self.waiting -= 1
        return self._content(name, entry, offset, size)

    def _content(self, name: str, entry: Entry, offset: int, size: int) -> memoryview:
        return memoryview(pattern(name, offset, max(0, min(size, entry.size_bytes - offset))))


async def serve(backend_name: str, connection: Connection, tree: Tree) -> None:
    """Until `stop` or the end of the connection."""
    reader = ScriptedReader()
    backends: dict[str, type[Pyfuse3Backend | RawBackend]] = {"pyfuse3": Pyfuse3Backend, "raw": RawBackend}
    backend: Backend = backends[backend_name](Namespace(tree), reader)

    async def listen() -> None:
        buffered = b""
        while True:
            await trio.lowlevel.wait_readable(0)
            buffered += os.read(0, 4096)
            *commands, buffered = buffered.split(b"\n")
            for command in commands:
                if command == b"release":
                    reader.released.set()
                elif command == b"stop":
                    backend.stop()
                elif command == b"waiting":
                    print("waiting", reader.waiting, flush=True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        await backend.serve(connection, lambda: print("serving", flush=True))
        print("stopped", flush=True)
        nursery.cancel_scope.cancel()


def main() -> None:
    backend_name, fuse_fd, table_fd, init, tree_path = sys.argv[1:]
    with open(tree_path, "rb") as file:
        tree = Tree(file.read())
    trio.run(serve, backend_name, Connection(int(fuse_fd), bytes.fromhex(init), int(table_fd)), tree)


if __name__ == "__main__":
    main()
