"""The registry client against a registry that misbehaves on order, and against a real one."""

from __future__ import annotations

import gc
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path

import pytest
from fakes.registry import FakeRegistry, Fault
from hypothesis import given
from hypothesis import strategies as st
from registry_process import PASSWORD, USERNAME, RegistryProcess
from support.node_process import COMMAND

from csi.credentials import Credential, Credentials
from csi.errors import (
    DigestMismatchError,
    ModelMountError,
    ModelNotFoundError,
    PolicyDeniedError,
    RegistryAuthError,
    RegistryError,
    RegistryUnavailableError,
    SizeMismatchError,
)
from csi.oci.digest import Digest
from csi.oci.reference import Reference
from csi.registry.address_rules import AddressRules, redact_url
from csi.registry.client import RegistrySource
from csi.registry.headers import parse_challenges, parse_content_range, parse_retry_after
from csi.registry.sources import SourceSettings, open_source
from csi.registry.transport import TransportSettings

CONTENT = os.urandom(3 << 20)


_opened: list[RegistrySource] = []


@pytest.fixture(autouse=True)
def close_sources() -> Iterator[None]:
    """A socket that is left open is a failure of the test it belongs to."""
    yield
    while _opened:
        _opened.pop().close()
    gc.collect()


def source(host: str, credentials: Credentials = (), stall_s: float = 5.0) -> RegistrySource:
    settings = SourceSettings(
        rules=AddressRules(),
        credentials=credentials,
        transport=TransportSettings(stall_timeout_s=stall_s, connect_timeout_s=2.0),
    )
    opened = open_source(Reference.parse(f"{host}/team/model:v1"), settings)
    assert isinstance(opened, RegistrySource)
    _opened.append(opened)
    return opened


def read(registry: RegistrySource, digest: str, size: int, offset: int, length: int) -> bytes:
    reader = registry.open_range(Digest.parse(digest), size, offset, length)
    try:
        buffer = bytearray(length)
        view = memoryview(buffer)
        while view:
            piece = view[:100_000]
            reader.readinto(piece)
            view = view[len(piece) :]
        return bytes(buffer)
    finally:
        reader.close()


@pytest.fixture
def blob(fake_registry: FakeRegistry) -> str:
    return fake_registry.add_blob(CONTENT)


def test_a_range_is_asked_for_and_read_over_one_connection(fake_registry: FakeRegistry, blob: str) -> None:
    registry = source(fake_registry.host)
    assert read(registry, blob, len(CONTENT), 5, 100) == CONTENT[5:105]
    assert read(registry, blob, len(CONTENT), len(CONTENT) - 7, 7) == CONTENT[-7:]
    assert [seen.range for seen in fake_registry.seen] == [
        "bytes=5-104",
        f"bytes={len(CONTENT) - 7}-{len(CONTENT) - 1}",
    ]
    assert all(seen.authorization is None for seen in fake_registry.seen)


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        (Fault("blobs", status=404), ModelNotFoundError, "not found"),
        (Fault("blobs", status=401), RegistryAuthError, "nodePublishSecretRef"),
        (Fault("blobs", status=403), RegistryAuthError, "403"),
        (Fault("blobs", status=429, headers={"Retry-After": "7"}), RegistryUnavailableError, "429"),
        (Fault("blobs", status=503), RegistryUnavailableError, "503"),
        (Fault("blobs", status=416), RegistryError, "416"),
        (Fault("blobs", cut_at=50), RegistryUnavailableError, "before the range did"),
        (Fault("blobs", stall_s=1.5), RegistryUnavailableError, "sent nothing"),
        (Fault("blobs", gzip=True), RegistryError, "gzip"),
        (Fault("blobs", content_range="bytes 0-99/77"), RegistryError, "Content-Range"),
        (Fault("blobs", content_range=f"bytes 0-99/{len(CONTENT)}"), RegistryError, "was sent 0-99"),
        (Fault("blobs", content_range="bytes 2000000-2000099/99999999"), SizeMismatchError, "99999999"),
        (Fault("blobs", content_range="nonsense"), RegistryError, "nonsense"),
        (Fault("blobs", ignore_range=True), RegistryError, "ignores Range"),
    ],
    ids=lambda value: value.match + str(value.status or "") if isinstance(value, Fault) else None,
)
def test_every_fault_has_its_error(
    fake_registry: FakeRegistry, blob: str, fault: Fault, error: type[ModelMountError], words: str
) -> None:
    fake_registry.faults.append(fault)
    with pytest.raises(error) as caught:
        read(source(fake_registry.host, stall_s=0.5), blob, len(CONTENT), 2_000_000, 100)
    assert type(caught.value) is error
    assert words in str(caught.value)
    assert fake_registry.host in str(caught.value)
    assert read(source(fake_registry.host), blob, len(CONTENT), 2_000_000, 100) == CONTENT[2_000_000:][:100]


