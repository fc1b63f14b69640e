"""Runs inside a pod, in the driver's own image: reads a model without pause until told to stop, checks every byte.

The model holds `hashes.txt` (one sha256 per MiB of weights/model.safetensors). Each read is taken out of the page cache
first, so that it goes through the worker. Once a second a line of JSON tells how it goes. A second argument limits the reads
to that many MiB from the start of the file. `touch /tmp/stop` ends it, after a last pass over the whole file.
"""

import hashlib
import json
import mmap
import os
import random
import sys
import time
from typing import Any

MIB = 1 << 20


class Reader:
    """The open file, and what its reads have shown."""

    def __init__(self, root: str) -> None:
        with open(os.path.join(root, "hashes.txt"), encoding="ascii") as file:
            self.hashes = file.read().split()
        self.told: dict[str, Any] = {"reads": 0, "errors": 0, "wrong": 0, "opens": 0, "longest_s": 0.0, "error": ""}
        self._path = os.path.join(root, "weights", "model.safetensors")
        self._fd = os.open(self._path, os.O_RDONLY)
        self._mapped = mmap.mmap(self._fd, 0, prot=mmap.PROT_READ)

    def read(self, index: int) -> None:
        """One MiB by pread or mmap, in turn, and one open."""
        told, started = self.told, time.monotonic()
        try:
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
            self._mapped.madvise(mmap.MADV_DONTNEED)
            begin = index * MIB
            by_map = told["reads"] % 2
            content = self._mapped[begin : begin + MIB] if by_map else os.pread(self._fd, MIB, begin)
            told["wrong"] += hashlib.sha256(content).hexdigest() != self.hashes[index]
            other = os.open(self._path, os.O_RDONLY)
            os.fstat(other)
            os.close(other)
            told["opens"] += 1
        except OSError as exc:
            told["errors"] += 1
            told["error"] = str(exc)
        told["reads"] += 1
        told["longest_s"] = max(told["longest_s"], round(time.monotonic() - started, 3))


def main(root: str, within_mib: int | None = None) -> int:
    reader = Reader(root)
    last_line = 0.0
    while not os.path.exists("/tmp/stop"):
        reader.read(random.randrange(within_mib or len(reader.hashes)))
        if time.monotonic() - last_line > 1:
            last_line = time.monotonic()
            print(json.dumps(reader.told), flush=True)
        time.sleep(0.01)
    for index in range(len(reader.hashes)):
        reader.read(index)
    with open("/dev/termination-log", "w", encoding="ascii") as file:
        file.write(json.dumps(reader.told))
    return 1 if reader.told["errors"] or reader.told["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(int, sys.argv[2:])))
