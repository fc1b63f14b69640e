"""A process that hangs."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator

_SEIZE, _INTERRUPT, _DETACH = 0x4206, 0x4207, 17
_ALL_CHILDREN = 0x40000000  # __WALL: also of other parents, whom we trace


@contextlib.contextmanager
def hung(pid: int) -> Iterator[None]:
    """Its main thread stays where it is until the end of the block, as one that waits for something that never comes: SIGCONT
    does not help, as it does after SIGSTOP, but SIGKILL ends it. Raises: OSError.
    """
    begun, end = threading.Event(), threading.Event()
    errors: list[OSError] = []

    def ptrace(request: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.ptrace(ctypes.c_long(request), ctypes.c_long(pid), None, None) < 0:
            raise OSError(ctypes.get_errno(), f"ptrace {request:#x} of {pid}")

    def trace() -> None:  # all by one thread: it is the tracer
        try:
            ptrace(_SEIZE)
            ptrace(_INTERRUPT)
            os.waitpid(pid, _ALL_CHILDREN)
        except OSError as exc:
            errors.append(exc)
        begun.set()
        with contextlib.suppress(OSError):
            while not end.wait(0.02):
                os.waitpid(pid, _ALL_CHILDREN | os.WNOHANG)  # its parent hears of its end after us
            ptrace(_DETACH)

    tracer = threading.Thread(target=trace, daemon=True)
    tracer.start()
    begun.wait()
    try:
        if errors:
            raise errors[0]
        yield
    finally:
        end.set()
        tracer.join()
