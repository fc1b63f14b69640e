"""One message: a JSON object of at most 64 KiB plus up to 16 file descriptors.

    request       {"v": 1, "id": 7, "op": "bind", ...}
    reply         {"v": 1, "id": 7, "ok": {...}}   or   {"v": 1, "id": 7, "error": {kind, message, fields}}
    notification  {"v": 1, "op": "serving", ...}

`v` is the protocol version. A peer that receives another one answers with a ControlError and changes nothing:
keeper, supervisor and node are upgraded one by one, so this number changes only with an upgrade path.
Receivers own the descriptors they get, and close those they do not expect.
"""

from __future__ import annotations

import array
import fcntl
import json
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from csi.errors import ControlError, ModelMountError, to_wire

PROTOCOL_VERSION = 1
MAX_MESSAGE_BYTES = 64 * 1024
MAX_FDS = 16

Message = dict[str, Any]


def encode(message: Mapping[str, Any]) -> bytes:
    """Raises: ControlError when the message is too large (bulk belongs into a memfd)."""
    data = json.dumps({"v": PROTOCOL_VERSION, **message}, separators=(",", ":")).encode()
    if len(data) > MAX_MESSAGE_BYTES:
        raise ControlError(f"control message {message.get('op')!r} has {len(data)} bytes, limit {MAX_MESSAGE_BYTES}")
    return data


def decode(data: bytes) -> Message:
    """Raises: ControlError for anything but a JSON object of our version."""
    try:
        message = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise ControlError("control message is not JSON; is another program using this socket?") from exc
    if not isinstance(message, dict):
        raise ControlError("control message is not a JSON object")
    if message.get("v") != PROTOCOL_VERSION:
        raise ControlError(
            f"control protocol version {message.get('v')!r}, this process speaks {PROTOCOL_VERSION}; "
            "finish the upgrade of keeper, supervisor and node"
        )
    return message


def send(sock: socket.socket, message: Mapping[str, Any], fds: Sequence[int] = ()) -> None:
    """Send one message. The descriptors are duplicated to the peer; ours stay open."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([encode(message)], ancillary, socket.MSG_NOSIGNAL)


def recv(sock: socket.socket) -> tuple[Message, list[int]] | None:
    """Receive one message and its descriptors (close-on-exec). None at end of the connection.

    Raises: ControlError for a malformed message (its descriptors are closed); BlockingIOError and TimeoutError
    as the socket does.
    """
    room = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)
    data, ancillary, flags, _ = sock.recvmsg(MAX_MESSAGE_BYTES + 1, room, socket.MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            received = array.array("i")
            received.frombytes(payload[: len(payload) - len(payload) % received.itemsize])
            fds.extend(received)
    if not data and not fds:
        return None
    try:
        if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
            raise ControlError("control message was cut short")
        return decode(data), fds
    except ControlError:
        close_all(fds)
        raise


def ok(request: Mapping[str, Any], **fields: Any) -> Message:
    """The reply to `request` that says it worked."""
    return {"id": request.get("id"), "ok": fields}


def failed(request: Mapping[str, Any], error: BaseException) -> Message:
    """The reply to `request` that carries `error`."""
    return {"id": request.get("id"), "error": to_wire(error)}


def field(message: Mapping[str, Any], name: str, kind: type) -> Any:
    """A field that must be there and of that type. Raises: ControlError naming it."""
    value = message.get(name)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ControlError(f"control message {message.get('op')!r}: {name} must be {kind.__name__}")
    return value


def exactly(fds: list[int], count: int) -> list[int]:
    """`fds` when there are that many. Raises: ControlError, and then they are closed."""
    if len(fds) != count:
        close_all(fds)
        raise ControlError(f"expected {count} descriptors, got {len(fds)}")
    return fds


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors, ignoring those that are closed."""
    for fd in fds:
        try:
            os.close(fd)
        except OSError:
            continue


def memfd(name: str, content: bytes | bytearray) -> int:
    """A sealed anonymous file with `content`; whoever receives it cannot be shown other bytes later."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(fd, view) :]
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_all(fd: int, limit_bytes: int, what: str) -> bytes:
    """The whole content of a file from offset 0. Raises: ModelMountError when it is larger than the limit."""
    size = os.fstat(fd).st_size
    if size > limit_bytes:
        raise ModelMountError(f"{what} has {size} bytes, limit {limit_bytes}")
    parts, offset = [], 0
    while offset < size and (part := os.pread(fd, size - offset, offset)):
        parts.append(part)
        offset += len(part)
    return b"".join(parts)
