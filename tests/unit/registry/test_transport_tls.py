"""TLS of a host as its configuration says: CAs, client certificates, and none of it for other hosts."""

from __future__ import annotations

import gc
import http.server
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi.errors import RegistryError, RegistryUnavailableError
from csi.registry.address_rules import AddressRules
from csi.registry.transport import TlsSettings, Transport, TransportSettings


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, Path]:
    """A self-signed certificate for 127.0.0.1, its key, and both in one file."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    directory = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"]
    places = [
        "-keyout",
        str(directory / "key"),
        "-out",
        str(directory / "cert"),
        "-addext",
        "subjectAltName=IP:127.0.0.1",
    ]
    subprocess.run([*command, *places], check=True, capture_output=True)
    certificate, key = (directory / "cert").read_text(), (directory / "key").read_text()
    (directory / "both").write_text(certificate + key)
    return certificate, key, directory / "both"


@pytest.fixture
def authority(pem: tuple[str, str, Path]) -> Iterator[str]:
    """A server that wants a client certificate, and answers with whether it got one."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert isinstance(self.connection, ssl.SSLSocket)
            self.send_response(200 if self.connection.getpeercert() else 403)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *args: None  # type: ignore[method-assign]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem[2])
    context.load_verify_locations(pem[2])
    context.verify_mode = ssl.CERT_OPTIONAL
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def status(authority: str, tls: TlsSettings) -> int:
    transport = Transport(AddressRules(), TransportSettings(tls=tls, connect_timeout_s=5.0))
    try:
        response = transport.get(f"https://{authority}/", {})
        response.discard()
        return response.status
    finally:
        transport.close()


def test_ca_client_certificate_and_skip_verify(authority: str, pem: tuple[str, str, Path]) -> None:
    certificate, key, _ = pem
    with pytest.raises(RegistryUnavailableError, match="TLS failed"):
        status(authority, TlsSettings(authority))
    assert status(authority, TlsSettings(authority, ca=(certificate,))) == 403
    assert status(authority, TlsSettings(authority, ca=(certificate,), client=((certificate, key),))) == 200
    assert status(authority, TlsSettings(authority, ca=(certificate,), client=((certificate + key, ""),))) == 200
    assert status(authority, TlsSettings(authority, skip_verify=True)) == 403


def test_none_of_it_is_for_another_host(authority: str, pem: tuple[str, str, Path]) -> None:
    certificate, key, _ = pem
    elsewhere = TlsSettings("mirror.example.com", ca=(certificate,), client=((certificate, key),))
    assert status(authority, elsewhere) == 403, "a CA is; a client certificate is not"
    with pytest.raises(RegistryUnavailableError, match="TLS failed"):
        status(authority, TlsSettings("mirror.example.com", skip_verify=True))


@pytest.mark.parametrize("tls", [TlsSettings("X", ca=("canary",)), TlsSettings("X", client=(("canary", "canary"),))])
def test_files_that_cannot_be_used_are_named_without_their_text(authority: str, tls: TlsSettings) -> None:
    own = TlsSettings(authority, tls.ca, tls.client)
    with pytest.raises(RegistryError) as caught:
        status(authority, own)
    assert "cannot be used" in str(caught.value)
    assert "canary" not in str(caught.value)


@pytest.fixture(autouse=True)
def leaks_show_here() -> Iterator[None]:
    """A socket that is left open is a failure of the test it belongs to."""
    yield
    gc.collect()