def test_what_a_429_asks_for_is_told_to_the_caller(fake_registry: FakeRegistry, blob: str) -> None:
    fake_registry.faults.append(Fault("blobs", status=429, headers={"Retry-After": "7"}))
    with pytest.raises(RegistryUnavailableError) as caught:
        read(source(fake_registry.host), blob, len(CONTENT), 0, 1)
    assert caught.value.fields["retry_after_s"] == 7


@pytest.mark.parametrize(
    "fault",
    [
        Fault("blobs", partial_as_200=True),
        Fault("blobs", ignore_range=True),
        Fault("blobs", content_range=f"100-199/{len(CONTENT)}"),
        Fault("blobs", content_range="bytes 100-199/*"),
    ],
    ids=["partial as 200", "whole as 200", "no unit", "unknown total"],
)
def test_odd_but_right_answers_are_taken(fake_registry: FakeRegistry, blob: str, fault: Fault) -> None:
    fake_registry.faults.append(fault)
    assert read(source(fake_registry.host), blob, len(CONTENT), 100, 100) == CONTENT[100:200]


def test_a_blob_of_another_size_is_a_size_mismatch(fake_registry: FakeRegistry, blob: str) -> None:
    with pytest.raises(SizeMismatchError) as caught:
        read(source(fake_registry.host), blob, len(CONTENT) + 1, 0, 10)
    assert caught.value.fields["actual"] == len(CONTENT)


def test_an_idle_connection_the_server_closed_is_replaced_unseen(fake_registry: FakeRegistry, blob: str) -> None:
    registry = source(fake_registry.host)
    assert read(registry, blob, len(CONTENT), 0, 10) == CONTENT[:10]
    for idle in registry._endpoints[0]._transport._idle.values():
        for connection in idle:
            connection.sock._sock.shutdown(2)  # type: ignore[union-attr]
    assert read(registry, blob, len(CONTENT), 0, 10) == CONTENT[:10]


def test_redirects_are_followed_once_per_blob_without_the_password(blob: str) -> None:
    with FakeRegistry() as storage, FakeRegistry("ann", "pa55word") as private:
        storage.add_blob(CONTENT)
        signed = f"http://{storage.host}/signed/blobs/{blob}?signature=secret"
        private.faults.append(Fault("blobs", redirect=signed, times=9))
        registry = source(private.host, (Credential("ann", "pa55word"),))
        for offset in (0, 10, 20):
            assert read(registry, blob, len(CONTENT), offset, 10) == CONTENT[offset : offset + 10]
        asked = [seen.authorization is not None for seen in private.requests("blobs")]
        assert asked == [False, True], "a password once it is wanted; the address is remembered"
        assert {seen.authorization for seen in storage.seen} == {None}
        storage.faults.append(Fault("signed", status=403))  # it expires
        assert read(registry, blob, len(CONTENT), 30, 10) == CONTENT[30:40]
        assert len(private.requests("blobs")) == 3, "and asked for again once"
        storage.faults.append(Fault("signed", status=500))
        with pytest.raises(RegistryUnavailableError) as caught:
            read(registry, blob, len(CONTENT), 0, 1)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "location",
    ["http://203.0.113.7/x", "ftp://a.b/x", "http://user:pw@127.0.0.1/x", "//", "http://169.254.169.254/latest"],
)
def test_redirects_to_where_nobody_should_go_are_refused(fake_registry: FakeRegistry, blob: str, location: str) -> None:
    fake_registry.faults.append(Fault("blobs", redirect=location, times=9))
    with pytest.raises(RegistryError) as caught:
        read(source(fake_registry.host), blob, len(CONTENT), 0, 1)
    assert "pw" not in str(caught.value)


def test_a_redirect_loop_ends(fake_registry: FakeRegistry, blob: str) -> None:
    fake_registry.faults.append(Fault("blobs", redirect=f"/v2/team/model/blobs/{blob}", times=100))
    with pytest.raises(RegistryError, match="redirects"):
        read(source(fake_registry.host), blob, len(CONTENT), 0, 1)


