"""Runs a program that gives credentials: JSON in, JSON out, in bounded time and memory.

Nothing of what the program says is ever logged or part of an error: its output is a secret, and so may its complaints be.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence

from csi.errors import RegistryUnavailableError

MAX_OUTPUT_BYTES = 1024 * 1024


def run(
    command: Sequence[str], given: bytes, timeout_s: float, environment: Mapping[str, str] | None = None
) -> tuple[bytes, int]:
    """What the program writes to stdout, and its exit status. `environment` is added to ours.

    Raises: RegistryUnavailableError: it cannot be started, is too slow, or says too much. The program and whatever it
    has started are dead then.
    """
    name = os.path.basename(command[0])
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | dict(environment or {}),
            start_new_session=True,
            cwd="/",
        )
    except OSError as exc:
        raise RegistryUnavailableError(f"credential program {name}: cannot be started: {exc.strerror}") from None
    deadline = time.monotonic() + timeout_s
    with process:
        try:
            output = _exchange(process, given, deadline)
            status = process.wait(max(0.1, deadline - time.monotonic()))
        except (TimeoutError, subprocess.TimeoutExpired):
            raise RegistryUnavailableError(f"credential program {name}: no answer within {timeout_s:g} s") from None
        except OverflowError:
            raise RegistryUnavailableError(
                f"credential program {name}: answers with more than {MAX_OUTPUT_BYTES} bytes"
            ) from None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
    return output, status


def _exchange(process: subprocess.Popen[bytes], given: bytes, deadline: float) -> bytes:
    assert process.stdin is not None
    assert process.stdout is not None
    for pipe in (process.stdin, process.stdout):
        os.set_blocking(pipe.fileno(), False)
    output, left = bytearray(), memoryview(given)
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        selector.register(process.stdin, selectors.EVENT_WRITE)
        while True:
            events = selector.select(max(0.0, deadline - time.monotonic()))
            if not events:
                raise TimeoutError
            for key, _ in events:
                if key.fileobj is process.stdout:
                    part = os.read(process.stdout.fileno(), 65536)
                    if not part:
                        return bytes(output)
                    output += part
                    if len(output) > MAX_OUTPUT_BYTES:
                        raise OverflowError
                    continue
                try:
                    left = left[os.write(process.stdin.fileno(), left) :] if left else left
                except BrokenPipeError:  # it does not want to know
                    left = left[:0]
                if not left:
                    selector.unregister(process.stdin)
                    process.stdin.close()
