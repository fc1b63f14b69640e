"""The worker's end of the build channel: see `csi.fetcher.build`. Calls come from any thread and may overlap."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

from csi.control import wire
from csi.errors import ControlError, from_wire
from csi.oci.descriptor import Descriptor

_MAX_REPLY_BYTES = 16 * 1024 * 1024
_ASK_AGAIN_S = 5.0

_Reply = tuple[wire.Message, list[int]]


class BuildChannel:
    """Owns `channel`."""

    def __init__(self, channel: socket.socket) -> None:
        channel.setblocking(True)
        self._channel = channel
        self._lock = threading.Lock()
        self._next_id = 1
        self._pending: dict[int, Future[_Reply]] = {}
        self._closed = False
        threading.Thread(target=self._receive, daemon=True, name="build-channel").start()

    def read_range(self, blob: Descriptor, offset: int, length: int, origin: str = "") -> bytes:
        """Unverified bytes; `origin` as in `LayerPlan`. Raises: what the registry answered."""
        return self._bytes(self._call("range", **_named(blob, origin), offset=offset, length=length))

    def read_whole(self, blob: Descriptor, origin: str = "") -> bytes:
        """A small blob, verified. Raises: what the registry answered, DigestMismatchError."""
        return self._bytes(self._call("whole", **_named(blob, origin)))

    def fetch(self, blobs: Sequence[tuple[Descriptor, str]]) -> None:
        """Once: these, each with its origin, will be read block by block, in that order; the other calls name them by their
        position.
        """
        specs = [[str(blob.digest), blob.size_bytes, origin] for blob, origin in blobs]
        specs_fd = wire.memfd("blobs", json.dumps(specs).encode())
        try:
            self._call("fetch", [specs_fd])
        finally:
            os.close(specs_fd)

    def await_block(self, blob: int, block: int, ahead: int) -> None:
        """Returns when the block is in the cache. `ahead` blocks after it will be asked for next."""
        while True:
            try:
                self._call("block", timeout_s=_ASK_AGAIN_S, blob=blob, block=block, ahead=ahead)
                return
            except FutureTimeoutError:  # a busy registry, or a lost message
                continue

    def await_verified(self, blob: int) -> None:
        """Returns when the whole blob is known to be right. Raises: DigestMismatchError."""
        self._call("verified", blob=blob)

    def open_spool(self, blob: Descriptor) -> int:
        """An empty file in the cache, to be written; the caller closes it."""
        _, fds = self._call("spool", **_named(blob))
        return wire.exactly(fds, 1)[0]

    def take_room(self, size_bytes: int) -> None:
        """Before so much of a spool is written. Raises: CacheError when the cache has no room for it."""
        self._call("room", size_bytes=size_bytes)

    def keep_index(self, blob: Descriptor, index: bytes, *, spooled: bool) -> None:
        """Keep what was found out about a layer, and its spool."""
        index_fd = wire.memfd("index", index)
        try:
            self._call("keep", [index_fd], **_named(blob), spooled=spooled)
        finally:
            os.close(index_fd)

    def close(self) -> None:
        """Idempotent. Whoever waits gets a ControlError."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)

    def _call(self, op: str, fds: Sequence[int] = (), timeout_s: float | None = None, **fields: Any) -> _Reply:
        reply: Future[_Reply] = Future()
        with self._lock:
            request_id, self._next_id = self._next_id, self._next_id + 1
            self._pending[request_id] = reply
            try:
                wire.send(self._channel, {"id": request_id, "op": op, **fields}, fds)
            except OSError as exc:
                raise ControlError("the fetcher went away while the model was being prepared; try again") from exc
        try:
            if self._closed:
                raise ControlError("the preparation of the model was ended")
            message, received = reply.result(timeout_s)
        finally:
            self._pending.pop(request_id, None)
        if "error" in message:
            wire.close_all(received)
            raise from_wire(message["error"])
        return message, received

    def _receive(self) -> None:
        with self._channel:
            while True:
                try:
                    received = wire.recv(self._channel)
                except (OSError, ControlError):
                    received = None
                if received is None:
                    break
                reply = self._pending.get(int(received[0].get("id") or 0))
                if reply is None or reply.done():
                    wire.close_all(received[1])
                else:
                    reply.set_result(received)
        self._closed = True
        for reply in list(self._pending.values()):
            if not reply.done():
                reply.set_exception(ControlError("the fetcher went away while the model was being prepared; try again"))

    @staticmethod
    def _bytes(reply: _Reply) -> bytes:
        (data_fd,) = wire.exactly(reply[1], 1)
        try:
            return wire.read_all(data_fd, _MAX_REPLY_BYTES, "range")
        finally:
            os.close(data_fd)


def _named(blob: Descriptor, origin: str = "") -> dict[str, Any]:
    return {"digest": str(blob.digest), "size": blob.size_bytes, "origin": origin}