def test_manifests_are_hashed(fake_registry: FakeRegistry) -> None:
    digest = Digest.parse(fake_registry.add_model("team/model", "v1", {"a": b"b"}))
    registry = source(fake_registry.host)
    by_tag = registry.fetch_manifest("v1", None, 5.0)
    assert by_tag == registry.fetch_manifest(None, digest, 5.0)
    assert by_tag.digest == digest == Digest.of(by_tag.data)
    fake_registry.faults.append(Fault("manifests", flip_at=3))
    with pytest.raises(DigestMismatchError) as caught:
        registry.fetch_manifest(None, digest, 5.0)
    assert caught.value.fields["expected"] == str(digest)
    fake_registry.digest_header = "sha256:" + "0" * 64
    with pytest.raises(DigestMismatchError, match="calls this manifest"):
        registry.fetch_manifest("v1", None, 5.0)


def test_a_huge_manifest_is_not_read_to_its_end(fake_registry: FakeRegistry) -> None:
    fake_registry.add_manifest("team/model", "huge", b" " * (9 << 20))
    with pytest.raises(SizeMismatchError):
        source(fake_registry.host).fetch_manifest("huge", None, 10.0)


def test_a_manifest_that_trickles_ends_at_its_deadline(fake_registry: FakeRegistry) -> None:
    fake_registry.add_model("team/model", "v1", {"a": b"b"})
    fake_registry.faults.append(Fault("manifests", stall_s=3))
    started = time.monotonic()
    with pytest.raises(RegistryUnavailableError):
        source(fake_registry.host).fetch_manifest("v1", None, 0.5)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("host", ["127.0.0.1:1", "no-such-host.invalid"])
def test_an_unreachable_registry_is_unavailable(host: str) -> None:
    with pytest.raises(RegistryUnavailableError, match=r"registry .*: (cannot connect|its name does not resolve)"):
        source(host).fetch_manifest("v1", None, 5.0)


@pytest.mark.parametrize(
    "address",
    ["169.254.169.254", "fe80::1%eth0", "224.0.0.1", "0.0.0.0", "127.0.0.1", "::ffff:127.0.0.1", "fd00:ec2::254"],
)
def test_addresses_nobody_should_reach_are_refused(address: str) -> None:
    with pytest.raises(RegistryError, match="does not speak to"):
        AddressRules().check_address("registry.example.com", address)


def test_private_and_listed_addresses_are_fine() -> None:
    AddressRules().check_address("registry.example.com", "10.0.0.7")
    AddressRules(frozenset({"registry.internal:5000"})).check_address("registry.internal:5000", "127.0.0.1")


@pytest.mark.parametrize(
    ("authority", "scheme"),
    [
        ("localhost:5000", "http"), ("127.3.2.1", "http"), ("[::1]:5000", "http"), ("a.localhost", "http"),
        ("listed:80", "http"), ("listed", "https"), ("any-port", "http"), ("any-port:7", "http"),
        ("127.0.0.1.evil.com", "https"), ("registry.example.com", "https"),
    ],
)  # fmt: skip
def test_plain_http_is_for_loopback_and_listed_hosts(authority: str, scheme: str) -> None:
    assert AddressRules(frozenset({"listed:80", "any-port"})).scheme_for(authority) == scheme


def test_credentials_never_show() -> None:
    assert "secret" not in repr(Credential("ann", "secret"))
    assert redact_url("https://u:p@h.io:1/x?sig=1#f") == "https://h.io:1/x"


@given(st.text(max_size=200))
def test_parsers_of_headers_never_raise(text: str) -> None:
    parse_challenges(text)
    parse_content_range(text)
    wait = parse_retry_after(text, time.time())
    assert wait is None or wait >= 0
    redact_url(text)


@given(st.integers(0, 10**18), st.integers(0, 10**6), st.integers(0, 10**6), st.booleans())
def test_content_ranges_round_trip(first: int, length: int, rest: int, unit: bool) -> None:
    last, total = first + length, first + length + 1 + rest
    assert parse_content_range(f"{'bytes ' if unit else ''}{first}-{last}/{total}") == (first, last, total)
    assert parse_content_range(f"bytes {last + 1}-{first}/{total}") is None


def test_retry_after_takes_a_date() -> None:
    assert parse_retry_after(formatdate(1_000_030, usegmt=True), 1_000_000) == 30
    assert parse_retry_after(formatdate(999_000, usegmt=True), 1_000_000) == 0


def test_challenges_of_two_schemes() -> None:
    header = 'Bearer realm="https://a/b?c=d",service="x, y",scope="repository:a:pull", Basic realm=plain'
    bearer, basic = parse_challenges(header)
    assert (bearer.scheme, bearer.parameters["service"]) == ("bearer", "x, y")
    assert (basic.scheme, basic.parameters) == ("basic", {"realm": "plain"})


