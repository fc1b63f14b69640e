"""Token authentication against a registry that asks for it."""

from __future__ import annotations

import base64
import gc
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from urllib.parse import parse_qsl

import pytest
from fakes.registry import FakeRegistry, Fault

from csi.credentials import Credential, Credentials
from csi.errors import ModelMountError, RegistryAuthError, RegistryUnavailableError
from csi.oci.digest import Digest
from csi.oci.reference import Reference
from csi.registry.address_rules import AddressRules
from csi.registry.client import RegistrySource
from csi.registry.sources import SourceSettings, open_source
from csi.registry_hosts import own_host

CONTENT = os.urandom(1 << 16)
ANN = (Credential("ann", "pa55word"),)

Open = Callable[..., RegistrySource]


@pytest.fixture
def opened() -> Iterator[Open]:
    sources: list[RegistrySource] = []

    def open_one(registry: FakeRegistry, credentials: Credentials = ()) -> RegistrySource:
        reference = Reference.parse(f"{registry.host}/team/model:v1")
        source = open_source(reference, SourceSettings(rules=AddressRules(), credentials=credentials))
        assert isinstance(source, RegistrySource)
        sources.append(source)
        return source

    yield open_one
    for source in sources:
        source.close()
    gc.collect()


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry("ann", "pa55word", tokens=True) as fake:
        fake.add_model("team/model", "v1", {"a": CONTENT})
        yield fake


def read(source: RegistrySource) -> bytes:
    buffer = bytearray(len(CONTENT))
    reader = source.open_range(Digest.of(CONTENT), len(CONTENT), 0, len(CONTENT))
    try:
        reader.readinto(memoryview(buffer))
    finally:
        reader.close()
    return bytes(buffer)


def test_one_token_serves_many_requests(registry: FakeRegistry, opened: Open) -> None:
    source = opened(registry, ANN)
    source.fetch_manifest("v1", None, 5.0)
    for _ in range(5):
        assert read(source) == CONTENT
    asked = registry.requests("/token")
    assert len(asked) == 1
    assert "scope=repository%3Ateam%2Fmodel%3Apull" in asked[0].path
    assert "service=fake+registry" in asked[0].path


def test_anybody_gets_a_token_of_a_public_registry(opened: Open) -> None:
    with FakeRegistry(tokens=True) as registry:
        registry.add_model("team/model", "v1", {"a": CONTENT})
        source = opened(registry)
        source.fetch_manifest("v1", None, 5.0)
        assert read(source) == CONTENT
        assert {seen.authorization for seen in registry.requests("/token")} == {None}
        source.close()


