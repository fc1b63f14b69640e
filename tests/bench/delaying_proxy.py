"""`delaying_proxy.py HOST:PORT MS`: an HTTP/1.1 proxy before one server; each GET is passed on MS milliseconds late.

Prints where it listens. Bodies are moved by splice, so that it costs little of what is measured.
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import threading
import time

_PIPE_BYTES = 1 << 20
_HEAD_LIMIT = 1 << 16


def read_head(sock: socket.socket, held: bytes) -> tuple[bytes, bytes]:
    """A message's head and what came after it; both empty at the end of the connection."""
    while b"\r\n\r\n" not in held:
        part = sock.recv(_HEAD_LIMIT)
        if not part or len(held) > _HEAD_LIMIT:
            return b"", b""
        held += part
    head, _, rest = held.partition(b"\r\n\r\n")
    return head + b"\r\n\r\n", rest


def body_length(head: bytes) -> int:
    """What Content-Length says; 0 without one."""
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


def serve(client: socket.socket, upstream: tuple[str, int], delay_s: float) -> None:
    """One connection, with one of its own to the server."""
    reading, writing = os.pipe()
    try:
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        with client, socket.create_connection(upstream) as server:
            for sock in (client, server):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            held = b""
            while True:
                head, held = read_head(client, held)
                if not head:
                    return
                time.sleep(delay_s)
                server.sendall(head)
                answer, begun = read_head(server, b"")
                if not answer:
                    return
                left = 0 if head.startswith(b"HEAD ") else body_length(answer) - len(begun)
                client.sendall(answer + begun)
                while left > 0:
                    count = os.splice(server.fileno(), writing, min(left, _PIPE_BYTES))
                    if count == 0:
                        return
                    left -= count
                    while count:
                        count -= os.splice(reading, client.fileno(), count)
    except OSError:
        return
    finally:
        os.close(reading)
        os.close(writing)


def main() -> None:
    """Until killed."""
    host, _, port = sys.argv[1].rpartition(":")
    listening = socket.create_server(("127.0.0.1", 0), backlog=64)
    print(f"127.0.0.1:{listening.getsockname()[1]}", flush=True)
    while True:
        client, _ = listening.accept()
        arguments = (client, (host, int(port)), float(sys.argv[2]) / 1000)
        threading.Thread(target=serve, args=arguments, daemon=True).start()


if __name__ == "__main__":
    main()
