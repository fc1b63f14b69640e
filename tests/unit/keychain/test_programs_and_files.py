"""Credential helpers and kubelet's plugins, as real programs; nothing they say ends up in a message."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi.credentials import Credential
from csi.errors import InvalidVolumeError, RegistryUnavailableError
from csi.keychain import docker_config
from csi.keychain.own_logins import OwnLogins
from csi.keychain.plugins import CredentialPlugins, Provider, duration_s, parse_answer, parse_config
from csi.keychain.programs import MAX_OUTPUT_BYTES, run
from csi.oci.reference import Reference
from csi.supervisor.node_credentials import NodeCredentials


def program(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def bin_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")
    return directory


def helper(bin_dir: Path, name: str, text: str) -> None:
    program(bin_dir / f"docker-credential-{name}", f'read server; [ "$1" = get ] || exit 9; {text}')


def answer(username: str, secret: str) -> str:
    return "echo '" + json.dumps({"ServerURL": "x", "Username": username, "Secret": secret}) + "'"


# --- programs ---------------------------------------------------------------------------------------------------------


def test_a_program_gets_its_input_and_gives_its_output(tmp_path: Path) -> None:
    large = b"x" * 300_000
    assert run([program(tmp_path / "cat", "cat; exit 3")], large, 10.0) == (large, 3)
    assert run([program(tmp_path / "deaf", "echo ok; echo canary >&2")], large, 10.0) == (b"ok\n", 0)
    assert run([program(tmp_path / "env", 'echo "$GIVEN"')], b"", 10.0, {"GIVEN": "yes"}) == (b"yes\n", 0)


@pytest.mark.parametrize(
    ("text", "timeout_s", "said"),
    [
        ("sleep 60", 0.3, "no answer within 0.3 s"),
        ("sleep 60 & exec sleep 60", 0.3, "no answer within 0.3 s"),
        ("yes canary", 20.0, f"more than {MAX_OUTPUT_BYTES} bytes"),
    ],
)
def test_a_program_that_does_not_end_is_ended_with_its_children(
    tmp_path: Path, text: str, timeout_s: float, said: str
) -> None:
    started = time.monotonic()
    with pytest.raises(RegistryUnavailableError) as caught:
        run([program(tmp_path / "p", text)], b"", timeout_s)
    assert said in str(caught.value)
    assert "canary" not in str(caught.value)
    assert time.monotonic() - started < 15


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RegistryUnavailableError, match="cannot be started"):
        run([str(tmp_path / "none")], b"", 1.0)


# --- docker's configuration and its helpers ---------------------------------------------------------------------------


def config(tmp_path: Path, **document: object) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(document))
    return str(path)


def test_the_helper_of_a_registry_alone_is_asked_for_it(tmp_path: Path, bin_dir: Path) -> None:
    helper(bin_dir, "own", answer("own", "pw"))
    helper(bin_dir, "store", 'echo "{\\"Username\\": \\"<token>\\", \\"Secret\\": \\"$server\\"}"')
    written = {"auth": base64.b64encode(b"file:pw").decode()}
    path = config(
        tmp_path,
        credHelpers={"a.io": "own"},
        credsStore="store",
        auths={"a.io": written, "b.io:5000": written, "https://index.docker.io/v1/": {}},
    )
    assert docker_config.configured(path, "a.io", "x") == (Credential("own", "pw"),)
    assert docker_config.configured(path, "b.io:5000", "x") == (
        Credential(identity_token="b.io:5000"),
        Credential("file", "pw"),
    )
    assert docker_config.configured(path, "docker.io", "x") == (
        Credential(identity_token="https://index.docker.io/v1/"),
    )


def test_a_helper_that_knows_nobody_and_helpers_that_fail(tmp_path: Path, bin_dir: Path) -> None:
    path = config(tmp_path, credsStore="h")
    helper(bin_dir, "h", "echo 'credentials not found in native keychain'; exit 1")
    assert docker_config.configured(path, "a.io", "x") == ()
    for text in (
        "echo canary; exit 1",
        "echo canary",
        'echo \'{"Username": 1, "Secret": 2}\'',
        "echo canary >&2; exit 2",
    ):
        helper(bin_dir, "h", text)
        with pytest.raises(RegistryUnavailableError) as caught:
            docker_config.configured(path, "a.io", "x")
        assert "docker-credential-h" in str(caught.value)
        assert "canary" not in str(caught.value)
    for name in ("../../bin/sh", "a/b", "missing"):
        with pytest.raises((InvalidVolumeError, RegistryUnavailableError)):
            docker_config.configured(config(tmp_path, credsStore=name), "a.io", "x")


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    assert docker_config.configured(str(tmp_path / "none"), "a.io", "x", may_be_missing=True) == ()
    with pytest.raises(InvalidVolumeError, match="none: cannot be read"):
        docker_config.configured(str(tmp_path / "none"), "a.io", "x")


# --- kubelet's plugins ------------------------------------------------------------------------------------------------

VERSION = "credentialprovider.kubelet.k8s.io/v1"
CONFIG = f"""
apiVersion: kubelet.config.k8s.io/v1
kind: CredentialProviderConfig
providers:
  - name: provider
    apiVersion: {VERSION}
    matchImages: ["*.dkr.ecr.*.amazonaws.com", "r.example.com:5000/team"]
    defaultCacheDuration: "12h"
    args: [get]
    env: [{{name: WHO, value: ann}}]
  - name: needs-a-token
    apiVersion: {VERSION}
    matchImages: ["*"]
    defaultCacheDuration: "0s"
    tokenAttributes: {{serviceAccountTokenAudience: x, requireServiceAccount: true, cacheType: Token}}
