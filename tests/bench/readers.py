"""`readers.py scattered|mapped|first FILE [SEED]`: ways of reading a model, as a process of its own.

scattered   16 processes, each 2 MiB at a time at offsets in no order; together they read each byte once
mapped      one process, through a mapping, layer by layer in the order of their names (10 comes before 2)
first       one byte, at the file's end
"""

from __future__ import annotations

import mmap
import os
import random
import sys

_READERS = 16
_PIECE_BYTES = 2 << 20
_LAYERS, _TENSORS = 48, 7


def scattered(fd: int, size: int, seed: int) -> int:
    """0 when every reader read all of its pieces."""
    pieces = list(range(0, size, _PIECE_BYTES))
    random.Random(seed).shuffle(pieces)
    children = []
    for reader in range(_READERS):
        if not (child := os.fork()):
            buffer = mmap.mmap(-1, _PIECE_BYTES)
            for offset in pieces[reader::_READERS]:
                done, wanted = 0, min(_PIECE_BYTES, size - offset)
                while done < wanted:
                    count = os.preadv(fd, [memoryview(buffer)[done:wanted]], offset + done)
                    if not count:
                        os._exit(1)
                    done += count
            os._exit(0)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


def mapped(fd: int, size: int) -> int:
    """Touches every page."""
    memory = mmap.mmap(fd, size, prot=mmap.PROT_READ)
    layer = -(-size // _LAYERS)
    tensor = -(-layer // _TENSORS)
    for number in sorted(range(_LAYERS), key=str):
        for part in sorted(range(_TENSORS), key=lambda part: part * 3 % _TENSORS):
            start = number * layer + part * tensor
            memory[start : min(start + tensor, (number + 1) * layer, size) : mmap.PAGESIZE]
    return 0


def main() -> int:
    """The exit status."""
    fd = os.open(sys.argv[2], os.O_RDONLY)
    size = os.fstat(fd).st_size
    if sys.argv[1] == "scattered":
        return scattered(fd, size, int(sys.argv[3]))
    if sys.argv[1] == "mapped":
        return mapped(fd, size)
    return 0 if len(os.pread(fd, 1, size - 1)) == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
