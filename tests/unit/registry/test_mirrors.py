"""Several hosts for one registry: order, capabilities, what they are told, and what happens when one fails."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from fakes.registry import FakeRegistry, Fault

from csi.credentials import Credential, Credentials
from csi.errors import ModelNotFoundError, RegistryError, RegistryUnavailableError
from csi.oci.digest import Digest
from csi.oci.reference import Reference
from csi.registry.address_rules import AddressRules
from csi.registry.client import RegistrySource
from csi.registry.sources import SourceSettings, open_source
from csi.registry.transport import TransportSettings
from csi.registry_hosts import parse_hosts_toml
from csi.stream.ports import ModelSource

CONTENT = os.urandom(3 << 20)
BLOB = Digest.of(CONTENT)
ANN = (Credential("ann", "pa55word"),)

Open = Callable[..., RegistrySource]


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry("ann", "pa55word") as fake:
        fake.add_model("team/model", "v1", {"a": CONTENT})
        yield fake


@pytest.fixture
def mirror() -> Iterator[FakeRegistry]:
    with FakeRegistry() as fake:
        fake.add_model("team/model", "v1", {"a": CONTENT})
        yield fake


@pytest.fixture
def opened(registry: FakeRegistry) -> Iterator[Open]:
    sources: list[RegistrySource] = []

    def open_one(toml: str, credentials: Credentials = ANN, stall_s: float = 5.0) -> RegistrySource:
        settings = SourceSettings(
            rules=AddressRules(),
            credentials=credentials,
            hosts=parse_hosts_toml(toml, registry.host, "/nowhere"),
            transport=TransportSettings(stall_timeout_s=stall_s),
        )
        source = open_source(Reference.parse(f"{registry.host}/team/model:v1"), settings)
        assert isinstance(source, RegistrySource)
        sources.append(source)
        return source

    yield open_one
    for source in sources:
        source.close()
    gc.collect()


def read(source: RegistrySource, offset: int = 0, length: int = 1000) -> bytes:
    buffer = bytearray(length)
    reader = source.open_range(BLOB, len(CONTENT), offset, length)
    try:
        reader.readinto(memoryview(buffer))
    finally:
        reader.close()
    return bytes(buffer)


def entry(host: str, keys: str = "") -> str:
    return f'[host."http://{host}"]\n{keys}\n'


def test_a_mirror_serves_everything_and_learns_who_is_meant_but_no_password(
    registry: FakeRegistry, mirror: FakeRegistry, opened: Open
) -> None:
    headers = f'[host."http://{mirror.host}".header]\nX-Dragonfly-Registry = "https://up.example.com"\n'
    source = opened(entry(mirror.host) + headers)
    assert source.fetch_manifest("v1", None, 5.0).data
    assert read(source) == CONTENT[:1000]
    assert registry.seen == []
    assert {seen.path.partition("?")[2] for seen in mirror.seen} == {f"ns={registry.host.replace(':', '%3A')}"}
    assert {seen.headers["X-Dragonfly-Registry"] for seen in mirror.seen} == {"https://up.example.com"}
    assert {seen.authorization for seen in mirror.seen} == {None}


def test_a_mirror_without_it_is_followed_by_the_registry(
    registry: FakeRegistry, mirror: FakeRegistry, opened: Open
) -> None:
    mirror.blobs.clear()
    mirror.manifests.clear()
    source = opened(entry(mirror.host))
    assert source.fetch_manifest("v1", None, 5.0).data
    assert read(source) == CONTENT[:1000]
    assert {seen.authorization is not None for seen in registry.seen} == {False, True}
    assert all("ns=" not in seen.path for seen in registry.seen)
    assert len(mirror.seen) == 2
    assert read(source, 5) == CONTENT[5:1005]
    assert len(mirror.seen) == 3, "not having something is no reason to leave a host in peace"


def test_what_the_registry_says_is_what_the_reader_hears(
    registry: FakeRegistry, mirror: FakeRegistry, opened: Open
) -> None:
    registry.manifests.clear()
    mirror.faults.append(Fault("manifests", status=503))
    with pytest.raises(ModelNotFoundError) as caught:
        opened(entry(mirror.host)).fetch_manifest("v1", None, 5.0)
    assert mirror.host not in str(caught.value)


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 503])
def test_whatever_a_mirror_refuses_with_the_next_host_is_asked(mirror: FakeRegistry, opened: Open, status: int) -> None:
    mirror.faults.append(Fault("blobs", status=status, times=9))
    assert read(opened(entry(mirror.host))) == CONTENT[:1000]


@pytest.mark.parametrize(
    "fault",
    [
        Fault("blobs", ignore_range=True), Fault("blobs", gzip=True), Fault("blobs", content_range="bytes 0-9/10"),
        Fault("blobs", redirect="http://169.254.169.254/latest"), Fault("blobs", status=302),
        Fault("blobs", stall_s=1.0),
    ],
    ids=["no ranges", "gzip", "wrong range", "forbidden redirect", "empty redirect", "silent"],
)  # fmt: skip
def test_a_mirror_that_answers_wrongly_is_passed_over(mirror: FakeRegistry, opened: Open, fault: Fault) -> None:
    fault.times = 99
    mirror.faults.append(fault)
    source = opened(entry(mirror.host), stall_s=0.3)
    assert read(source, 2 << 20) == CONTENT[2 << 20 : (2 << 20) + 1000]


def test_a_dead_mirror_costs_one_read_its_timeout_not_every(registry: FakeRegistry, opened: Open) -> None:
    with FakeRegistry() as gone:
        host = gone.host
    source = opened(entry(host, 'dial_timeout = "200ms"'))
    for _ in range(3):
        assert read(source) == CONTENT[:1000]
    assert source._endpoints[0].rests()
    assert source._endpoints[0].host.dial_timeout_s == 0.2


def test_a_mirror_that_comes_back_is_asked_again(registry: FakeRegistry, mirror: FakeRegistry, opened: Open) -> None:
    mirror.faults.append(Fault("blobs", status=503))
    source = opened(entry(mirror.host))
    assert read(source) == CONTENT[:1000]
    seen = len(registry.seen)
    deadline = time.monotonic() + 10
    while source._endpoints[0].rests():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert read(source) == CONTENT[:1000]
    assert len(registry.seen) == seen


def test_a_mirror_that_breaks_in_the_middle_is_left_in_peace(
    registry: FakeRegistry, mirror: FakeRegistry, opened: Open
) -> None:
    mirror.faults.append(Fault("blobs", cut_at=10))
    source = opened(entry(mirror.host))
    with pytest.raises(RegistryUnavailableError):
        read(source)
    assert read(source) == CONTENT[:1000]
    assert registry.requests("blobs")


def test_when_all_rest_all_are_asked(registry: FakeRegistry, mirror: FakeRegistry, opened: Open) -> None:
    for fake in (registry, mirror):
        fake.faults.append(Fault("blobs", status=503))
    source = opened(entry(mirror.host), credentials=())
    with pytest.raises(RegistryUnavailableError):
        read(source)
    assert read(source) == CONTENT[:1000]


def test_capabilities_are_honoured(registry: FakeRegistry, mirror: FakeRegistry, opened: Open) -> None:
    source = opened(entry(mirror.host, 'capabilities = ["pull"]'))
    manifest = source.fetch_manifest("v1", None, 5.0)
    assert (mirror.seen, bool(registry.seen)) == ([], True), "a tag is resolved by the registry"
    registry.seen.clear()
    source.fetch_manifest(None, manifest.digest, 5.0)
    assert read(source) == CONTENT[:1000]
    assert (len(mirror.seen), registry.seen) == (2, [])
    mirror.seen.clear()
    source = opened(entry(mirror.host, 'capabilities = ["resolve"]'))
    source.fetch_manifest("v1", None, 5.0)
    assert read(source) == CONTENT[:1000]
    assert len(mirror.seen) == 1
    with pytest.raises(RegistryError, match="capabilities"):
        opened('capabilities = ["push"]').fetch_manifest("v1", None, 5.0)


def test_a_path_of_its_own(registry: FakeRegistry, mirror: FakeRegistry, opened: Open) -> None:
    registry.manifests.clear()
    source = opened(f'[host."http://{mirror.host}/cache/root"]\noverride_path = true')
    with pytest.raises(ModelNotFoundError):
        source.fetch_manifest("v1", None, 5.0)
    assert mirror.seen[0].path.startswith("/cache/root/team/model/manifests/v1?ns=")


def test_credentials_go_to_a_mirror_that_is_to_have_them(registry: FakeRegistry, opened: Open) -> None:
    with FakeRegistry("ann", "pa55word") as private:
        private.add_model("team/model", "v1", {"a": CONTENT})
        assert read(opened(entry(private.host))) == CONTENT[:1000]
        assert {seen.authorization for seen in private.seen} == {None}
        registry.seen.clear()
        source = opened(entry(private.host, 'modelmount_credentials = "registry"'), credentials=())
        source.replace_credentials(ANN)
        assert read(source) == CONTENT[:1000]
        assert registry.seen == []


@pytest.mark.allow_logs
def test_a_mirror_that_sent_wrong_bytes_is_not_asked_for_them_again(
    registry: FakeRegistry, mirror: FakeRegistry, opened: Open
) -> None:
    source = opened(f'[host."http://{mirror.host}"]\n')
    assert read(source) == CONTENT[:1000]
    assert not registry.requests("/blobs/")
    buffer = bytearray(1000)
    reader = source.open_range(BLOB, len(CONTENT), 0, 1000)
    reader.readinto(memoryview(buffer))
    reader.reject()
    reader.close()
    before = len(mirror.requests("/"))
    assert read(source) == CONTENT[:1000]
    assert registry.requests("/blobs/"), "the next host has it"
    assert source.fetch_manifest("v1", None, 5.0).data, "and is asked for other things too, for a while"
    assert len(mirror.requests("/")) == before


def test_a_mirror_with_a_wrong_manifest_is_distrusted(
    registry: FakeRegistry, mirror: FakeRegistry, opened: Open
) -> None:
    digest = Digest.of(registry.manifests["/v2/team/model/manifests/v1"][1])
    mirror.faults.append(Fault("/manifests/", flip_at=5, times=99))
    source = opened(f'[host."http://{mirror.host}"]\n')
    for _ in range(2):
        assert source.fetch_manifest(None, digest, 5.0).digest == digest
    assert len(mirror.requests("/manifests/")) == 1
    assert read(source) == CONTENT[:1000]
    assert not mirror.requests("/blobs/")


@pytest.mark.allow_logs
def test_the_only_host_is_asked_again_whatever_it_sent(registry: FakeRegistry, opened: Open) -> None:
    source = opened("")
    for _ in range(2):
        reader = source.open_range(BLOB, len(CONTENT), 0, 10)
        reader.readinto(memoryview(bytearray(10)))
        reader.reject()
        reader.close()
    assert read(source) == CONTENT[:1000]


def test_a_host_gets_so_many_requests_at_once_and_no_more(registry: FakeRegistry) -> None:
    running, most, lock = 0, 0, threading.Lock()

    def slowly(offset: int, length: int) -> bytes:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        with lock:
            running -= 1
        return CONTENT[offset : offset + length]

    del registry.blobs[str(BLOB)]
    registry.blob_readers[str(BLOB)] = (len(CONTENT), slowly)
    settings = SourceSettings(rules=AddressRules(), credentials=ANN, transport=TransportSettings(most_at_once=3))
    source = open_source(Reference.parse(f"{registry.host}/team/model:v1"), settings)
    with ThreadPoolExecutor(12) as pool:
        parts = list(pool.map(lambda number: read_of(source, number * 1000), range(24)))
    source.close()
    assert parts == [CONTENT[at : at + 1000] for at in range(0, 24_000, 1000)]
    assert most == 3


def read_of(source: ModelSource, offset: int) -> bytes:
    buffer = bytearray(1000)
    reader = source.open_range(BLOB, len(CONTENT), offset, 1000)
    try:
        reader.readinto(memoryview(buffer))
    finally:
        reader.close()
    return bytes(buffer)
