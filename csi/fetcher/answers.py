"""Replies and notifications of one channel, from any thread."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from csi.control import wire
from csi.errors import ModelMountError

log = logging.getLogger(__name__)


class Answers:
    """`peer` is who listens, for the log. What cannot be said is lost: whoever does not hear it asks again, or is gone."""

    def __init__(self, channel: socket.socket, peer: str, level: int = logging.DEBUG) -> None:
        self._channel, self._peer, self._level = channel, peer, level
        self._lock = threading.Lock()

    def say(self, message: wire.Message, fds: Sequence[int] = ()) -> None:
        """One message; the descriptors stay ours."""
        with self._lock:
            try:
                wire.send(self._channel, message, fds)
            except OSError as exc:
                log.log(self._level, "%s not reachable: %s", self._peer, exc)

    def ok(self, request: wire.Message, fds: Sequence[int] = (), **fields: Any) -> None:
        """It worked."""
        self.say(wire.ok(request, **fields), fds)

    def ok_with(self, request: wire.Message, name: str, *contents: bytes | bytearray, **fields: Any) -> None:
        """It worked, and these are the results: each in a memfd."""
        memfds: list[int] = []
        try:
            memfds.extend(wire.memfd(name, content) for content in contents)
            self.ok(request, memfds, **fields)
        finally:
            wire.close_all(memfds)

    @contextmanager
    def failures_of(self, request: wire.Message) -> Iterator[None]:
        """What the block raises is the answer to `request`; a bug also leaves its traceback in the log."""
        try:
            yield
        except ModelMountError as exc:
            self.say(wire.failed(request, exc))
        except Exception as exc:
            log.exception("%s failed by a bug", request.get("op"))
            self.say(wire.failed(request, exc))


def read_and_close(fd: int, limit_bytes: int, what: str) -> bytes:
    """The content of a memfd that came with a message. Raises: ModelMountError when it is larger than the limit."""
    try:
        return wire.read_all(fd, limit_bytes, what)
    finally:
        os.close(fd)
