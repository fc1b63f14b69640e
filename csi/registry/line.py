"""One TCP connection as http.client uses it, plain or TLS, that receives a body in as few system calls as it can.

A socket with a timeout of Python's own asks poll() before every recv(), and is handed what has come by then: thousands of
calls a GiB, each of which gives the interpreter lock away and waits to have it back. Here the kernel keeps the timeout, and
is told to wait for all of a piece. TLS is done in memory, because OpenSSL by itself makes two calls for each 16 KiB.

Not thread-safe. A timeout is a TimeoutError, and so is a body of which only a byte comes now and then.
"""

from __future__ import annotations

import io
import mmap
import socket
import ssl
import struct
import time
from typing import cast

_HEAD_BYTES = 16 * 1024
"""Received at once where it is not known how much will come."""
_TLS_PIECE_BYTES = 256 * 1024
_RECORD_BYTES = 20 * 1024
"""At least what OpenSSL takes of one TLS record before it is whole."""
_LONGEST_LINE = 64 * 1024
_LEAST_BYTES_PER_S = 1024
"""Less, for as long as a timeout, counts as nothing. A guess, not measured."""
_TIMEVAL = struct.Struct("@ll")


class Line:
    """Takes over a connected socket. What http.client does with a socket, it does with this."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._early = memoryview(b"")  # came with something else, and is not read yet
        self._users = 1  # this, and each file made of it
        self._closed = False
        self._timeout_s = 0.0
        self._waited_s, self._waited_bytes = 0.0, 0
        sock.settimeout(None)

    @property
    def has_leftovers(self) -> bool:
        """Whether bytes came that nobody asked for: the next answer would begin with them."""
        return len(self._early) > 0

    def as_socket(self) -> socket.socket:
        """Itself: http.client says that it wants a socket, and uses what is here."""
        return cast(socket.socket, self)

    def settimeout(self, timeout_s: float) -> None:
        """For each wait from now on."""
        if timeout_s == self._timeout_s:
            return
        self._timeout_s = timeout_s
        value = _TIMEVAL.pack(int(timeout_s), max(1, int(timeout_s % 1 * 1e6)))  # 0 would be for ever
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._sock.setsockopt(socket.SOL_SOCKET, option, value)

    def sendall(self, data: bytes) -> None:
        """Raises: OSError."""
        try:
            self._sock.sendall(data)
        except BlockingIOError as exc:
            raise TimeoutError("could not send in time") from exc

    def makefile(self, mode: str) -> Incoming:
        """What comes from now on. It stays readable when the connection is closed before it is."""
        self._users += 1
        self._waited_s, self._waited_bytes = 0.0, 0
        return Incoming(self)

    def close(self) -> None:
        """Idempotent."""
        if not self._closed:
            self._closed = True
            self.leave()

    def leave(self) -> None:
        """One user less; the last one closes the socket."""
        self._users -= 1
        if not self._users:
            self._sock.close()

    def read_line(self, limit: int) -> bytes:
        """To the next newline, at most `limit` bytes; shorter at the end."""
        found = bytearray()
        while len(found) < limit:
            if not self._early and not self._receive_early():
                break
            part = bytes(self._early[: limit - len(found)])
            part = part[: part.find(b"\n") + 1] or part
            self._early = self._early[len(part) :]
            found += part
            if part.endswith(b"\n"):
                break
        return bytes(found)

    def fill(self, buffer: memoryview) -> int:
        """Fill all of `buffer`, which must be no more than is still to come; less at the end. Raises: OSError."""
        done = 0
        while done < len(buffer):
            if self._early:
                count = min(len(self._early), len(buffer) - done)
                buffer[done : done + count] = self._early[:count]
                self._early = self._early[count:]
            else:
                begun = time.monotonic()
                count = self._receive(buffer[done:])
                self._check_rate(time.monotonic() - begun, count)
            if not count:
                break
            done += count
        return done

    def _receive_early(self) -> int:
        part = memoryview(bytearray(_HEAD_BYTES))
        self._early = part[: self._receive(part, wait_for_all=False)]
        return len(self._early)

    def _receive(self, buffer: memoryview, *, wait_for_all: bool = True) -> int:
        """At least a byte, 0 at the end. `wait_for_all`: so much will come."""
        return self._receive_raw(buffer, wait_for_all)

    def _receive_raw(self, buffer: memoryview, wait_for_all: bool) -> int:
        try:
            return self._sock.recv_into(buffer, 0, socket.MSG_WAITALL if wait_for_all else 0)
        except BlockingIOError as exc:
            raise TimeoutError(f"nothing came for {self._timeout_s:g} s") from exc

    def _check_rate(self, waited_s: float, count: int) -> None:
        self._waited_s += waited_s
        self._waited_bytes += count
        if self._waited_s > self._timeout_s:
            if self._waited_bytes < _LEAST_BYTES_PER_S * self._waited_s:
                raise TimeoutError(f"only {self._waited_bytes} bytes came in {self._waited_s:.0f} s")
            self._waited_s, self._waited_bytes = 0.0, 0


class TlsLine(Line):
    """Shakes hands on being made. Raises: OSError, with it every ssl.SSLError."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, host: str, timeout_s: float) -> None:
        super().__init__(sock)
        self.settimeout(timeout_s)
        self._came, self._leaving = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._came, self._leaving, server_hostname=host)
        self._piece = memoryview(mmap.mmap(-1, _TLS_PIECE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        while not self._shake_hands():
            self._take_in(0)

    def _shake_hands(self) -> bool:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        finally:
            self._flush()  # also the alert that says what is wrong
        return True

    def sendall(self, data: bytes) -> None:
        """See `Line.sendall`."""
        self._tls.write(data)
        self._flush()

    def _receive(self, buffer: memoryview, *, wait_for_all: bool = True) -> int:
        while True:
            done = 0
            try:
                while done < len(buffer) and (count := self._decrypt(buffer[done:])):
                    done += count
                return done
            except ssl.SSLWantReadError:
                if done:
                    return done
            except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
                return done
            self._flush()
            self._take_in(len(buffer) if wait_for_all else 0)

    def _decrypt(self, buffer: memoryview) -> int:
        count: int = self._tls.read(len(buffer), buffer)  # type: ignore[assignment]  # with a buffer it is a number
        return count

    def _take_in(self, expected: int) -> None:
        """More of what OpenSSL reads. `expected` bytes are still to be had, no shorter while they are encrypted, of which it may
        hold a part of a record already.
        """
        missing = min(expected - self._came.pending - _RECORD_BYTES, len(self._piece))
        count = self._receive_raw(self._piece[:missing] if missing > 0 else self._piece, missing > 0)
        if count:
            self._came.write(self._piece[:count])
        else:
            self._came.write_eof()

    def _flush(self) -> None:
        if self._leaving.pending:
            super().sendall(self._leaving.read())


class Incoming(io.BufferedIOBase):
    """What http.client reads an answer from. `read` and `readinto` bring all that they were asked for, less only at the end."""

    def __init__(self, line: Line) -> None:
        self._line = line

    def readable(self) -> bool:
        """Yes."""
        return True

    def readline(self, size: int | None = -1, /) -> bytes:
        """See `Line.read_line`."""
        return self._line.read_line(_LONGEST_LINE if size is None or size < 0 else size)

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        """See `Line.fill`."""
        return self._line.fill(memoryview(buffer))

    def read(self, size: int | None = -1, /) -> bytes:
        """At most `size` bytes."""
        if size is None or size < 0:
            raise io.UnsupportedOperation("a body is read by its length")
        buffer = bytearray(size)
        return bytes(memoryview(buffer)[: self._line.fill(memoryview(buffer))])

    def close(self) -> None:
        """Idempotent."""
        if not self.closed:
            super().close()
            self._line.leave()
