"""A process that reads files of mounts at random and compares each byte with a plain file.

Commands on standard input, one JSON object a line: `open` (a volume: its mount and the plain directory), `close`,
`check` (one whole pass over a volume, in order), `end`. Each is answered by `{"done": number}`; in between it reads at
random, in every way a program can. What differs, and every errno, is said on standard output with the time span of the
read; whether it is right is for the one who knows the plan to say.

A page fault that fails would be SIGBUS: mapped bytes are therefore copied by the kernel (write(2) to a memfd), which
says EFAULT instead.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import random
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_LARGEST = 3 << 20
_SECTOR = 4096
_DIFFERENCES = 32  # said of one read
_NEAR = 64
"""Differences that are no further apart are one span: random bytes are right now and then, but never so many in a row."""


class Volume:
    """One mounted model and what it must look like."""

    def __init__(self, name: str, mount: str, plain: str) -> None:
        self.name = name
        self.plain = {path.name: path.read_bytes() for path in Path(plain).iterdir()}
        self.paths = {name: os.path.join(mount, name) for name in self.plain}
        self.files = {name: os.open(path, os.O_RDONLY | os.O_CLOEXEC) for name, path in self.paths.items()}

    def close(self) -> None:
        for fd in self.files.values():
            os.close(fd)


class Reader:
    """`run` until `end`."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._volumes: dict[str, Volume] = {}
        self._buffer = mmap.mmap(-1, _LARGEST + 2 * _SECTOR)
        self._sink = os.memfd_create("mapped")
        self._reads = 0
        self._ways: list[Callable[[Volume, str, int, int], bytes]] = [
            self._pread,
            self._pread,
            self._seek_and_read,
            self._mapped,
            self._direct,
            self._opened_anew,
        ]

    def run(self) -> None:
        pending = b""
        while True:
            ready, _, _ = select.select([0], [], [], 0 if self._volumes else None)
            if ready:
                received = os.read(0, 1 << 16)
                if not received:
                    return
                pending += received
            *lines, pending = pending.split(b"\n")
            for line in lines:
                command = json.loads(line)
                if command["op"] == "end":
                    self._say(done=command["number"], reads=self._reads)
                    return
                self._obey(command)
            if self._volumes:
                self._read_something()

    def _obey(self, command: dict[str, Any]) -> None:
        name = command.get("volume", "")
        match command["op"]:
            case "open":
                self._volumes[name] = Volume(name, command["mount"], command["plain"])
            case "close":
                if volume := self._volumes.pop(name, None):
                    volume.close()
            case "check":
                self._check(self._volumes[name])
        self._say(done=command["number"], reads=self._reads)

    def _read_something(self) -> None:
        volume = self._random.choice(list(self._volumes.values()))
        name = self._random.choices(list(volume.plain), [len(content) + 1 for content in volume.plain.values()])[0]
        size = len(volume.plain[name])
        length = self._random.choice([1, 100, 4096, 70_000, 1 << 20, _LARGEST])
        offset = self._random.randrange(-(length // 2), size + 10)
        if self._random.random() < 0.6:  # else what the page cache has is read
            with contextlib.suppress(OSError):
                os.posix_fadvise(volume.files[name], 0, 0, os.POSIX_FADV_DONTNEED)
        self._compare(volume, name, self._random.choice(self._ways), max(0, offset), length)
        time.sleep(self._random.random() * 0.01)

    def _check(self, volume: Volume) -> None:
        for name, content in volume.plain.items():
            with contextlib.suppress(OSError):
                os.posix_fadvise(volume.files[name], 0, 0, os.POSIX_FADV_DONTNEED)
            for offset in range(0, len(content) + 1, 1 << 20):
                self._compare(volume, name, self._pread, offset, 1 << 20)

    def _compare(
        self, volume: Volume, name: str, way: Callable[[Volume, str, int, int], bytes], offset: int, length: int
    ) -> None:
        expected = volume.plain[name][offset : offset + length]
        began = time.monotonic()
        what = {"volume": volume.name, "file": name, "way": way.__name__, "offset": offset, "length": length}
        try:
            got = way(volume, name, offset, length)
        except OSError as exc:
            self._say(**what, began=began, ended=time.monotonic(), errno=errno.errorcode[exc.errno or 0])
            return
        finally:
            self._reads += 1
        if got != expected:
            differ = [[offset + at, got[at]] for at in range(min(len(got), len(expected))) if got[at] != expected[at]]
            what |= {"got_length": len(got), "differ": differ[:_DIFFERENCES], "differences": len(differ)}
            what["spans"] = _spans([position for position, _ in differ])
            self._say(**what, began=began, ended=time.monotonic())

    def _pread(self, volume: Volume, name: str, offset: int, length: int) -> bytes:
        return _whole(lambda at, left: os.pread(volume.files[name], left, at), offset, length)

    def _seek_and_read(self, volume: Volume, name: str, offset: int, length: int) -> bytes:
        fd = volume.files[name]
        os.lseek(fd, offset, os.SEEK_SET)
        return _whole(lambda _, left: os.read(fd, left), offset, length)

    def _opened_anew(self, volume: Volume, name: str, offset: int, length: int) -> bytes:
        fd = os.open(volume.paths[name], os.O_RDONLY | os.O_CLOEXEC)
        try:
            return _whole(lambda at, left: os.pread(fd, left, at), offset, length)
        finally:
            os.close(fd)

    def _direct(self, volume: Volume, name: str, offset: int, length: int) -> bytes:
        """Aligned, as O_DIRECT wants it, and past the page cache."""
        first = offset // _SECTOR * _SECTOR
        size = -(-(offset + length - first) // _SECTOR) * _SECTOR
        fd = os.open(volume.paths[name], os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        try:
            done = 0
            while done < size:
                count = os.preadv(fd, [memoryview(self._buffer)[done:size]], first + done)
                done += count
                if count == 0 or count % _SECTOR:
                    break
            return self._buffer[offset - first : min(done, offset - first + length)]
        finally:
            os.close(fd)

    def _mapped(self, volume: Volume, name: str, offset: int, length: int) -> bytes:
        end = min(offset + length, len(volume.plain[name]))
        if end <= offset:
            return b""
        with mmap.mmap(volume.files[name], 0, prot=mmap.PROT_READ) as mapped, memoryview(mapped) as view:
            done = offset
            os.ftruncate(self._sink, 0)
            while done < end:
                with view[done:end] as rest:
                    done += os.pwrite(self._sink, rest, done - offset)
        return os.pread(self._sink, end - offset, 0)

    def _say(self, **what: Any) -> None:
        sys.stdout.write(json.dumps(what) + "\n")
        sys.stdout.flush()


def _spans(positions: list[int]) -> list[tuple[int, int]]:
    """First and end of each stretch of rising positions that are near each other."""
    spans: list[tuple[int, int]] = []
    for position in positions:
        if spans and position - spans[-1][1] < _NEAR:
            spans[-1] = spans[-1][0], position + 1
        else:
            spans.append((position, position + 1))
    return spans


def _whole(read: Callable[[int, int], bytes], offset: int, length: int) -> bytes:
    """A read may be short only at the end of the file, so one that is short is asked on."""
    content = bytearray()
    while len(content) < length and (piece := read(offset + len(content), length - len(content))):
        content += piece
    return bytes(content)


if __name__ == "__main__":
    Reader(int(sys.argv[1])).run()
