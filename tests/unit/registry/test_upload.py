"""`ModelUploader` against a registry in this process that takes pushes, and misbehaves on order."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from registry_process import PASSWORD, USERNAME, RegistryProcess
from requests.adapters import HTTPAdapter

from csi.credentials import Credential, Credentials
from csi.errors import (
    DigestMismatchError,
    ModelMountError,
    ModelNotFoundError,
    RegistryAuthError,
    RegistryError,
    RegistryUnavailableError,
    SizeMismatchError,
    UnsupportedModelError,
)
from csi.oci.descriptor import Descriptor
from csi.oci.digest import Digest
from csi.oci.modelpack import ModelDescription, PackedModel, SourceFile, pack
from csi.oci.reference import Reference
from csi.registry import upload
from csi.registry.pushing import PushProgress, PushState
from csi.registry.realm import check_realm
from csi.registry.upload import ModelUploader

_ANN = (Credential("ann", "s3cret"),)
_BASIC = "Basic " + base64.b64encode(b"ann:s3cret").decode()


@dataclass(frozen=True, slots=True)
class Asked:
    """One request as it arrived. `path` is without query."""

    method: str
    path: str
    query: str
    headers: dict[str, str]

    @property
    def authorization(self) -> str | None:
        return self.headers.get("authorization")


Said = tuple[int, dict[str, str], bytes]


class PushRegistry:
    """Takes pushes, keeps sizes and manifests but no blob bytes. `interfere` may answer instead."""

    def __init__(self, certificate: Path | None = None) -> None:
        self.blobs: dict[str, int] = {}
        self.manifests: dict[str, bytes] = {}
        self.asked: list[Asked] = []
        self.interfere: Callable[[Asked], Said | None] = lambda asked: None
        self.cut_after: int | None = None
        """Bytes of a PUT after which the connection is reset."""
        registry = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                registry._handle(self)

            do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = handle_any

            def log_message(self, format: str, *args: Any) -> None:
                return

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                return

        self._server = Server(("127.0.0.1", 0), Handler)
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = int(self._server.server_address[1])
        self.host = f"127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> PushRegistry:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def methods(self, part: str = "") -> list[str]:
        return [asked.method for asked in self.asked if part in asked.path]

    def _handle(self, request: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(request.path)
        headers = {name.lower(): value for name, value in request.headers.items()}
        asked = Asked(request.command, parts.path, parts.query, headers)
        self.asked.append(asked)
        body = self._read_body(request, int(headers.get("content-length", 0)))
        if body is None:
            return
        status, answered, content = self.interfere(asked) or self._answer(asked, *body)
        request.send_response(status)
        for name, value in answered.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content)

    def _read_body(self, request: BaseHTTPRequestHandler, length: int) -> tuple[str, int, bytes] | None:
        """Digest, size and the first bytes; None when the sender went away, or the connection was cut."""
        hasher, done, kept = hashlib.sha256(), 0, b""
        while done < length:
            block = request.rfile.read(min(length - done, 1 << 20))
            if not block or (self.cut_after is not None and done >= self.cut_after):
                request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                request.connection.close()
                request.close_connection = True
                return None
            hasher.update(block)
            done += len(block)
            kept = kept or block
        return "sha256:" + hasher.hexdigest(), done, kept

    def _answer(self, asked: Asked, digest: str, size: int, content: bytes) -> Said:
        name = asked.path.rpartition("/")[2]
        if asked.method == "HEAD":
            return (200 if name in self.blobs else 404), {}, b""
        if asked.method == "POST":
            return 202, {"Location": f"{asked.path}session?state=x"}, b""
        wanted = parse_qs(asked.query).get("digest", [""])[0]
        if "/manifests/" in asked.path:
            self.manifests[name] = content
        elif digest != wanted:
            return 400, {}, json.dumps({"errors": [{"code": "DIGEST_INVALID"}]}).encode()
        else:
            self.blobs[digest] = size
        return 201, {"Docker-Content-Digest": digest}, b""


@pytest.fixture
def registry() -> Iterator[PushRegistry]:
    with PushRegistry() as running:
        yield running


@pytest.fixture
def other() -> Iterator[PushRegistry]:
    with PushRegistry() as running:
        yield running


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A model of three files, one of them empty and one larger than a read."""
    contents = {"config.json": b"{}", "empty.json": b"", "model.safetensors": os.urandom(2_500_000)}
    paths = {name: tmp_path / name for name in contents}
    for name, content in contents.items():
        paths[name].write_bytes(content)
    return paths