@pytest.mark.registry
def test_a_real_registry_serves_what_was_pushed(
    docker_registry: RegistryProcess, private_registry: RegistryProcess, tmp_path: Path
) -> None:
    (tmp_path / "model.bin").write_bytes(CONTENT)
    blob = str(Digest.of(CONTENT))
    logins: list[tuple[RegistryProcess, Callable[[], Credentials], list[str]]] = [
        (docker_registry, lambda: (), []),
        (private_registry, lambda: (Credential(USERNAME, PASSWORD),), ["--username", USERNAME, "--password-stdin"]),
    ]
    for process, credentials, flags in logins:
        command = [*COMMAND, "push", str(tmp_path), f"{process.host}/team/model:v1", *flags]
        subprocess.run(command, input=PASSWORD, text=True, check=True, capture_output=True)
        registry = source(process.host, credentials())
        manifest = registry.fetch_manifest("v1", None, 5.0)
        assert registry.fetch_manifest(None, manifest.digest, 5.0).data == manifest.data
        assert read(registry, blob, len(CONTENT), 1_000_000, 500_000) == CONTENT[1_000_000:1_500_000]
        with pytest.raises(ModelNotFoundError):
            registry.fetch_manifest("v9", None, 5.0)
    with pytest.raises(RegistryAuthError):
        source(private_registry.host).fetch_manifest("v1", None, 5.0)


@pytest.mark.parametrize(
    "authority", ["registry.example.com", "registry.example.com:8443", "a.models.example.org:5000"]
)
def test_listed_registries_may_be_named_and_be_private(authority: str) -> None:
    rules = AddressRules(allowed=frozenset({"registry.example.com", "*.models.example.org", "other.example.com:5000"}))
    rules.check_registry(authority)
    rules.check_address(authority, "10.1.2.3")


@pytest.mark.parametrize(
    "authority",
    [
        "models.example.org",
        "evil-registry.example.com",
        "other.example.com",
        "10.0.0.1",
        "[fd00::1]:5000",
        "localhost:5000",
    ],
)
def test_no_other_registry_may_be_named(authority: str) -> None:
    rules = AddressRules(allowed=frozenset({"registry.example.com", "*.models.example.org", "other.example.com:5000"}))
    with pytest.raises(PolicyDeniedError, match="--allow-registry"):
        rules.check_registry(authority)


def test_where_a_listed_registry_leads_is_public_and_at_the_usual_port() -> None:
    rules = AddressRules(frozenset({"plain.internal"}), frozenset({"registry.example.com", "blobs.internal:9000"}))
    rules.check_address("cdn.example.net", "151.101.1.1")
    rules.check_address("cdn.example.net:443", "2606:4700::1111")
    rules.check_address("blobs.internal:9000", "10.1.2.3")
    rules.check_address("plain.internal", "10.1.2.3")
    for authority, address in [
        ("cdn.example.net", "10.1.2.3"),
        ("cdn.example.net", "100.64.0.1"),
        ("cdn.example.net", "fd00::7"),
        ("cdn.example.net:8443", "151.101.1.1"),
        ("blobs.internal:9001", "10.1.2.3"),
        ("registry.example.com", "169.254.169.254"),
    ]:
        with pytest.raises(RegistryError):
            rules.check_address(authority, address)


def test_a_remembered_address_that_is_gone_is_asked_for_again_and_the_error_names_the_model(blob: str) -> None:
    with FakeRegistry() as registry:
        registry.add_blob(CONTENT)
        opened = source(registry.host)
        gone = Fault("blobs", redirect="http://127.0.0.1:1/gone", times=1)
        registry.faults.append(gone)
        for _ in range(2):  # where it led, and what is remembered of it
            with pytest.raises(
                RegistryUnavailableError, match=f"{registry.host}/team/model blob .*127.0.0.1:1: cannot"
            ):
                read(opened, blob, len(CONTENT), 0, 10)
        assert read(opened, blob, len(CONTENT), 0, 10) == CONTENT[:10]


def test_a_token_service_that_is_not_wanted_any_more_is_not_asked_for_ever(blob: str) -> None:
    with FakeRegistry() as registry:
        registry.add_blob(CONTENT)
        opened = source(registry.host)
        challenge = {"WWW-Authenticate": f'Bearer realm="http://{registry.host}/gone",service="s"'}
        registry.faults.append(Fault("blobs", status=401, headers=challenge))
        for _ in range(2):
            with pytest.raises(RegistryAuthError, match="/gone answered 404"):
                read(opened, blob, len(CONTENT), 0, 10)
        assert read(opened, blob, len(CONTENT), 0, 10) == CONTENT[:10]
