"""One suite over real registries: Debian's docker-registry, distribution v3, one with the referrers API, and nginx before
one (TLS, addresses that expire, a rate limit).
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from formats.artifacts import EMPTY, Layer, artifact
from formats.places import push
from registry_process import RegistryProcess
from support.registry_servers import (
    ROOT,
    Server,
    SigningFront,
    TokenIssuer,
    distribution_v3,
    free_port,
    nginx,
    referrers_registry,
    start_nginx,
)

from csi.cli.main import main
from csi.credentials import Credential, Credentials
from csi.errors import ModelNotFoundError, RegistryAuthError, RegistryError, RegistryUnavailableError, SizeMismatchError
from csi.oci.digest import Digest
from csi.oci.modelpack import ModelDescription, SourceFile, pack
from csi.oci.reference import Reference
from csi.registry.address_rules import AddressRules
from csi.registry.client import RegistrySource
from csi.registry.sources import SourceSettings, open_source
from csi.registry.transport import TransportSettings
from csi.registry.upload import ModelUploader
from csi.registry_hosts import RegistryHost

pytestmark = pytest.mark.registry

TOOLS = ROOT / ".tools"
CONTENT = os.urandom((5 << 20) + 123)
BLOB = Digest.of(CONTENT)
Open = Callable[[str], RegistrySource]


@dataclass(frozen=True)
class Place:
    """Where the model can be had. `hosts` None: the registry itself."""

    host: str
    hosts: tuple[RegistryHost, ...] = ()

    def open(self, stall_s: float = 3.0, credentials: Credentials = ()) -> RegistrySource:
        settings = SourceSettings(
            rules=AddressRules(),
            credentials=credentials,
            hosts=self.hosts,
            transport=TransportSettings(stall_timeout_s=stall_s),
        )
        source = open_source(Reference.parse(f"{self.host}/team/model:v1"), settings)
        assert isinstance(source, RegistrySource)
        return source


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Self-signed, for 127.0.0.1; key and certificate in one file."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(file), "-out", str(file) + ".crt"]
    subprocess.run([*command, *names], check=True, capture_output=True)
    file.write_text(file.read_text() + Path(str(file) + ".crt").read_text())
    return file


@pytest.fixture(scope="module")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    binary, directory, port = distribution_v3(TOOLS), tmp_path_factory.mktemp("v3"), free_port()
    config = (
        f'version: 0.1\nstorage: {{filesystem: {{rootdirectory: {directory}/s}}}}\nhttp: {{addr: "127.0.0.1:{port}"}}\n'
    )
    (directory / "config.yml").write_text(config)
    server = Server([str(binary), "serve", str(directory / "config.yml")], directory, port)
    yield server.host
    server.stop()


@pytest.fixture(scope="module")
def with_referrers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = Server([str(referrers_registry(TOOLS))], tmp_path_factory.mktemp("referrers"), 0)
    yield server.host
    server.stop()


@pytest.fixture(scope="module")
def proxy(
    docker_registry: RegistryProcess, certificate: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    server = start_nginx(nginx(TOOLS), tmp_path_factory.mktemp("nginx"), certificate, docker_registry.host)
    yield server.host
    server.stop()


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """Pushes the model to a registry, once."""
    path, done = tmp_path_factory.mktemp("model") / "model.bin", set()
    path.write_bytes(CONTENT)

    def push(host: str, credentials: Credentials = ()) -> None:
        if host in done:
            return
        model = pack([SourceFile("model.bin", BLOB, len(CONTENT))], ModelDescription(name="m"))
        sink = ModelUploader(Reference.parse(f"{host}/team/model:v1"), plain_http=False, credentials=credentials)
        try:
            sink.put_file(model.layers[0], str(path), lambda progress: None)
            sink.finish(model, "v1")
        finally:
            sink.close()
        done.add(host)

    return push


def through(address: str, certificate: Path, path: str = "/v2", scheme: str = "https") -> tuple[RegistryHost, ...]:
    return (RegistryHost(scheme=scheme, authority=address, path=path, ca=(certificate.read_text(),)),)


@pytest.fixture(params=["docker-registry 2.8.2", "distribution 3", "with referrers", "nginx TLS", "signed addresses"])
def place(request: pytest.FixtureRequest, pushed: Callable[..., None]) -> Iterator[Place]:
    """A model somewhere, and how to get at it."""
    front = None
    match request.param:
        case "distribution 3":
            place = Place(request.getfixturevalue("distribution"))
        case "with referrers":
            place = Place(request.getfixturevalue("with_referrers"))
        case kind:
            place = Place(request.getfixturevalue("docker_registry").host)
            if kind != "docker-registry 2.8.2":
                proxy, certificate = request.getfixturevalue("proxy"), request.getfixturevalue("certificate")
                hosts = through(proxy, certificate)
                if kind == "signed addresses":
                    front = SigningFront(place.host, proxy, life_s=60)
                    hosts = through(front.host, certificate, scheme="http")
                pushed(place.host)
                place = Place(place.host, hosts)
    pushed(place.host)
    yield place
    if front is not None:
        front.stop()
    gc.collect()


def read(source: RegistrySource, offset: int, length: int, size: int = len(CONTENT)) -> bytes:
    buffer = bytearray(length)
    reader = source.open_range(BLOB, size, offset, length)
    try:
        reader.readinto(memoryview(buffer))
    finally:
        reader.close()
    return bytes(buffer)


@pytest.fixture
def source(place: Place) -> Iterator[RegistrySource]:
    opened = place.open()
    yield opened
    opened.close()


def test_manifests_by_tag_and_digest(source: RegistrySource) -> None:
    by_tag = source.fetch_manifest("v1", None, 10.0)
    assert source.fetch_manifest(None, by_tag.digest, 10.0).data == by_tag.data
    assert Digest.of(by_tag.data) == by_tag.digest
    for tag, digest in (("v9", None), (None, Digest.of(b"nothing"))):
        with pytest.raises(ModelNotFoundError):
            source.fetch_manifest(tag, digest, 10.0)


def test_ranges_are_what_was_pushed(source: RegistrySource) -> None:
    size = len(CONTENT)
    for offset, length in (
        (0, 1),
        (0, 4096),
        (1, 4095),
        (4 << 20, 4096),
        (size - 1, 1),
        (size - 4096, 4096),
        (0, size),
    ):
        assert read(source, offset, length) == CONTENT[offset : offset + length]


def test_what_is_not_there_is_an_error_at_once(source: RegistrySource) -> None:
    """docker-registry 2.8.2 announces the whole blob after a 416, and sends less: that is not waited for."""
    started = time.monotonic()
    with pytest.raises((RegistryError, SizeMismatchError)):
        read(source, len(CONTENT) + 10, 10, size=len(CONTENT) + 1000)
    with pytest.raises(SizeMismatchError) as caught:
        read(source, 0, 10, size=len(CONTENT) + 1)
    assert caught.value.fields["actual"] == len(CONTENT)
    with pytest.raises(ModelNotFoundError):
        source.open_range(Digest.of(b"nothing"), 7, 0, 7)
    assert time.monotonic() - started < 60
    assert read(source, 5, 5) == CONTENT[5:10], "and the next request works"


def test_an_address_that_expires_is_asked_for_again(
    docker_registry: RegistryProcess, proxy: str, certificate: Path, pushed: Callable[..., None]
) -> None:
    pushed(docker_registry.host)
    front = SigningFront(docker_registry.host, proxy, life_s=2)
    source = Place(docker_registry.host, through(front.host, certificate, scheme="http")).open()
    try:
        for offset in range(3):
            assert read(source, offset, 10) == CONTENT[offset : offset + 10]
        assert front.signed == 1, "one address for many ranges"
        time.sleep(3.1)
        assert read(source, 7, 10) == CONTENT[7:17]
        assert front.signed == 2
    finally:
        source.close()
        front.stop()


def test_a_rate_limit_says_when_to_come_back(
    docker_registry: RegistryProcess, proxy: str, certificate: Path, pushed: Callable[..., None]
) -> None:
    pushed(docker_registry.host)
    source = Place(docker_registry.host, through(proxy, certificate, "/limited/v2")).open()
    try:
        assert read(source, 0, 10) == CONTENT[:10]

        def read_on() -> None:
            for _ in range(20):
                read(source, 0, 10)

        with pytest.raises(RegistryUnavailableError) as caught:
            read_on()
        assert caught.value.fields == {"status": 429, "retry_after_s": 1}
        time.sleep(1.1)
        assert read(source, 0, 10) == CONTENT[:10]
    finally:
        source.close()


@pytest.fixture(params=["docker-registry 2.8.2", "distribution 3"])
def guarded(request: pytest.FixtureRequest, certificate: Path, tmp_path: Path) -> Iterator[tuple[str, TokenIssuer]]:
    """A real registry that takes tokens of our issuer alone."""
    binary = distribution_v3(TOOLS) if request.param == "distribution 3" else request.getfixturevalue("registry_binary")
    issuer, port = TokenIssuer(certificate, "test registry"), free_port()
    bundle = tmp_path / "bundle.pem"
    bundle.write_text(Path(str(certificate) + ".crt").read_text())
    auth = f'auth: {{token: {{realm: "{issuer.realm}", service: "test registry", issuer: test, rootcertbundle: {bundle}}}}}'
    config = f'version: 0.1\nstorage: {{filesystem: {{rootdirectory: {tmp_path}/s}}}}\nhttp: {{addr: "127.0.0.1:{port}"}}\n{auth}\n'
    (tmp_path / "config.yml").write_text(config)
    server = Server([str(binary), "serve", str(tmp_path / "config.yml")], tmp_path, port)
    yield server.host, issuer
    server.stop()
    issuer.stop()
    gc.collect()


def test_tokens_of_a_real_token_service(guarded: tuple[str, TokenIssuer], pushed: Callable[..., None]) -> None:
    host, issuer = guarded
    ann = (Credential("ann", "old"), Credential("ann", "pa55word"))
    pushed(host, ann)
    assert {scope for _, scope in issuer.asked} <= {"repository:team/model:pull", "repository:team/model:pull,push",
                                                    "repository:team/model:push,pull"}  # fmt: skip
    for credentials, method in ((ann, "GET"), ((Credential(identity_token="refresh"),), "POST")):
        issuer.asked.clear()
        issuer.life_s = 60
        source = Place(host).open(credentials=credentials)
        try:
            assert source.fetch_manifest("v1", None, 10.0).data
            for offset in range(5):
                assert read(source, offset, 10) == CONTENT[offset : offset + 10]
            assert {asked for asked, _ in issuer.asked} == {method}
            assert len(issuer.asked) == len(credentials), "one token for many requests"
        finally:
            source.close()
    with pytest.raises(RegistryAuthError):
        Place(host).open().fetch_manifest("v1", None, 10.0)
    issuer.life_s = 2
    source = Place(host).open(credentials=ann)
    try:
        assert read(source, 0, 10) == CONTENT[:10]
        time.sleep(2.1)
        assert read(source, 0, 10) == CONTENT[:10]
    finally:
        source.close()


@pytest.mark.parametrize(
    ("registry", "has_referrers"), [("docker_registry", False), ("distribution", False), ("with_referrers", True)]
)
def test_which_registries_have_the_referrers_endpoint(
    registry: str, has_referrers: bool, request: pytest.FixtureRequest, pushed: Callable[..., None]
) -> None:
    """What hangs on a model is listed there, or must be looked for under a tag: clients need both ways."""
    found = request.getfixturevalue(registry)
    host = found if isinstance(found, str) else found.host
    pushed(host)
    source = Place(host).open()
    model = source.fetch_manifest("v1", None, 10.0)
    source.close()
    attached = artifact(EMPTY, [Layer("application/x-report", b"report")], {}, artifact_type="application/x-report")
    subject = {"mediaType": model.media_type, "digest": str(model.digest), "size": len(model.data)}
    attached.manifest["subject"] = subject
    push(attached, host, "team/model", "report")
    url = f"http://{host}/v2/team/model/referrers/{model.digest}"
    if not has_referrers:
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(url, timeout=10)
        assert caught.value.code == 404
        caught.value.close()
        return
    with urllib.request.urlopen(url, timeout=10) as answer:
        listed = json.load(answer)
    assert listed["mediaType"] == "application/vnd.oci.image.index.v1+json"
    assert [entry["digest"] for entry in listed["manifests"]] == [attached.digest]


def test_a_push_uses_the_certificates_of_hosts_toml(proxy: str, certificate: Path, tmp_path: Path) -> None:
    """And inspect and ls read what was pushed in the same way."""
    directory = tmp_path / "certs.d" / (proxy.replace(":", "_") + "_")
    directory.mkdir(parents=True)
    (tmp_path / "model.bin").write_bytes(CONTENT)
    flags = ["--registry-config-dir", str(tmp_path / "certs.d")]
    reference = f"{proxy}/team/by-hosts-toml:v1"
    (directory / "hosts.toml").write_text(f'server = "https://{proxy}"\n')
    assert main(["push", str(tmp_path / "model.bin"), reference, *flags]) == 1
    (directory / "ca.pem").write_text(Path(f"{certificate}.crt").read_text())
    (directory / "hosts.toml").write_text(f'server = "https://{proxy}"\nca = "ca.pem"\n')
    assert main(["push", str(tmp_path / "model.bin"), reference, *flags]) == 0
    assert main(["inspect", reference, *flags]) == 0
    assert main(["ls", reference, *flags]) == 0
    (directory / "hosts.toml").write_text(
        f'server = "https://{proxy}"\nca = "ca.pem"\ncapabilities = ["pull", "resolve"]\n'
    )
    assert main(["push", str(tmp_path / "model.bin"), reference, *flags]) == 1