def packed(files: dict[str, Path]) -> PackedModel:
    sources = [SourceFile(name, Digest.of(path.read_bytes()), path.stat().st_size) for name, path in files.items()]
    return pack(sources, ModelDescription(name="m"))


def uploader(
    registry: PushRegistry, *, credentials: Credentials = (), plain_http: bool = False, host: str = ""
) -> ModelUploader:
    reference = Reference.parse(f"{host or registry.host}/models/m:v1")
    return ModelUploader(reference, plain_http=plain_http, credentials=credentials)


def push(sink: ModelUploader, files: dict[str, Path]) -> list[PushProgress]:
    """Everything; returns the progress events."""
    events: list[PushProgress] = []
    model = packed(files)
    try:
        for file, layer in zip(model.files, model.layers, strict=True):
            sink.put_file(layer, str(files[file.path]), events.append)
        sink.finish(model, "v1")
    finally:
        sink.close()
    return events


def failure(sink: ModelUploader, files: dict[str, Path]) -> ModelMountError:
    with pytest.raises(ModelMountError) as caught:
        push(sink, files)
    assert str(caught.value).isprintable()
    assert "s3cret" not in str(caught.value)
    return caught.value


# --- what is sent ---------------------------------------------------------------------------------------------------


def test_a_push_stores_every_blob_then_the_manifest_by_digest_then_the_tag(
    registry: PushRegistry, files: dict[str, Path]
) -> None:
    model = packed(files)
    push(uploader(registry), files)
    stored = {str(layer.digest): layer.size_bytes for layer in (*model.layers, model.config_descriptor)}
    assert registry.blobs == stored
    assert registry.manifests == {str(model.digest): model.manifest, "v1": model.manifest}
    assert list(registry.manifests) == [str(model.digest), "v1"]
    puts = [asked for asked in registry.asked if asked.method == "PUT"]
    assert [asked.path.rpartition("/")[2] for asked in puts[-2:]] == [str(model.digest), "v1"]
    for asked in puts:
        assert "transfer-encoding" not in asked.headers
        assert asked.headers["accept-encoding"] == "identity"
    assert registry.methods("/blobs/uploads/") == ["POST", "PUT"] * 4


def test_a_second_push_sends_no_blob(registry: PushRegistry, files: dict[str, Path]) -> None:
    push(uploader(registry), files)
    registry.asked.clear()
    events = push(uploader(registry), files)
    assert [asked.method for asked in registry.asked] == ["HEAD"] * 4 + ["PUT"] * 2
    assert [event.state for event in events] == [PushState.EXISTS] * 3


def test_progress_counts_up_to_the_size_and_ends_with_the_outcome(
    registry: PushRegistry, files: dict[str, Path]
) -> None:
    events = [event for event in push(uploader(registry), files) if event.path.endswith("model.safetensors")]
    assert [event.bytes_done for event in events] == sorted(event.bytes_done for event in events)
    assert {event.bytes_total for event in events} == {2_500_000}
    assert [event.state for event in events[:-1]] == [PushState.UPLOADING] * (len(events) - 1)
    assert (events[-1].state, events[-1].bytes_done) == (PushState.UPLOADED, 2_500_000)
    assert len(events) >= 4


def test_upload_address_may_be_absolute_relative_or_have_a_query(
    registry: PushRegistry, files: dict[str, Path]
) -> None:
    forms = iter(
        [
            "/v2/models/m/blobs/uploads/1",
            "2?state=y",
            f"http://{registry.host}/v2/models/m/blobs/uploads/3",
            f"http://127.0.0.1:{registry.port}/4?a=b&c=d",
        ]
    )
    registry.interfere = lambda asked: (202, {"Location": next(forms)}, b"") if asked.method == "POST" else None
    push(uploader(registry), files)
    puts = [f"{asked.path}?{asked.query}" for asked in registry.asked if asked.method == "PUT"][:4]
    assert [put.partition("?")[0].rpartition("/")[2] for put in puts] == ["1", "2", "3", "4"]
    assert puts[1].partition("?")[2].startswith("state=y&digest=sha256:")
    assert puts[3].partition("?")[2].startswith("a=b&c=d&digest=sha256:")


