"""A process that reads a mounted file all the while and compares every byte: random reads and a memory mapping.

In a process of its own, as a SIGBUS or a read that hangs must not take the test with it. It ends when its stdin does,
and tells what it saw as one JSON line.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


class CheckingReader:
    """Use as a context manager; `told` is filled in at its end."""

    def __init__(self, path: Path, expected: Path) -> None:
        self._arguments = [sys.executable, __file__, str(path), str(expected)]
        self.told: dict[str, Any] = {}

    def __enter__(self) -> CheckingReader:
        self._process = subprocess.Popen(self._arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "reading\n"
        return self

    def __exit__(self, *exc: object) -> None:
        if exc[0] is not None:
            self._process.kill()
            return
        output, _ = self._process.communicate(timeout=100)
        assert self._process.returncode == 0, "the reader was killed"
        self.told.update(json.loads(output))
        print(f"reader: {self.told}")
        assert (self.told["errors"], self.told["wrong"]) == ([], 0), self.told
        assert self.told["reads"] > 0


def main() -> None:
    path, expected_path = sys.argv[1:]
    expected = Path(expected_path).read_bytes()
    fd = os.open(path, os.O_RDONLY)
    mapped = mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)
    told: dict[str, Any] = {"reads": 0, "errors": [], "wrong": 0, "longest_s": 0.0}
    print("reading", flush=True)
    while not select.select([0], [], [], 0.002)[0]:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        for source in ("pread", "mmap", "open"):
            offset = random.randrange(len(expected) - 100_000)
            began = time.monotonic()
            try:
                if source == "pread":
                    seen = os.pread(fd, 90_000, offset)
                elif source == "mmap":
                    seen = mapped[offset : offset + 9_000]
                else:
                    with open(path, "rb", buffering=0) as file:
                        file.seek(offset)
                        seen = file.read(5_000)
            except OSError as error:
                told["errors"].append(f"{source}: {error}")
                continue
            told["longest_s"] = max(told["longest_s"], round(time.monotonic() - began, 3))
            told["reads"] += 1
            told["wrong"] += seen != expected[offset : offset + len(seen)]
    print(json.dumps(told))


if __name__ == "__main__":
    main()