"""


def plugins(
    tmp_path: Path, key_type: str = "Registry", duration: str = '"cacheDuration": "5m0s",'
) -> CredentialPlugins:
    (tmp_path / "config.yaml").write_text(CONFIG)
    text = (
        f'cat >> {tmp_path}/asked; echo >> {tmp_path}/asked; [ "$1" = get ] || exit 1; '
        f'echo "{{\\"kind\\": \\"CredentialProviderResponse\\", \\"apiVersion\\": \\"{VERSION}\\", '
        + duration.replace('"', '\\"')
        + f'\\"cacheKeyType\\": \\"{key_type}\\", '
        '\\"auth\\": {\\"r.example.com:5000\\": {\\"username\\": \\"$WHO\\", \\"password\\": \\"pw\\"}}}"'
    )
    program(tmp_path / "plugins" / "provider", text)
    return CredentialPlugins(str(tmp_path / "config.yaml"), str(tmp_path / "plugins"))


def asked(tmp_path: Path) -> list[str]:
    path = tmp_path / "asked"
    return [json.loads(line)["image"] for line in path.read_text().splitlines()] if path.exists() else []


def test_a_plugin_is_asked_as_kubelet_asks_it(tmp_path: Path) -> None:
    found = plugins(tmp_path)
    assert found.candidates("r.example.com:5000", "team/a") == (Credential("ann", "pw"),)
    assert json.loads((tmp_path / "asked").read_text().splitlines()[0]) == {
        "kind": "CredentialProviderRequest",
        "apiVersion": VERSION,
        "image": "r.example.com:5000/team/a",
    }
    assert found.candidates("r.example.com:5000", "other/a") == ()
    assert found.candidates("quay.io", "team/a") == ()


@pytest.mark.parametrize(
    ("key_type", "duration", "times"),
    [("Image", '"cacheDuration": "5m0s",', 2), ("Registry", '"cacheDuration": "5m0s",', 1), ("Global", "", 1),
     ("Registry", '"cacheDuration": "0s",', 4)],
)  # fmt: skip
def test_answers_are_kept_as_they_say(tmp_path: Path, key_type: str, duration: str, times: int) -> None:
    found = plugins(tmp_path, key_type, duration)
    for repository in ("team/a", "team/b") * 2:
        assert found.candidates("r.example.com:5000", repository)
    assert len(asked(tmp_path)) == times


@pytest.mark.allow_logs
def test_a_plugin_that_fails_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = plugins(tmp_path)
    for text in ("echo canary; exit 1", "echo canary", 'echo \'{"kind": "canary"}\''):
        program(tmp_path / "plugins" / "provider", text)
        assert found.candidates("r.example.com:5000", "team/a") == ()
    assert "canary" not in caplog.text


@pytest.mark.parametrize(
    "text",
    ["", "[", "kind: Other", "kind: CredentialProviderConfig", CONFIG.replace("name: provider", "name: ../x"),
     CONFIG.replace(VERSION, "v9"), CONFIG.replace('"12h"', '"soon"'), CONFIG.replace("args: [get]", "args: get"),
     CONFIG.replace('["*.dkr', '[1, "*.dkr'), CONFIG.replace("env: [{name: WHO", "env: [{nom: WHO")],
)  # fmt: skip
def test_a_configuration_that_is_wrong_says_where(text: str) -> None:
    with pytest.raises(InvalidVolumeError, match=r"^/etc/x\.yaml"):
        parse_config(text, "/etc/x.yaml")


@given(st.text(max_size=300))
def test_any_configuration_is_providers_or_our_error(text: str) -> None:
    try:
        parse_config(text, "x")
    except InvalidVolumeError:
        return


@given(st.binary(max_size=300) | st.dictionaries(st.text(), st.text()).map(lambda value: json.dumps(value).encode()))
def test_any_answer_is_credentials_or_our_error(output: bytes) -> None:
    with pytest.raises(RegistryUnavailableError):
        parse_answer(output, Provider("p", VERSION, ("*",), 0.0, (), ()))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("12h0m0s", 43200.0), ("5m", 300.0), ("0s", 0.0), ("0", 0.0), ("1.5s", 1.5), ("x", None), (7, None)],
)
def test_durations(text: object, seconds: float | None) -> None:
    assert duration_s(text) == seconds


# --- together ---------------------------------------------------------------------------------------------------------


def test_the_volumes_own_come_first_then_plugins_then_the_nodes_file(tmp_path: Path) -> None:
    written = {"auth": base64.b64encode(b"node:pw").decode()}
    path = config(tmp_path, auths={"r.example.com:5000": written})
    node = NodeCredentials(OwnLogins(path, plugins(tmp_path)), 120)
    reference = Reference.parse("r.example.com:5000/team/a:v1")
    brought = (Credential("volume", "pw"),)
    found = asyncio.run(node.after(brought, reference))
    assert [one.username for one in found] == ["volume", "ann", "node"]
    asyncio.run(node.after((), reference))
    assert len(asked(tmp_path)) == 1, "a republish runs no program again"
    assert asyncio.run(NodeCredentials(OwnLogins(None, None), 120).after(brought, reference)) == brought


@pytest.mark.allow_logs
def test_what_is_wrong_on_the_node_keeps_no_volume_from_its_registry(tmp_path: Path) -> None:
    node = NodeCredentials(OwnLogins(str(tmp_path / "missing.json"), None), 120)
    assert asyncio.run(node.after((), Reference.parse("quay.io/a/b:v1"))) == ()
