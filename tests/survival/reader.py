"""A reader as a pod would run it: reads a file of a model over and over, compares every byte, and notes what happens.

    reader.py MODE FILE EXPECTED JOURNAL COUNTERS SEED PAUSE_MS

MODE is sequential, random, mmap or names. JOURNAL gets a JSON line for every operation that was slow or went wrong;
While there is a file `pause` beside it, nothing is done.
COUNTERS is a file of four 64-bit numbers that others may look at any time: operations done, when the one in work began
(monotonic clock, ns; 0: none), errors, comparisons that failed.

Imports the standard library only: it runs inside containers, with nothing but an interpreter.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import struct
import sys
import time
from collections.abc import Callable

FIELDS = struct.Struct("=QQQQ")
SLOW_NS = 20_000_000
_WINDOW_BYTES = 400_000
_PIECE_BYTES = 256 * 1024

Step = Callable[[], str | None]
"""One operation: None, or how the bytes differ. Raises: OSError."""


def sequential(path: str, expected: bytes, chosen: random.Random) -> Step:
    """From the first byte to the last, then again without what the page cache has of it."""
    fd = os.open(path, os.O_RDONLY)
    offset = 0

    def step() -> str | None:
        nonlocal offset
        if offset == 0:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        found, at = os.pread(fd, _PIECE_BYTES, offset), offset
        offset = at + _PIECE_BYTES if at + _PIECE_BYTES < len(expected) else 0
        return _difference(found, expected, at, _PIECE_BYTES)

    return step


def random_places(path: str, expected: bytes, chosen: random.Random) -> Step:
    """Anywhere, never from the page cache."""
    fd = os.open(path, os.O_RDONLY)

    def step() -> str | None:
        offset, length = chosen.randrange(len(expected)), chosen.randrange(1, _WINDOW_BYTES)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return _difference(os.pread(fd, length, offset), expected, offset, length)

    return step


def mapped(path: str, expected: bytes, chosen: random.Random) -> Step:
    """Through one memory mapping, whose pages are given back before each look. A failed page fault is SIGBUS."""
    fd = os.open(path, os.O_RDONLY)
    mapping = mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)

    def step() -> str | None:
        offset, length = chosen.randrange(len(expected)), chosen.randrange(1, _WINDOW_BYTES)
        mapping.madvise(mmap.MADV_DONTNEED)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return _difference(mapping[offset : offset + length], expected, offset, length)

    return step


def names(path: str, expected: bytes, chosen: random.Random) -> Step:
    """Lookups the kernel has no answer to, listings, attributes, opens and statfs."""
    directory, name = os.path.split(path)

    def step() -> str | None:
        missing = os.path.join(directory, f"no-{chosen.getrandbits(64):x}")
        if os.path.lexists(missing):
            return f"{missing} is there"
        if name not in os.listdir(directory):
            return f"{name} is not listed"
        if os.stat(path).st_size != len(expected):
            return f"{name} has another size"
        os.close(os.open(path, os.O_RDONLY))
        return None if os.statvfs(directory).f_blocks else "statfs says that there is nothing"

    return step


MODES = {"sequential": sequential, "random": random_places, "mmap": mapped, "names": names}


def _difference(found: bytes, expected: bytes, offset: int, length: int) -> str | None:
    if found == expected[offset : offset + length]:
        return None
    return f"{len(found)} bytes at {offset} are not the model's"


def run(
    mode: str, path: str, expected: bytes, journal_path: str, counters: mmap.mmap, seed: int, pause_s: float
) -> None:
    """Until it is killed. What fails is noted, and begun anew from open()."""
    chosen = random.Random(seed)
    journal_fd = os.open(journal_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    pause_path = os.path.join(os.path.dirname(journal_path), "pause")
    done = errors = wrong = 0
    step: Step | None = None
    while True:
        while os.path.exists(pause_path):
            time.sleep(0.01)
        started = time.monotonic_ns()
        FIELDS.pack_into(counters, 0, done, started, errors, wrong)
        error, difference = "", None
        try:
            if step is None:
                step = MODES[mode](path, expected, chosen)
            difference = step()
        except OSError as exc:
            error, step = f"{type(exc).__name__}: {exc}", None
        ended = time.monotonic_ns()
        done += 1
        errors += bool(error)
        wrong += difference is not None
        if error or difference or ended - started > SLOW_NS:
            line = {"start": started, "end": ended, "error": error, "wrong": difference or ""}
            os.write(journal_fd, json.dumps(line).encode() + b"\n")
        FIELDS.pack_into(counters, 0, done, 0, errors, wrong)
        time.sleep(pause_s)


def main() -> None:
    """See the module's docstring."""
    mode, path, expected_path, journal_path, counters_path, seed, pause_ms = sys.argv[1:]
    with open(expected_path, "rb") as file:
        expected = file.read()
    with open(counters_path, "r+b") as file:
        counters = mmap.mmap(file.fileno(), FIELDS.size)
    run(mode, path, expected, journal_path, counters, int(seed), int(pause_ms) / 1000)


if __name__ == "__main__":
    main()