@pytest.mark.parametrize("location", ["", "ftp://x/y", "http://[::::]/", "http://user:pw@127.0.0.1/"])
def test_an_unusable_upload_address_is_refused(registry: PushRegistry, files: dict[str, Path], location: str) -> None:
    registry.interfere = lambda asked: (202, {"Location": location}, b"") if asked.method == "POST" else None
    error = failure(uploader(registry), files)
    assert type(error) is RegistryError
    assert "no usable address" in str(error)
    assert "pw" not in str(error)


def test_memory_stays_small_however_large_the_file(registry: PushRegistry, tmp_path: Path) -> None:
    big = tmp_path / "model.safetensors"
    with big.open("wb") as file:
        file.truncate(300 * 1024 * 1024)
    script = f"""
import hashlib, re
from csi.oci.descriptor import Descriptor
from csi.oci.digest import Digest
from csi.oci.reference import Reference
from csi.registry.upload import ModelUploader
with open({str(big)!r}, "rb") as file:
    digest = Digest("sha256", hashlib.file_digest(file, "sha256").hexdigest())
sink = ModelUploader(Reference.parse("{registry.host}/m:v1"), plain_http=False)
print(sink.put_file(Descriptor("a/b", digest, {300 * 1024 * 1024}), {str(big)!r}, lambda event: None))
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    state, peak_kib = done.stdout.split()
    assert state == "uploaded"
    assert list(registry.blobs.values()) == [300 * 1024 * 1024]
    assert int(peak_kib) < 100 * 1024


def test_blobs_a_registry_keeps_behind_a_redirect_are_there(registry: PushRegistry, files: dict[str, Path]) -> None:
    def redirect(asked: Asked) -> Said | None:
        return (307, {"Location": "https://storage.invalid/x?sig=1"}, b"") if asked.method == "HEAD" else None

    registry.interfere = redirect
    assert [event.state for event in push(uploader(registry), files)] == [PushState.EXISTS] * 3


def test_a_malformed_redirect_is_our_error(registry: PushRegistry, files: dict[str, Path]) -> None:
    registry.interfere = lambda asked: (307, {"Location": "http://[::::]/"}, b"")
    assert isinstance(failure(uploader(registry), files), RegistryError)


def test_a_registry_that_has_moved_is_named(registry: PushRegistry, files: dict[str, Path]) -> None:
    registry.interfere = lambda asked: (301, {"Location": f"https://new.example.com{asked.path}?q=s3cret"}, b"")
    error = failure(uploader(registry), files)
    assert "redirects to https://new.example.com/v2/models/m/blobs/sha256:" in str(error)


# --- files that change, registries that lie ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda content: content[:-1], SizeMismatchError),
        (lambda content: content + b"x", SizeMismatchError),
        (lambda content: b"", SizeMismatchError),
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), DigestMismatchError),
        (lambda content: bytes([content[0] ^ 1]) + content[1:], DigestMismatchError),
    ],
    ids=["shorter", "longer", "emptied", "last byte", "first byte"],
)
def test_a_file_that_changed_is_noticed_and_never_stored(
    registry: PushRegistry, files: dict[str, Path], change: Callable[[bytes], bytes], kind: type[ModelMountError]
) -> None:
    path = files["model.safetensors"]
    (layer,) = packed({path.name: path}).layers
    path.write_bytes(change(path.read_bytes()))
    sink = uploader(registry)
    with pytest.raises(kind, match=r"changed while it was pushed .*push again") as caught:
        sink.put_file(layer, str(path), lambda event: None)
    sink.close()
    assert caught.value.fields["subject"] == str(path)
    assert registry.blobs == {}


def test_an_empty_file_that_grew_is_noticed(registry: PushRegistry, files: dict[str, Path]) -> None:
    path = files["empty.json"]
    (layer,) = packed({path.name: path}).layers
    path.write_bytes(b"x")
    sink = uploader(registry)
    with pytest.raises(SizeMismatchError):
        sink.put_file(layer, str(path), lambda event: None)
    sink.close()
    assert registry.blobs == {}


def test_a_missing_file_is_named(registry: PushRegistry, tmp_path: Path) -> None:
    sink = uploader(registry)
    with pytest.raises(UnsupportedModelError, match=r"gone: cannot be read: No such file"):
        sink.put_file(Descriptor("a/b", Digest.of(b"x"), 1), str(tmp_path / "gone"), lambda event: None)
    sink.close()
    assert registry.asked == []


@pytest.mark.parametrize("part", ["/blobs/", "/manifests/"])
def test_a_registry_that_stored_something_else_is_an_error(
    registry: PushRegistry, files: dict[str, Path], part: str
) -> None:
    wrong = {"Docker-Content-Digest": "sha256:" + "0" * 64}
    registry.interfere = lambda asked: (201, wrong, b"") if asked.method == "PUT" and part in asked.path else None
    error = failure(uploader(registry), files)
    assert isinstance(error, DigestMismatchError)
    assert error.fields["actual"] == "sha256:" + "0" * 64


def test_a_digest_of_another_algorithm_and_none_at_all_are_no_contradiction(
    registry: PushRegistry, files: dict[str, Path]
) -> None:
    told: dict[str, str] = {"Docker-Content-Digest": "sha512:" + "0" * 128}
    registry.interfere = lambda asked: (201, told, b"") if asked.method == "PUT" else None
    push(uploader(registry), files)
    told.clear()
    push(uploader(registry), files)


def test_bytes_that_arrive_damaged_are_an_error(registry: PushRegistry, files: dict[str, Path]) -> None:
    said = json.dumps({"errors": [{"code": "DIGEST_INVALID", "message": "no"}]}).encode()
    registry.interfere = lambda asked: (400, {}, said) if asked.method == "PUT" else None
    assert isinstance(failure(uploader(registry), files), DigestMismatchError)


@pytest.mark.parametrize(
    ("status", "kind", "hint"),
    [
        (403, RegistryAuthError, "--username"),
        (404, ModelNotFoundError, "does the repository exist"),
        (405, RegistryError, "expected 202"),
        (413, RegistryError, "raise its limit"),
        (429, RegistryUnavailableError, "push again later"),
        (500, RegistryUnavailableError, "push again later"),
        (503, RegistryUnavailableError, "push again later"),
    ],
)
def test_refusals_carry_status_code_and_next_step(
    registry: PushRegistry, files: dict[str, Path], status: int, kind: type[ModelMountError], hint: str
) -> None:
    said = json.dumps({"errors": [{"code": "DENIED", "message": "because\n\x1b[2J" + "x" * 500}]}).encode()
    registry.interfere = lambda asked: (status, {}, said) if asked.method == "POST" else None
    error = failure(uploader(registry), files)
    assert type(error) is kind
    assert error.fields["status"] == status
    assert f"answered {status} (DENIED: because??[2Jxxx" in str(error)
    assert hint in str(error)
    assert len(str(error)) < 600


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"errors": []}', b'{"errors": [1]}', b"[" * 60_000, b"\xff"])
def test_refusals_without_the_usual_body_are_mapped_too(
    registry: PushRegistry, files: dict[str, Path], body: bytes
) -> None:
    registry.interfere = lambda asked: (500, {}, body) if asked.method == "POST" else None
    assert isinstance(failure(uploader(registry), files), RegistryUnavailableError)


def test_a_registry_in_trouble_is_not_asked_to_take_the_blob(registry: PushRegistry, files: dict[str, Path]) -> None:
    registry.interfere = lambda asked: (503, {}, b"") if asked.method == "HEAD" else None
    assert isinstance(failure(uploader(registry), files), RegistryUnavailableError)
    assert registry.methods() == ["HEAD"]


# --- connections ------------------------------------------------------------------------------------------------------


def test_a_connection_that_is_reset_in_the_middle_is_unavailable(
    registry: PushRegistry, files: dict[str, Path]
) -> None:
    registry.cut_after = 1_000_000
    error = failure(uploader(registry), files)
    assert isinstance(error, RegistryUnavailableError)
    assert "PUT http://127.0.0.1" in str(error)
    assert "state=" not in str(error)


def test_a_registry_that_never_answers_times_out(
    registry: PushRegistry, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "_ANSWER_TIMEOUT_S", 0.2)
    released = threading.Event()

    def stall(asked: Asked) -> Said | None:
        if asked.method == "PUT":
            released.wait(20)
        return None

    registry.interfere = stall
    started = time.monotonic()
    error = failure(uploader(registry), files)
    released.set()
    assert isinstance(error, RegistryUnavailableError)
    assert "no answer in time" in str(error)
    assert time.monotonic() - started < 10


def test_every_request_has_timeouts(
    registry: PushRegistry, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    send = HTTPAdapter.send

    def spy(self: Any, request: Any, stream: bool, timeout: Any, *args: Any) -> Any:
        given.append((request.url, timeout))
        return send(self, request, stream, timeout, *args)

    monkeypatch.setattr(HTTPAdapter, "send", spy)
    push(uploader(registry, credentials=_ANN), files)
    assert len(given) == len(registry.asked)
    assert all(0 < connect <= 120 and 0 < answer <= 125 for _, (connect, answer) in given)


def test_nobody_listening_and_no_such_name_are_unavailable(files: dict[str, Path]) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{closed.getsockname()[1]}"
        sink = ModelUploader(Reference.parse(f"{host}/m:v1"), plain_http=False)
        error = failure(sink, files)
    assert isinstance(error, RegistryUnavailableError)
    assert "Connection refused; is the address right" in str(error)
    sink = ModelUploader(Reference.parse("registry.invalid/m:v1"), plain_http=False)
    assert isinstance(failure(sink, files), RegistryUnavailableError)


@pytest.fixture
def resolves_to_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every name is this machine."""
    resolve = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *args, **kwargs: resolve("127.0.0.1", *args, **kwargs))


