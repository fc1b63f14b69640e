"""A connection's bytes: heads, bodies, ends, timeouts, and TLS whose records end where nobody asked them to."""

from __future__ import annotations

import random
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi.registry.line import Line, TlsLine

CONTENT = random.Random(1).randbytes(3_000_001)


@pytest.fixture
def ends() -> Iterator[tuple[Line, socket.socket]]:
    ours, theirs = socket.socketpair()
    line = Line(ours)
    line.settimeout(5.0)
    yield line, theirs
    line.close()
    theirs.close()


def test_a_body_goes_on_where_its_head_ended(ends: tuple[Line, socket.socket]) -> None:
    line, theirs = ends
    threading.Thread(target=theirs.sendall, args=(b"HTTP/1.1 200 OK\r\nA: b\r\n\r\n" + CONTENT,), daemon=True).start()
    file = line.makefile("rb")
    assert [file.readline(), file.readline(), file.readline()] == [b"HTTP/1.1 200 OK\r\n", b"A: b\r\n", b"\r\n"]
    body = memoryview(bytearray(len(CONTENT) - 5))
    assert file.readinto(body) == len(body)
    assert body.tobytes() + file.read(5) == CONTENT
    assert not line.has_leftovers


def test_a_line_is_cut_at_its_limit_and_at_the_end(ends: tuple[Line, socket.socket]) -> None:
    line, theirs = ends
    theirs.sendall(b"x" * 40_000 + b"\nlast")
    theirs.shutdown(socket.SHUT_WR)
    file = line.makefile("rb")
    assert file.readline(39_999) == b"x" * 39_999
    assert file.readline() == b"x\n"
    assert file.readline() == b"last"
    assert file.readline() == b""
    assert file.read(10) == b""


def test_what_nobody_asked_for_is_known_to_be_there(ends: tuple[Line, socket.socket]) -> None:
    line, theirs = ends
    theirs.sendall(b"head\nbody+more")
    file = line.makefile("rb")
    assert (file.readline(), file.read(4)) == (b"head\n", b"body")
    assert line.has_leftovers


def test_an_end_that_comes_early_is_a_short_body(ends: tuple[Line, socket.socket]) -> None:
    line, theirs = ends
    theirs.sendall(b"123")
    theirs.close()
    body = memoryview(bytearray(10))
    assert line.makefile("rb").readinto(body) == 3
    assert body[:3].tobytes() == b"123"


def test_what_is_being_read_stays_when_its_connection_is_closed(ends: tuple[Line, socket.socket]) -> None:
    line, theirs = ends
    theirs.sendall(b"abcdef")
    file = line.makefile("rb")
    line.close()
    line.close()
    assert file.read(6) == b"abcdef"
    file.close()
    file.close()
    assert theirs.recv(1) == b""


def test_nothing_for_too_long_is_a_timeout(ends: tuple[Line, socket.socket]) -> None:
    line, _ = ends
    line.settimeout(0.05)
    with pytest.raises(TimeoutError, match=r"nothing came for 0\.05 s"):
        line.makefile("rb").readline()
    with pytest.raises(TimeoutError, match=r"nothing came for 0\.05 s"):
        line.makefile("rb").read(5)


def test_a_byte_now_and_then_is_as_good_as_none(ends: tuple[Line, socket.socket]) -> None:
    line, theirs = ends
    line.settimeout(0.2)
    ended = threading.Event()

    def trickle() -> None:
        while not ended.wait(0.02):
            theirs.sendall(b"x")

    thread = threading.Thread(target=trickle)
    thread.start()
    try:
        with pytest.raises(TimeoutError, match=r"only \d+ bytes came"):
            line.makefile("rb").readinto(memoryview(bytearray(1 << 20)))
    finally:
        ended.set()
        thread.join()


def test_what_the_other_end_does_not_take_is_a_timeout(ends: tuple[Line, socket.socket]) -> None:
    line, _ = ends
    line.settimeout(0.05)
    with pytest.raises(TimeoutError):
        line.sendall(bytes(64 << 20))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """And its key."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    directory = tmp_path_factory.mktemp("tls")
    key, cert = directory / "key", directory / "cert"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run([*command, *names], check=True, capture_output=True)
    (directory / "both").write_text(cert.read_text() + key.read_text())
    return directory / "both"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_body_over_tls_never_waits_for_more_than_will_come(certificate: Path, version: ssl.TLSVersion) -> None:
    """The last piece comes with nothing behind it: who waits for a byte too much, waits for the timeout."""
    ours, theirs = socket.socketpair()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = context.maximum_version = version
    context.load_cert_chain(certificate)
    seen: list[bytes] = []

    def serve() -> None:
        with context.wrap_socket(theirs, server_side=True) as server:
            for seed in range(6):
                seen.append(server.recv(100))
                chance = random.Random(seed)
                server.sendall(b"head\n")
                sent = 0
                while sent < len(CONTENT):
                    sent += server.send(CONTENT[sent : sent + chance.choice((1, 700, 16_384, 16_385, 300_000))])
            seen.append(server.recv(100))  # the connection stays open until then

    thread = threading.Thread(target=serve)
    thread.start()
    client = ssl.create_default_context(cafile=str(certificate))
    line = TlsLine(ours, client, "127.0.0.1", 10.0)
    line.settimeout(3.0)
    for seed in range(6):
        line.sendall(b"ask")
        chance = random.Random(-seed - 1)
        file = line.makefile("rb")
        assert file.readline() == b"head\n"
        body = memoryview(bytearray(len(CONTENT)))
        done = 0
        while done < len(body):
            done += file.readinto(body[done : done + chance.choice((1, 5000, 65_536, 524_288))])
        assert body == CONTENT
        assert not line.has_leftovers
    line.sendall(b"bye")
    thread.join()
    line.close()
    assert seen == [b"ask"] * 6 + [b"bye"]


def test_a_peer_that_does_not_shake_hands_is_a_timeout(certificate: Path) -> None:
    ours, theirs = socket.socketpair()
    with pytest.raises(TimeoutError):
        TlsLine(ours, ssl.create_default_context(), "127.0.0.1", 0.05)
    theirs.close()
    ours.close()


def test_a_certificate_nobody_vouches_for_is_refused(certificate: Path) -> None:
    ours, theirs = socket.socketpair()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    told: list[str] = []

    def serve() -> None:
        try:
            context.wrap_socket(theirs, server_side=True)
        except ssl.SSLError as exc:
            told.append(exc.reason)

    thread = threading.Thread(target=serve)
    thread.start()
    with pytest.raises(ssl.SSLCertVerificationError):
        TlsLine(ours, ssl.create_default_context(), "127.0.0.1", 5.0)
    thread.join()
    ours.close()
    assert told == ["TLSV1_ALERT_UNKNOWN_CA"]  # the alert was sent