def test_many_threads_wait_for_one_token(registry: FakeRegistry, opened: Open) -> None:
    source = opened(registry, ANN)
    registry.faults.append(Fault("/token", stall_s=0.3))
    results: list[bytes] = []
    threads = [threading.Thread(target=lambda: results.append(read(source))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [CONTENT] * 8
    assert len(registry.requests("/token")) == 1


def test_a_token_is_renewed_before_it_ends_and_when_it_is_refused(registry: FakeRegistry, opened: Open) -> None:
    registry.token_lifetime_s = 0.05
    source = opened(registry, ANN)
    assert read(source) == CONTENT
    threading.Event().wait(0.06)
    assert read(source) == CONTENT
    assert len(registry.requests("/token")) == 2
    registry.token_lifetime_s = 300
    threading.Event().wait(0.06)
    assert read(source) == CONTENT
    registry.valid_tokens.clear()  # taken back before its time
    assert read(source) == CONTENT
    assert len(registry.requests("/token")) == 4


@pytest.mark.parametrize("credentials", [(), (Credential("ann", "wrong"),)])
def test_wrong_credentials_are_said_and_not_tried_in_a_loop(
    registry: FakeRegistry, opened: Open, credentials: Credentials
) -> None:
    with pytest.raises(RegistryAuthError) as caught:
        opened(registry, credentials).fetch_manifest("v1", None, 5.0)
    assert caught.value.fields["status"] == 401
    assert "wrong" not in str(caught.value).replace("are wrong", "")
    assert len(registry.requests("/token")) == 1


def test_new_credentials_are_used_at_once(registry: FakeRegistry, opened: Open) -> None:
    source = opened(registry, (Credential("ann", "old"),))
    with pytest.raises(RegistryAuthError):
        source.fetch_manifest("v1", None, 5.0)
    source.replace_credentials(ANN)
    assert source.fetch_manifest("v1", None, 5.0).digest


def test_a_token_service_that_is_down_is_unavailable(registry: FakeRegistry, opened: Open) -> None:
    registry.faults.append(Fault("/token", status=503))
    with pytest.raises(RegistryUnavailableError):
        opened(registry, ANN).fetch_manifest("v1", None, 5.0)


@pytest.mark.parametrize(
    "body", [b"<html>", b"[]", b"{}", b'{"token": 7}', b'{"token": "a\\nb"}', b'{"token": ""}', b"[" * 5000]
)
def test_an_answer_without_a_token_is_refused(registry: FakeRegistry, opened: Open, body: bytes) -> None:
    registry.faults.append(Fault("/token", status=200, body=body))
    with pytest.raises(RegistryAuthError):
        opened(registry, ANN).fetch_manifest("v1", None, 5.0)


@pytest.mark.parametrize(
    "realm", ["http://203.0.113.9/token", "https://evil.example/token", "ftp://x/", "", "http://[::"]
)
def test_a_password_never_goes_to_a_strangers_realm(registry: FakeRegistry, opened: Open, realm: str) -> None:
    registry.realm = realm
    with pytest.raises(RegistryAuthError) as caught:
        opened(registry, ANN).fetch_manifest("v1", None, 5.0)
    assert "pa55word" not in str(caught.value)


def test_no_redirect_takes_the_password_along(registry: FakeRegistry, opened: Open) -> None:
    with FakeRegistry() as stranger:
        registry.faults.append(Fault("/token", redirect=f"http://{stranger.host}/token"))
        with pytest.raises(RegistryAuthError):
            opened(registry, ANN).fetch_manifest("v1", None, 5.0)
        assert stranger.seen == []


def test_docker_hub_has_its_api_elsewhere() -> None:
    assert own_host("docker.io").authority == "registry-1.docker.io"
    assert own_host("quay.io").authority == "quay.io"


def test_an_identity_token_is_exchanged_by_post(registry: FakeRegistry, opened: Open) -> None:
    registry.identity_tokens.add("refresh-canary")
    source = opened(registry, (Credential(identity_token="refresh-canary"),))
    source.fetch_manifest("v1", None, 5.0)
    assert read(source) == CONTENT
    (asked,) = registry.requests("/token")
    assert asked.path == "/token", "the secret is in the body alone"
    form = dict(parse_qsl(asked.form))
    assert form == {
        "grant_type": "refresh_token",
        "refresh_token": "refresh-canary",
        "service": "fake registry",
        "scope": "repository:team/model:pull",
        "client_id": "modelmount",
    }


GRANT = "urn:ietf:params:oauth:grant-type:token-exchange"


def sts_answer(password: str, lifetime_s: float = 300) -> Fault:
    body = json.dumps({"access_token": password, "expires_in": lifetime_s, "token_type": "Bearer"}).encode()
    return Fault(match="/v1/sts", status=200, body=body, times=1_000)


@pytest.mark.parametrize("tokens", [False, True])
def test_a_subject_token_is_exchanged_once_for_the_password_the_registry_wants(opened: Open, tokens: bool) -> None:
    with FakeRegistry("ann", "pa55word", tokens=tokens) as registry, FakeRegistry() as sts:
        registry.add_model("team/model", "v1", {"a": CONTENT})
        sts.faults.append(sts_answer("pa55word"))
        url = f"http://{sts.host}/v1/sts?audience=//iam/pool&scope=pull"
        source = opened(registry, (Credential("ann", subject_token="jwt", exchange_url=url),))
        source.fetch_manifest("v1", None, 5.0)
        assert read(source) == CONTENT
        (asked,) = sts.requests("/v1/sts")
        form = dict(parse_qsl(asked.form))
        assert asked.path == "/v1/sts"
        assert (form["grant_type"], form["subject_token"], form["audience"]) == (GRANT, "jwt", "//iam/pool")
        assert form["subject_token_type"].endswith(":jwt")
        assert asked.authorization is None
        assert not any("jwt" in f"{seen.form}{seen.authorization}" for seen in registry.requests("/")), "it stays there"


def test_a_password_that_was_exchanged_is_renewed_before_it_ends(opened: Open) -> None:
    with FakeRegistry("ann", "pa55word") as registry, FakeRegistry() as sts:
        registry.add_model("team/model", "v1", {"a": CONTENT})
        sts.faults.append(sts_answer("pa55word", 0.05))
        credential = Credential("ann", subject_token="jwt", exchange_url=f"http://{sts.host}/v1/sts")
        source = opened(registry, (credential,))
        for _ in range(3):
            source.fetch_manifest("v1", None, 5.0)
            time.sleep(0.06)
        assert len(sts.requests("/v1/sts")) >= 3


@pytest.mark.parametrize(("status", "error"), [(400, RegistryAuthError), (503, RegistryUnavailableError)])
def test_a_token_service_that_exchanges_nothing_is_said_without_the_token(
    registry: FakeRegistry, opened: Open, status: int, error: type[ModelMountError]
) -> None:
    registry.faults.append(Fault(match="/v1/sts", status=status, times=1_000))
    url = f"http://{registry.host}/v1/sts?audience=x"
    source = opened(registry, (Credential("ann", subject_token="canary", exchange_url=url),))
    with pytest.raises(error) as caught:
        source.fetch_manifest("v1", None, 5.0)
    assert "canary" not in str(caught.value)
    assert "/v1/sts" in str(caught.value)


def test_a_token_service_that_knows_only_oauth_gets_the_password_there(registry: FakeRegistry, opened: Open) -> None:
    registry.only_oauth = True
    assert read(opened(registry, ANN)) == CONTENT
    assert [bool(asked.form) for asked in registry.requests("/token")] == [False, True]
    with pytest.raises(RegistryAuthError) as caught:
        read(opened(registry, (Credential("ann", "canary"),)))
    assert "canary" not in str(caught.value)


def test_a_registry_token_is_sent_as_it_is(registry: FakeRegistry, opened: Open) -> None:
    registry.valid_tokens.add("given")
    assert read(opened(registry, (Credential(registry_token="given"),))) == CONTENT
    assert registry.requests("/token") == []
    with pytest.raises(RegistryAuthError):
        read(opened(registry, (Credential(registry_token="over"),)))


@pytest.mark.parametrize("tokens", [True, False])
def test_candidates_are_tried_in_turn_and_the_one_that_works_is_kept(opened: Open, tokens: bool) -> None:
    with FakeRegistry("ann", "pa55word", tokens=tokens) as registry:
        registry.add_model("team/model", "v1", {"a": CONTENT})
        others = (Credential("ann", "old"), Credential(identity_token="over"), Credential(registry_token="over"))
        source = opened(registry, (*others, *ANN))
        source.fetch_manifest("v1", None, 5.0)
        before = len(registry.seen)
        assert read(source) == CONTENT
        assert len(registry.seen) == before + 1
        with pytest.raises(RegistryAuthError):
            opened(registry, others).fetch_manifest("v1", None, 5.0)


@pytest.mark.parametrize("status", [401, 403])
def test_a_repository_one_credential_may_not_read_is_asked_for_with_the_next(
    registry: FakeRegistry, opened: Open, status: int
) -> None:
    """The token service gives both a token; the registry refuses the first one's."""
    registry.users.add("Basic " + base64.b64encode(b"bob:x").decode())
    registry.faults.append(Fault("/blobs/", after=1, status=status))
    assert read(opened(registry, (Credential("bob", "x"), *ANN))) == CONTENT
    asked = [seen.authorization for seen in registry.requests("/token")]
    assert len(set(asked)) == 2


def test_a_token_is_renewed_ahead_while_others_use_the_old_one(
    registry: FakeRegistry, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.token_lifetime_s = 100.0
    source = opened(registry, ANN)
    assert read(source) == CONTENT
    later = SimpleNamespace(monotonic=lambda: time.monotonic() + 85)  # past four fifths
    monkeypatch.setattr("csi.registry.auth.time", later)
    registry.faults.append(Fault("/token", stall_s=0.5, times=1))
    renewing = threading.Thread(target=read, args=(source,))
    renewing.start()
    while len(registry.requests("/token")) < 2:
        threading.Event().wait(0.005)
    registry.token_lifetime_s = 300
    before = time.monotonic()
    assert read(source) == CONTENT
    waited_s = time.monotonic() - before
    renewing.join()
    assert len(registry.requests("/token")) == 2
    assert registry.requests("/blobs/")[-2].authorization == registry.requests("/blobs/")[1].authorization, waited_s


def test_a_service_that_is_down_does_not_break_a_token_that_is_still_good(registry: FakeRegistry, opened: Open) -> None:
    registry.token_lifetime_s = 2.0
    source = opened(registry, ANN)
    assert read(source) == CONTENT
    threading.Event().wait(1.65)
    registry.faults.append(Fault("/token", status=503))
    assert read(source) == CONTENT


def test_replacing_credentials_never_waits_for_a_token_service(registry: FakeRegistry, opened: Open) -> None:
    source = opened(registry, (Credential("ann", "old"),))
    registry.faults.append(Fault("/token", stall_s=1.0))
    outcomes: list[ModelMountError] = []

    def fail() -> None:
        try:
            read(source)
        except ModelMountError as exc:
            outcomes.append(exc)

    reading = threading.Thread(target=fail)
    reading.start()
    while not registry.requests("/token"):
        threading.Event().wait(0.005)
    source.replace_credentials(ANN)
    assert reading.is_alive(), "it came back while the service was still thinking"
    assert read(source) == CONTENT
    reading.join()
    assert all(isinstance(outcome, RegistryAuthError) for outcome in outcomes)


def test_a_service_that_is_busy_says_when_to_come_back(registry: FakeRegistry, opened: Open) -> None:
    registry.faults.append(Fault("/token", status=429, headers={"Retry-After": "7"}))
    with pytest.raises(RegistryUnavailableError) as caught:
        opened(registry, ANN).fetch_manifest("v1", None, 5.0)
    assert caught.value.fields == {"status": 429, "retry_after_s": 7}
