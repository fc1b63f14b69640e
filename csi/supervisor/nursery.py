"""The process that workers, fetchers and the store are forked from: it has imported what they need and does nothing else.

An interpreter that starts and imports costs a quarter of a second of CPU and 20 MB of its own; a fork of one that has done so costs
milliseconds, and shares what it does not change. So twenty models at once need not wait for forty interpreters, and what all
of them import is in memory once.

The nursery has one thread, holds no secret, reads nothing but sockets handed to it by the supervisor, and never opens a
jail: each child takes on its own, as one that was executed would. It ends when the supervisor closes its socket; its
children have sockets of their own and go on.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import select
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from csi import heap
from csi.control import wire
from csi.errors import ControlError, ModelMountError

log = logging.getLogger(__name__)

_VERB = "nursery"


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of child: what `ps` shows of it, without its socket, and what it does with that."""

    arguments: list[str]
    live: Callable[[int], int]


def run(control_fd: int, kinds: Mapping[str, Kind]) -> int:
    """Fork a child of the kind that is named for every socket that comes over `control_fd`; there it calls `live` with that
    socket's descriptor and ends with the status returned. Returns when the supervisor has closed its end.

    `fork` answers with the child's pid and a descriptor of its process; `exited` tells how it ended.
    """
    control = socket.socket(fileno=control_fd)
    children: dict[int, int] = {}
    poll = select.poll()
    poll.register(control, select.POLLIN)
    heap.give_back()
    gc.freeze()  # so that no collection in a child writes to what it shares
    while True:
        for fd, _ in poll.poll():
            try:
                if fd != control.fileno():
                    poll.unregister(fd)
                    _tell_exit(control, fd, children.pop(fd))
                    continue
                received = wire.recv(control)
                if received is None:
                    return 0
                process_fd, pid = _on_request(control, *received, kinds)
                if process_fd >= 0:
                    children[process_fd] = pid
                    poll.register(process_fd, select.POLLIN)
            except OSError as exc:
                log.info("the supervisor is gone: %s", exc)
                return 0


def _on_request(
    control: socket.socket, request: wire.Message, fds: list[int], kinds: Mapping[str, Kind]
) -> tuple[int, int]:
    """A new child's process descriptor and pid; -1 and 0 when there is none."""
    try:
        match request.get("op"):
            case "ping":
                wire.send(control, wire.ok(request, pid=os.getpid()))
            case "fork":
                (child_fd,) = wire.exactly(fds, 1)
                try:
                    process_fd, pid = _fork(child_fd, _named(kinds, wire.field(request, "kind", str)))
                finally:
                    os.close(child_fd)
                wire.send(control, wire.ok(request, pid=pid), [process_fd])
                return process_fd, pid
            case other:
                wire.close_all(fds)
                raise ControlError(f"nursery: unknown operation {other!r}")
    except ModelMountError as exc:
        wire.send(control, wire.failed(request, exc))
    return -1, 0


def _named(kinds: Mapping[str, Kind], name: str) -> Kind:
    if name not in kinds:
        raise ControlError(f"nursery: knows no {name!r}, only {', '.join(kinds)}")
    return kinds[name]


def _fork(child_fd: int, kind: Kind) -> tuple[int, int]:
    """Raises: ControlError."""
    if len(os.listdir("/proc/self/task")) != 1:
        raise ControlError("nursery: has more than one thread; a fork of it could hang")
    try:
        pid = os.fork()
    except OSError as exc:
        raise ControlError(f"nursery: cannot fork: {exc.strerror}") from exc
    if pid == 0:
        os._exit(_be_child(child_fd, kind))
    return os.pidfd_open(pid), pid


def _be_child(control_fd: int, kind: Kind) -> int:
    """In the child: nothing of the nursery's stays but what it has imported."""
    status = 1
    try:
        os.setsid()
        os.closerange(3, control_fd)
        os.closerange(control_fd + 1, os.sysconf("SC_OPEN_MAX"))
        verb, *flags = kind.arguments
        program = sys.orig_argv[: sys.orig_argv.index(_VERB)]
        show_arguments([*program, verb, "--control-fd", str(control_fd), *flags])
        status = kind.live(control_fd)
    except ModelMountError as exc:
        log.error("%s", exc)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return status


def show_arguments(arguments: list[str]) -> None:
    """Let `ps` show these instead of those this process was started with, as far as they fit there.

    Source: proc_pid_stat(5), arg_start and arg_end: the memory of this process that /proc/PID/cmdline is read from.
    """
    with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
        fields = file.read().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    text = b"\0".join(map(os.fsencode, arguments)) + b"\0"
    if 0 < start < end and len(text) <= end - start:
        ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)


def _tell_exit(control: socket.socket, process_fd: int, pid: int) -> None:
    os.close(process_fd)
    _, status = os.waitpid(pid, 0)
    wire.send(control, {"op": "exited", "pid": pid, "status": os.waitstatus_to_exitcode(status)})
