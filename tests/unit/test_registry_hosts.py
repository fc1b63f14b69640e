"""containerd's hosts.toml: order, keys, directories, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi.errors import InvalidVolumeError
from csi.registry_hosts import (
    CAPABILITIES,
    RegistryHost,
    directory_names,
    from_wire,
    own_host,
    parse_hosts_toml,
    to_wire,
)
from csi.supervisor.hosts import read_hosts

# From containerd's own tests (core/remotes/docker/config/hosts_test.go), with what they expect.
CONTAINERD = """
server = "https://test-default.registry"
ca = "/etc/path/default"
[host."https://mirror.registry"]
  capabilities = ["pull"]
  ca = "/etc/certs/mirror.pem"
  skip_verify = false
[host."https://mirror.registry".header]
  x-custom-2 = ["value 1", "value 2"]
[host."https://mirror-bak.registry/us"]
  capabilities = ["pull", "resolve"]
  client = ["/etc/certs/a.pem", ["/etc/certs/b.cert", "b.key"]]
[host."http://mirror.registry"]
  capabilities = ["pull"]
[host."https://test-1.registry/v2"]
  override_path = false
[host."https://test-2.registry/v2"]
  override_path = true
[host."https://test-3.registry/some/root"]
  override_path = true
  dial_timeout = "1m0.5s"