@pytest.mark.usefixtures("resolves_to_loopback")
def test_plain_http_is_for_loopback_and_for_those_who_asked(registry: PushRegistry, files: dict[str, Path]) -> None:
    host = f"registry.example.com:{registry.port}"
    error = failure(uploader(registry, host=host), files)
    assert isinstance(error, RegistryUnavailableError)
    assert "--plain-http" in str(error)
    assert registry.asked == []
    push(uploader(registry, host=host, plain_http=True), files)
    assert len(registry.blobs) == 4


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Self-signed, for registry.example.com; key and certificate in one file."""
    path = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"]
    names = ["-addext", "subjectAltName=DNS:registry.example.com"]
    try:
        subprocess.run(
            [*command, *names, "-keyout", path / "key", "-out", path / "cert"], check=True, capture_output=True
        )
    except FileNotFoundError:
        pytest.skip("no openssl to make a certificate with")
    (path / "both").write_bytes((path / "key").read_bytes() + (path / "cert").read_bytes())
    return path / "both"


@pytest.mark.usefixtures("resolves_to_loopback")
def test_tls_is_checked_with_the_systems_cas(
    certificate: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with PushRegistry(certificate) as registry:
        host = f"registry.example.com:{registry.port}"
        error = failure(uploader(registry, host=host), files)
        assert isinstance(error, RegistryUnavailableError)
        assert "self-signed certificate; check its certificate and this machine's CAs" in str(error)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate.with_name("cert")))
        push(uploader(registry, host=host), files)
        assert len(registry.blobs) == 4
        # A registry behind a proxy that does not know it is reached over https.
        address = {"Location": f"http://{host}/v2/models/m/blobs/uploads/1"}
        registry.blobs.clear()
        registry.interfere = lambda asked: (202, address, b"") if asked.method == "POST" else None
        error = failure(uploader(registry, host=host), files)
        assert "wants the upload over plain HTTP" in str(error)


# --- credentials ------------------------------------------------------------------------------------------------------


def test_basic_credentials_go_to_the_registry_and_not_to_its_storage(
    registry: PushRegistry, other: PushRegistry, files: dict[str, Path]
) -> None:
    location = {"Location": f"http://{other.host}/bucket?sig=1"}

    def interfere(asked: Asked) -> Said | None:
        if asked.authorization != _BASIC:
            return 401, {"WWW-Authenticate": 'Basic realm="x"'}, b""
        return (202, location, b"") if asked.method == "POST" else None

    registry.interfere = interfere
    push(uploader(registry, credentials=_ANN), files)
    assert [asked.authorization for asked in registry.asked][:2] == [None, _BASIC], "only once it is asked for"
    assert {asked.authorization for asked in registry.asked[1:]} == {_BASIC}
    assert [asked.authorization for asked in other.asked] == [None] * 4
    assert len(other.blobs) == 4


def test_a_refused_password_is_tried_once(registry: PushRegistry, files: dict[str, Path]) -> None:
    registry.interfere = lambda asked: (401, {"WWW-Authenticate": 'Basic realm="x"'}, b"")
    error = failure(uploader(registry, credentials=_ANN), files)
    assert isinstance(error, RegistryAuthError)
    assert error.fields["status"] == 401
    assert "(it wants basic); check the password" in str(error)
    assert [asked.authorization for asked in registry.asked] == [None, _BASIC]


def test_no_credentials_come_from_the_surroundings(
    registry: PushRegistry, other: PushRegistry, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auths = {"auths": {registry.host: {"auth": base64.b64encode(b"ann:s3cret").decode()}}}
    (tmp_path / ".docker").mkdir()
    (tmp_path / ".docker" / "config.json").write_text(json.dumps(auths))
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login ann password s3cret\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ORAS_USER", "ann")
    monkeypatch.setenv("ORAS_PASS", "s3cret")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("http_proxy", f"http://{other.host}")
    push(uploader(registry), files)
    assert {asked.authorization for asked in registry.asked} == {None}
    assert other.asked == []


def answering(path: str, answer: Said, otherwise: Callable[[Asked], Said | None]) -> Callable[[Asked], Said | None]:
    return lambda asked: answer if asked.path == path else otherwise(asked)


def bearer_registry(realm: str, *, expected: str | None = _BASIC) -> Callable[[Asked], Said | None]:
    """Wants a token with the right scope, from `realm` in exchange for `expected`."""

    def interfere(asked: Asked) -> Said | None:
        if asked.path == "/token":
            if asked.authorization != expected:
                return 401, {}, b""
            return 200, {}, json.dumps({"token": parse_qs(asked.query)["scope"][0]}).encode()
        scope = "repository:models/m:" + ("pull" if asked.method == "HEAD" else "pull,push")
        if not (asked.authorization or "").startswith(f"Bearer {scope}"):
            return 401, {"WWW-Authenticate": f'Bearer realm="{realm}",service="s",scope="{scope}"'}, b""
        return None

    return interfere


def test_a_token_registry_gets_one_token_per_scope(registry: PushRegistry, files: dict[str, Path]) -> None:
    registry.interfere = bearer_registry(f"http://{registry.host}/token")
    push(uploader(registry, credentials=_ANN), files)
    assert len(registry.blobs) == 4
    tokens = [asked for asked in registry.asked if asked.path == "/token"]
    assert [parse_qs(asked.query) for asked in tokens] == [
        {"service": ["s"], "scope": ["repository:models/m:pull"]},
        {"service": ["s"], "scope": ["repository:models/m:pull,push"]},
    ]
    puts = {asked.authorization for asked in registry.asked if asked.method == "PUT"}
    assert puts == {"Bearer repository:models/m:pull,push"}


def test_tokens_are_renewed_before_they_end(
    registry: PushRegistry, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "_TOKEN_AGE_S", -1.0)
    registry.interfere = bearer_registry(f"http://{registry.host}/token")
    push(uploader(registry, credentials=_ANN), files)
    assert len(registry.blobs) == 4
    assert len(registry.methods("/token")) == 2 + 2, "one per scope, and one per file with content"


def test_a_token_can_be_anonymous_and_come_from_elsewhere(
    registry: PushRegistry, other: PushRegistry, files: dict[str, Path]
) -> None:
    interfere = bearer_registry(f"http://{other.host}/token", expected=None)
    registry.interfere = other.interfere = interfere
    push(uploader(registry), files)
    assert [asked.authorization for asked in other.asked] == [None, None]


def test_a_refused_token_and_odd_answers_of_a_token_service(registry: PushRegistry, files: dict[str, Path]) -> None:
    challenge = bearer_registry(f"http://{registry.host}/token")
    answers: list[tuple[Said, type[ModelMountError]]] = [
        ((401, {}, b""), RegistryAuthError),
        ((200, {}, b"{}"), RegistryAuthError),
        ((200, {}, b'{"token": 7}'), RegistryAuthError),
        ((200, {}, b"<html>"), RegistryAuthError),
        ((200, {}, b"[]"), RegistryAuthError),
        ((200, {}, b'{"token": "a\\nb"}'), RegistryAuthError),
    ]
    for answer, kind in answers:
        registry.asked.clear()
        registry.interfere = answering("/token", answer, challenge)
        assert type(failure(uploader(registry, credentials=_ANN), files)) is kind
        assert registry.methods("/token") == ["GET"]


def test_a_token_service_elsewhere_never_gets_the_password(
    registry: PushRegistry, other: PushRegistry, files: dict[str, Path]
) -> None:
    stranger = f"http://localhost:{other.port}/token"
    registry.interfere = bearer_registry(stranger)
    error = failure(uploader(registry, credentials=_ANN), files)
    assert isinstance(error, RegistryAuthError)
    assert "is not reached over https; refused" in str(error)
    assert other.asked == []


def test_a_password_does_not_follow_a_redirect_of_the_token_service(
    registry: PushRegistry, other: PushRegistry, files: dict[str, Path]
) -> None:
    challenge = bearer_registry(f"http://{registry.host}/token")
    away = {"Location": f"http://localhost:{other.port}/token?scope=x"}
    registry.interfere = lambda asked: (307, away, b"") if asked.path == "/token" else challenge(asked)
    failure(uploader(registry, credentials=_ANN), files)
    assert {asked.authorization for asked in other.asked} <= {None}


@pytest.mark.parametrize(
    ("base", "realm", "anonymous", "with_password"),
    [
        ("https://r.example.com", "https://r.example.com/token", True, True),
        ("https://r.example.com:5000", "https://r.example.com/token", True, True),
        ("https://r.example.com", "https://auth.example.com/token", True, True),
        ("https://r.example.com", "https://example.com/token", True, True),
        ("https://r.example.com", "https://auth.r.example.com/token", True, True),
        ("https://docker.io", "https://auth.docker.io/token", True, True),
        ("https://registry-1.docker.io", "https://auth.docker.io/token", True, True),
        ("https://registry.gitlab.com", "https://gitlab.com/jwt/auth", True, True),
        ("https://r.example.com", "https://evil.com/token", True, False),
        ("https://r.example.com", "https://evilexample.com/token", True, False),
        ("https://r.example.com", "https://r.example.com.evil.com/", True, False),
        ("https://shop.co.uk", "https://evil.co.uk/token", True, False),
        ("https://example.com", "https://other.com/token", True, False),
        ("https://10.0.0.5", "https://9.0.0.5/token", True, False),
        ("https://r.example.com", "http://r.example.com/token", False, False),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5001/token", True, True),
        ("http://127.0.0.1:5000", "http://169.254.169.254/token", False, False),
        ("http://127.0.0.1:5000", "https://auth.example.com/token", True, False),
        ("https://r.example.com", "https://user:pw@r.example.com/", False, False),
        ("https://r.example.com", "r.example.com/token", False, False),
        ("https://r.example.com", "https://[::::]/token", False, False),
        ("https://r.example.com", "file:///etc/passwd", False, False),
        ("https://r.example.com", "", False, False),
    ],
)
def test_which_token_service_gets_what(base: str, realm: str, anonymous: bool, with_password: bool) -> None:
    for password, allowed in ((False, anonymous), (True, with_password)):
        if allowed:
            check_realm(base, realm, with_password=password)
        else:
            with pytest.raises(RegistryAuthError) as caught:
                check_realm(base, realm, with_password=password)
            assert not re.search(r"pw", str(caught.value))


# --- a real registry --------------------------------------------------------------------------------------------------


@pytest.mark.registry
def test_a_real_registry_takes_a_push_twice(docker_registry: RegistryProcess, files: dict[str, Path]) -> None:
    reference = Reference.parse(f"{docker_registry.host}/unit/upload:v1")
    for state in (PushState.UPLOADED, PushState.EXISTS):
        events = push(ModelUploader(reference, plain_http=False), files)
        assert [event.state for event in events if event.state is not PushState.UPLOADING] == [state] * 3


@pytest.mark.registry
def test_a_real_registry_with_passwords(private_registry: RegistryProcess, files: dict[str, Path]) -> None:
    reference = Reference.parse(f"{private_registry.host}/unit/upload:v1")
    for credentials in ((), (Credential(USERNAME, "wrong s3cret"),)):
        error = failure(ModelUploader(reference, plain_http=False, credentials=credentials), files)
        assert isinstance(error, RegistryAuthError)
    push(
        ModelUploader(
            reference, plain_http=False, credentials=(Credential(USERNAME, "stale"), Credential(USERNAME, PASSWORD))
        ),
        files,
    )
