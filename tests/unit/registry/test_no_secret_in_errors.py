"""Whatever goes wrong with a registry, no secret is in what is said or logged."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator

import pytest
from fakes.registry import FakeRegistry, Fault

from csi.credentials import Credential
from csi.errors import ModelMountError
from csi.oci.digest import Digest
from csi.oci.reference import Reference
from csi.registry.address_rules import AddressRules
from csi.registry.sources import SourceSettings, open_source
from csi.registry.transport import TransportSettings
from csi.registry_hosts import parse_hosts_toml

CONTENT = b"x" * 100_000
LOGINS = (
    Credential("ann", "canary-password"),
    Credential(identity_token="canary-identity"),
    Credential(registry_token="canary-registry"),
)


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry("ann", "canary-password", tokens=True) as fake:
        fake.add_model("team/model", "v1", {"a": CONTENT})
        yield fake


SIGNED = "/v2/x?X-Amz-Signature=canary-signature#canary-fragment"
FAULTS = {
    "token refused": Fault("/token", status=401, body=b"canary-password"),
    "token service down": Fault("/token", status=503, body=b"canary"),
    "token answer": Fault("/token", status=200, body=b'{"token": "canary \\n'),
    "token cut": Fault("/token", cut_at=12),
    "redirect to http": Fault("/v2/", redirect="http://203.0.113.9" + SIGNED),
    "redirect with login": Fault("/v2/", redirect="http://ann:canary-password@127.0.0.1/" + SIGNED),
    "redirect to nowhere": Fault("/v2/", redirect="http://127.0.0.1:1" + SIGNED),
    "redirect to metadata": Fault("/v2/", redirect="http://169.254.169.254" + SIGNED),
    "redirect malformed": Fault("/v2/", redirect="http://[canary" + SIGNED),
    "redirect for ever": Fault("/v2/", redirect=SIGNED),
    "server error": Fault("/v2/", status=500),
    "cut": Fault("/v2/", cut_at=5),
    "silent": Fault("/v2/", stall_s=0.5),
}


@pytest.mark.allow_logs
@pytest.mark.parametrize("name", FAULTS)
def test_no_secret_is_said_or_logged(registry: FakeRegistry, caplog: pytest.LogCaptureFixture, name: str) -> None:
    caplog.set_level(logging.DEBUG)
    fault = FAULTS[name]
    fault.times = 999
    registry.faults.append(fault)
    toml = (
        '[host."http://127.0.0.1:1/canary-path"]\n[host."http://127.0.0.1:1/canary-path".header]\nX = "canary-header"'
    )
    hosts = parse_hosts_toml(toml, registry.host, "/nowhere")
    settings = SourceSettings(
        rules=AddressRules(), credentials=LOGINS, hosts=hosts, transport=TransportSettings(stall_timeout_s=0.3)
    )
    source = open_source(Reference.parse(f"{registry.host}/team/model:v1"), settings)
    said = [repr(settings), repr(hosts)]

    def fetch() -> None:
        source.fetch_manifest("v1", None, 1.0)

    def read() -> None:
        reader = source.open_range(Digest.of(CONTENT), len(CONTENT), 0, len(CONTENT))
        try:
            reader.readinto(memoryview(bytearray(len(CONTENT))))
        finally:
            reader.close()

    for ask in (fetch, read):
        with pytest.raises(ModelMountError) as caught:
            ask()
        error: BaseException | None = caught.value
        said.append(str(caught.value.fields))
        while error is not None:
            said.append(f"{error} {error!r}")
            error = error.__cause__
    source.close()
    gc.collect()
    text = "\n".join([*said, caplog.text]).replace("canary-path", "")
    assert "canary" not in text, text