"""


def parse(text: str, registry: str = "registry.example.com") -> tuple[RegistryHost, ...]:
    return parse_hosts_toml(text, registry, "/etc/certs.d/x")


def test_a_file_of_containerds_own_tests() -> None:
    hosts = parse(CONTAINERD)
    assert [(host.scheme, host.authority, host.path) for host in hosts] == [
        ("https", "mirror.registry", "/v2"),
        ("https", "mirror-bak.registry", "/us/v2"),
        ("http", "mirror.registry", "/v2"),
        ("https", "test-1.registry", "/v2"),
        ("https", "test-2.registry", "/v2"),
        ("https", "test-3.registry", "/some/root"),
        ("https", "test-default.registry", "/v2"),
    ]
    assert hosts[0].capabilities == {"pull"}
    assert hosts[3].capabilities == CAPABILITIES
    assert hosts[0].ca == ("/etc/certs/mirror.pem",)
    assert hosts[0].headers == (("x-custom-2", "value 1"), ("x-custom-2", "value 2"))
    assert hosts[1].client == (("/etc/certs/a.pem", ""), ("/etc/certs/b.cert", "/etc/certs.d/x/b.key"))
    assert hosts[5].dial_timeout_s == 60.5
    assert hosts[6].ca == ("/etc/path/default",)
    assert from_wire(json.loads(json.dumps(to_wire(hosts)))) == hosts


def test_the_registry_itself_is_last_and_no_mirror() -> None:
    mirror, own = parse('[host."http://10.0.0.5:5000"]')
    assert (mirror.is_mirror, mirror.gets_credentials) == (True, False)
    assert own == own_host("registry.example.com")
    assert (own.is_mirror, own.gets_credentials, own.scheme) == (False, True, "")
    mirror, own = parse('server = "https://registry-1.docker.io"\n[host."https://docker.io"]', "docker.io")
    assert not mirror.is_mirror, "docker.io and its API host are the same registry"
    assert not own.is_mirror


def test_credentials_go_to_a_mirror_only_where_it_says_so() -> None:
    text = (
        '[host."https://a"]\nmodelmount_credentials = "registry"\n[host."https://b"]\nmodelmount_credentials = "none"'
    )
    assert [host.gets_credentials for host in parse(text)] == [True, False, True]


def test_tls_keys_on_an_http_address_mean_https() -> None:
    text = (
        '[host."http://a:5000"]\nskip_verify = true\n[host."http://b:80"]\nskip_verify = true\n[host."http://c:5000"]'
    )
    assert [host.scheme for host in parse(text)] == ["https", "http", "http", ""]


@pytest.mark.parametrize(
    "text",
    [
        "server = 1", "not toml", 'host = "x"', '[host]\n"https://a" = 1', '[host."ftp://a"]', '[host."https://u:p@a"]',
        '[host."https://a:port"]', '[host."https://"]', '[host."https://a"]\ncapabilities = ["fly"]',
        '[host."https://a"]\nca = 1', '[host."https://a"]\nclient = [["a"]]', '[host."https://a"]\nskip_verify = "yes"',
        '[host."https://a"]\ndial_timeout = "soon"', '[host."https://a"]\ndial_timeout = 3', "override_path = 1\nserver='a'",
        '[host."https://a".header]\n"x y" = "z"', '[host."https://a".header]\nx = "a\\r\\nb: c"', 'header = "x"',
        '[host."https://a"]\nmodelmount_credentials = "all"', '[host."https://[::"]',
        "\n".join(f'[host."https://h{number}"]' for number in range(65)),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_the_file(text: str) -> None:
    with pytest.raises(InvalidVolumeError, match=r"/etc/certs\.d/x/hosts\.toml"):
        parse(text)


def test_no_repr_shows_keys_or_headers() -> None:
    shown = repr(parse('client = "canary"\n[host."https://a".header]\nAuthorization = "canary"'))
    assert "canary" not in shown


@pytest.mark.parametrize(
    ("registry", "names"),
    [
        ("a.io:5000", ["a.io_5000_", "a.io:5000", "_default"]),
        ("a.io", ["a.io", "_default"]),
        ("[::1]:5000", ["[::1]_5000_", "[::1]:5000", "_default"]),
        ("[::1]", ["[::1]", "_default"]),
    ],
)
def test_the_names_of_directories(registry: str, names: list[str]) -> None:
    assert directory_names(registry) == names


def test_files_are_read_from_the_first_directory_that_is_there(tmp_path: Path) -> None:
    assert read_hosts(str(tmp_path), "a.io:5000") == ()
    (tmp_path / "_default").mkdir()
    (tmp_path / "_default" / "hosts.toml").write_text('[host."http://127.0.0.1:65001"]')
    assert [host.authority for host in read_hosts(str(tmp_path), "a.io:5000")] == ["127.0.0.1:65001", "a.io:5000"]
    (tmp_path / "a.io_5000_").mkdir()
    (tmp_path / "a.io_5000_" / "ca.crt").write_text("CA")
    (tmp_path / "a.io_5000_" / "me.cert").write_text("CERT")
    (tmp_path / "a.io_5000_" / "me.key").write_text("KEY")
    (own,) = read_hosts(str(tmp_path), "a.io:5000")
    assert (own.authority, own.ca, own.client) == ("a.io:5000", ("CA",), (("CERT", "KEY"),))
    (tmp_path / "a.io_5000_" / "hosts.toml").write_text('ca = "missing.pem"')
    with pytest.raises(InvalidVolumeError, match=r"missing\.pem"):
        read_hosts(str(tmp_path), "a.io:5000")
    (tmp_path / "a.io_5000_" / "hosts.toml").write_text('ca = ["ca.crt"]')
    assert read_hosts(str(tmp_path), "a.io:5000")[0].ca == ("CA",)
    os.truncate(tmp_path / "a.io_5000_" / "ca.crt", 2 << 20)
    with pytest.raises(InvalidVolumeError, match="larger than"):
        read_hosts(str(tmp_path), "a.io:5000")


TABLES = st.sampled_from(
    ["server", '[host."https://a"]', "[host]", '[host."https://a".header]', "ca", "client", "x", "="]
)
PIECES = st.lists(TABLES | st.sampled_from(["= ", '"a"', "[", "]", "\n", '"1s"', "true", "'\\", "{", "}"]), max_size=20)


@given(st.text(max_size=200) | PIECES.map("".join) | PIECES.map("\n".join))
def test_any_text_is_hosts_or_our_error(text: str) -> None:
    try:
        hosts = parse(text)
    except InvalidVolumeError:
        return
    assert from_wire(json.loads(json.dumps(to_wire(hosts)))) == hosts


@given(st.text(alphabet="0123456789.hmsunµ ", max_size=400))
def test_any_duration_ends(text: str) -> None:
    try:
        parse(f"dial_timeout = '{text}'")
    except InvalidVolumeError:
        return
