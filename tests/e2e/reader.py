"""Runs inside a pod, in the driver's own image: reads a model without pause until told to stop, checks every byte.

The model holds `hashes.txt` (one sha256 per MiB of weights/model.safetensors). Each read is taken out of the page cache
first, so that it goes through the worker. Once a second a line of JSON tells how it goes; `touch /tmp/stop` ends it.
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


def main(root: str) -> int:
    with open(os.path.join(root, "hashes.txt"), encoding="ascii") as file:
        hashes = file.read().split()
    path = os.path.join(root, "weights", "model.safetensors")
    fd = os.open(path, os.O_RDONLY)
    mapped = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    told: dict[str, Any] = {"reads": 0, "errors": 0, "wrong": 0, "opens": 0, "longest_s": 0.0, "error": ""}
    last_line = time.monotonic()
    while not os.path.exists("/tmp/stop"):
        index = random.randrange(len(hashes))
        started = time.monotonic()
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            mapped.madvise(mmap.MADV_DONTNEED)
            content = mapped[index * MIB : (index + 1) * MIB] if told["reads"] % 2 else os.pread(fd, MIB, index * MIB)
            told["wrong"] += hashlib.sha256(content).hexdigest() != hashes[index]
            other = os.open(path, os.O_RDONLY)
            os.fstat(other)
            os.close(other)
            told["opens"] += 1
        except OSError as exc:
            told["errors"] += 1
            told["error"] = str(exc)
        told["reads"] += 1
        now = time.monotonic()
        told["longest_s"] = max(told["longest_s"], round(now - started, 3))
        if now - last_line > 1:
            last_line = now
            print(json.dumps(told), flush=True)
        time.sleep(0.01)
    with open("/dev/termination-log", "w", encoding="ascii") as file:
        file.write(json.dumps(told))
    return 1 if told["errors"] or told["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
