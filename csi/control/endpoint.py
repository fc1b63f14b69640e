"""Unix SEQPACKET endpoints in the file system: listen, connect, call once, and who is at the other end."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from csi.control import wire
from csi.errors import ControlError, from_wire

_SUN_PATH_MAX = 107  # bytes, unix(7)
_UCRED = struct.Struct("3i")


@dataclass(frozen=True, slots=True)
class Peer:
    """The process at the other end when the connection was made (SO_PEERCRED)."""

    pid: int
    uid: int
    gid: int


def peer_of(sock: socket.socket) -> Peer:
    """Who connected. pid is 0 when the peer lives in a PID name space we cannot see."""
    return Peer(*_UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))


@contextlib.contextmanager
def _address(path: str) -> Iterator[str]:
    """`path`, or a short way to it through an open directory where it is over the 107 bytes of sun_path."""
    if len(os.fsencode(path)) <= _SUN_PATH_MAX:
        yield path
        return
    directory, name = os.path.split(path)
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)


def listen(path: str) -> socket.socket:
    """Listen at `path`, mode 0600, replacing a socket nobody listens on.

    Raises: ControlError when another process listens there, or something that is not a socket is there.
    """
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    old_umask = os.umask(0o177)
    try:
        with _address(path) as address:
            try:
                sock.bind(address)
            except OSError as exc:
                if exc.errno != errno.EADDRINUSE:  # what bind answers for an existing path
                    raise
                _remove_stale(path)
                sock.bind(address)
        sock.listen(128)
    except BaseException:
        sock.close()
        raise
    finally:
        os.umask(old_umask)
    return sock


def _remove_stale(path: str) -> None:
    try:
        with connect(path, timeout_s=1.0):
            pass
    except ControlError:
        os.unlink(path)
        return
    raise ControlError(f"another process listens on {path}; stop it, or choose another --state-dir")


def connect(path: str, timeout_s: float) -> socket.socket:
    """Raises: ControlError when nobody listens."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(timeout_s)
    try:
        with _address(path) as address:
            sock.connect(address)
    except OSError as exc:
        sock.close()
        name = os.path.basename(path).removesuffix(".sock")
        raise ControlError(
            f"{name} does not answer: {exc.strerror or exc}; is 'modelmount {name}' running on this node?"
        ) from exc
    return sock


def call(
    path: str, op: str, timeout_s: float, fds: Sequence[int] = (), **fields: Any
) -> tuple[dict[str, Any], list[int]]:
    """One request over a connection of its own; returns the reply's fields and descriptors (now the caller's).

    Raises: the error the peer answered; ControlError when it does not answer within `timeout_s`.
    """
    with connect(path, timeout_s) as sock:
        try:
            wire.send(sock, {"id": 1, "op": op, **fields}, fds)
            received = wire.recv(sock)
        except TimeoutError as exc:
            raise ControlError(f"{os.path.basename(path)}: no answer to {op!r} within {timeout_s:g} s") from exc
        except OSError as exc:
            raise ControlError(f"{os.path.basename(path)}: connection lost during {op!r}: {exc}") from exc
    if received is None:
        raise ControlError(f"{os.path.basename(path)}: closed the connection during {op!r}")
    message, received_fds = received
    if "error" in message:
        wire.close_all(received_fds)
        raise from_wire(message["error"])
    result = message.get("ok")
    if not isinstance(result, dict):
        wire.close_all(received_fds)
        raise ControlError(f"{os.path.basename(path)}: malformed answer to {op!r}")
    return result, received_fds
