"""Messages between the processes of a node, and those that are not ours."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi.control import endpoint, wire
from csi.errors import ControlError, ModelNotFoundError


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        yield left, right


def test_a_message_carries_descriptors(pair: tuple[socket.socket, socket.socket]) -> None:
    fd = wire.memfd("x", b"bulk")
    wire.send(pair[0], {"op": "take", "n": 1}, [fd, fd])
    os.close(fd)
    received = wire.recv(pair[1])
    assert received is not None
    message, fds = received
    assert (message["op"], message["n"], len(fds)) == ("take", 1, 2)
    assert wire.read_all(fds[0], 10, "bulk") == b"bulk"
    with pytest.raises(PermissionError):
        os.write(fds[1], b"changed")
    wire.close_all(fds)


def test_the_end_of_a_connection_is_none(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].close()
    assert wire.recv(pair[1]) is None


@pytest.mark.parametrize("data", [b"{}", b'{"v": 2}', b"[]", b"\xff", b"{", b'{"v": "1"}'])
def test_another_version_or_no_message_at_all_is_refused(data: bytes) -> None:
    with pytest.raises(ControlError):
        wire.decode(data)


@given(st.binary(max_size=500))
def test_only_our_error_comes_out(data: bytes) -> None:
    try:
        assert wire.decode(data)["v"] == 1
    except ControlError:
        return


def test_bulk_does_not_fit_into_a_message() -> None:
    with pytest.raises(ControlError, match="limit"):
        wire.encode({"op": "x", "bulk": "y" * wire.MAX_MESSAGE_BYTES})


def test_a_foreign_message_leaks_no_descriptor(pair: tuple[socket.socket, socket.socket]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    socket.send_fds(pair[0], [b"not json"], [0, 1, 2])
    with pytest.raises(ControlError):
        wire.recv(pair[1])
    assert len(os.listdir("/proc/self/fd")) == before


def serve_once(listener: socket.socket, answer: wire.Message) -> threading.Thread:
    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            received = wire.recv(connection)
            assert received is not None
            wire.send(connection, {"id": received[0]["id"], **answer})

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


def test_a_call_returns_fields_or_raises_the_peers_error(tmp_path: Path) -> None:
    path = str(tmp_path / "x.sock")
    with endpoint.listen(path) as listener:
        thread = serve_once(listener, {"ok": {"n": 1}})
        assert endpoint.call(path, "op", 5.0)[0] == {"n": 1}
        thread.join()
        error = {"kind": "ModelNotFoundError", "message": "no", "fields": {"status": 404}}
        thread = serve_once(listener, {"error": error})
        with pytest.raises(ModelNotFoundError) as caught:
            endpoint.call(path, "op", 5.0)
        assert caught.value.fields == {"status": 404}
        thread.join()
        with pytest.raises(ControlError, match="no answer"):
            endpoint.call(path, "op", 0.05)


def test_a_path_longer_than_a_socket_address_works(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 120)
    path = str(directory / "x.sock")
    with endpoint.listen(path) as listener:
        thread = serve_once(listener, {"ok": {}})
        assert endpoint.call(path, "op", 5.0)[0] == {}
        thread.join()
    assert os.stat(path).st_mode & 0o777 == 0o600


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = str(tmp_path / "keeper.sock")
    with pytest.raises(ControlError, match="modelmount keeper"):
        endpoint.call(path, "ping", 1.0)
    endpoint.listen(path).close()
    with endpoint.listen(path), pytest.raises(ControlError, match="another process"):
        endpoint.listen(path)
