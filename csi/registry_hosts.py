"""Which hosts serve a registry, in which order and how: containerd's `hosts.toml` as values.

Reading the files is the caller's (`csi.supervisor.hosts`): here are the names of the directories, the parser, and the
form in which what was read crosses to another process.

Where ModelMount differs from containerd, it is stricter:
- a file that cannot be parsed is an error, instead of being passed over for certificates beside it;
- an `http` address with TLS keys (and another port than 80) is spoken to over https, without falling back to http;
- nobody's credentials are sent to a mirror unless its entry has `modelmount_credentials = "registry"`.

Source: containerd docs/hosts.md and core/remotes/docker/config/hosts.go.
"""

from __future__ import annotations

import json
import os.path
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

from csi.errors import InvalidVolumeError

CAPABILITIES = frozenset({"pull", "resolve", "push", "referrers"})
MAX_FILE_BYTES = 1024 * 1024
_MAX_HOSTS = 64
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]++")
_DURATION = re.compile(r"(?:(\d{1,9}(?:\.\d{0,9})?|\.\d{1,9})(h|ms|m|s|us|µs|ns))++")
_DURATION_PART = re.compile(r"([\d.]+)(h|ms|m|s|us|µs|ns)")
_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_DOCKER_HUB = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io"})


@dataclass(frozen=True, kw_only=True, slots=True)
class RegistryHost:
    """One host. `ca` and `client` are names of files until somebody has read them, then their PEM texts; the second of a
    client pair is empty when its key is in the first.
    """

    scheme: str = ""
    """Empty: as the node's rules on plain HTTP say."""
    authority: str
    path: str = "/v2"
    capabilities: frozenset[str] = CAPABILITIES
    ca: tuple[str, ...] = ()
    client: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    skip_verify: bool = False
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    dial_timeout_s: float | None = None
    is_mirror: bool = False
    """Another host than the registry's own: it is told which registry is meant (`ns`)."""
    gets_credentials: bool = True


def directory_names(registry: str) -> list[str]:
    """Names below the configuration directory, in the order they are looked for; the first that is there decides."""
    host, colon, port = registry.rpartition(":")
    with_port = [f"{host}_{port}_"] if colon and not port.endswith("]") else []
    return [*with_port, registry, "_default"]


def parse_hosts_toml(text: str, registry: str, directory: str) -> tuple[RegistryHost, ...]:
    """The hosts of a `hosts.toml`, in the order they are tried, the registry's own last. `ca` and `client` are names of
    files, absolute.

    Raises: InvalidVolumeError that names the file and the key.
    """
    what = os.path.join(directory, "hosts.toml")
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as exc:
        raise _invalid(what, f"is not TOML: {str(exc)[:200]}") from None
    hosts = document.get("host", {})
    if not isinstance(hosts, dict):
        raise _invalid(what, "host: is not a table of hosts")
    if len(hosts) > _MAX_HOSTS:
        raise _invalid(what, f"has {len(hosts)} hosts, at most {_MAX_HOSTS} are tried")
    found = []
    for address, table in hosts.items():
        if not isinstance(table, dict):
            raise _invalid(what, f"host.{address[:100]!r}: is not a table")
        found.append(_host(address, table, registry, directory, f"{what}: host.{address[:100]!r}"))
    server = document.get("server", "")
    if not isinstance(server, str):
        raise _invalid(what, "server: is not a text")
    return (*found, _host(server, document, registry, directory, f"{what}: server"))


def to_wire(hosts: tuple[RegistryHost, ...]) -> list[dict[str, Any]]:
    """As JSON values. They carry private keys and headers: in memory only."""
    return [asdict(host) | {"capabilities": sorted(host.capabilities)} for host in hosts]


def from_wire(values: list[dict[str, Any]]) -> tuple[RegistryHost, ...]:
    """Inverse of `to_wire`."""
    return tuple(
        RegistryHost(
            **value
            | {
                "capabilities": frozenset(value["capabilities"]),
                "ca": tuple(value["ca"]),
                "client": tuple((cert, key) for cert, key in value["client"]),
                "headers": tuple((name, text) for name, text in value["headers"]),
            }
        )
        for value in json.loads(json.dumps(values))
    )


def own_host(registry: str) -> RegistryHost:
    """The registry itself, where nothing is configured. Docker Hub's API is at another host than its name says."""
    return RegistryHost(authority="registry-1.docker.io" if registry in _DOCKER_HUB else registry)


def _host(address: str, table: Mapping[str, Any], registry: str, directory: str, what: str) -> RegistryHost:
    host = own_host(registry) if not address else _address(address, table.get("override_path", False), registry, what)
    capabilities = _texts(table.get("capabilities", []), f"{what}.capabilities")
    unknown = {one.lower() for one in capabilities} - CAPABILITIES
    if unknown:
        raise _invalid(what, f"capabilities: unknown {sorted(unknown)[0][:40]!r}")
    skip = table.get("skip_verify", False)
    if not isinstance(skip, bool):
        raise _invalid(what, "skip_verify: is not true or false")
    host = replace(
        host,
        capabilities=frozenset(one.lower() for one in capabilities) or CAPABILITIES,
        ca=tuple(_absolute(name, directory) for name in _texts(table.get("ca", []), f"{what}.ca")),
        client=_pairs(table.get("client", []), directory, f"{what}.client"),
        skip_verify=skip,
        headers=_headers(table.get("header", {}), f"{what}.header"),
        dial_timeout_s=_seconds(table.get("dial_timeout"), f"{what}.dial_timeout"),
        gets_credentials=not host.is_mirror or _sends_credentials(table, what),
    )
    has_tls = bool(host.ca or host.client or "skip_verify" in table)
    if host.scheme == "http" and has_tls and not host.authority.endswith(":80"):
        return replace(host, scheme="https")
    return host


def _address(address: str, override_path: Any, registry: str, what: str) -> RegistryHost:
    try:
        parts = urlsplit(address if "://" in address else f"https://{address}")
        _ = parts.port
    except ValueError:
        raise _invalid(what, "is not an address") from None
    if "://" in address and not address.startswith(("http://", "https://")):
        raise _invalid(what, "is not an http or https address")
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or not address.isprintable():
        raise _invalid(what, "is not an http or https address of a host")
    if not isinstance(override_path, bool):
        raise _invalid(what, "override_path: is not true or false")
    path = os.path.normpath(parts.path) if parts.path.strip("/") else ""
    if not override_path and not path.endswith("/v2"):
        path += "/v2"
    authority = parts.netloc.lower()
    same = authority == registry or (authority in _DOCKER_HUB and registry in _DOCKER_HUB)
    return RegistryHost(scheme=parts.scheme, authority=authority, path=path, is_mirror=not same)


def _sends_credentials(table: Mapping[str, Any], what: str) -> bool:
    value = table.get("modelmount_credentials", "none")
    if value not in ("none", "registry"):
        raise _invalid(what, "modelmount_credentials: expected 'none' or 'registry'")
    return bool(value == "registry")


def _texts(value: Any, what: str) -> list[str]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
        raise _invalid(what, "is not a text or a list of texts")
    return values


def _pairs(value: Any, directory: str, what: str) -> tuple[tuple[str, str], ...]:
    pairs: list[tuple[str, str]] = []
    for one in [value] if isinstance(value, str) else value if isinstance(value, list) else [None]:
        names = [one, ""] if isinstance(one, str) else one
        if not isinstance(names, list) or len(names) != 2 or not all(isinstance(name, str) for name in names):
            raise _invalid(what, "is not a file, a list of files, or a list of [certificate, key]")
        pairs.append((_absolute(names[0], directory), _absolute(names[1], directory) if names[1] else ""))
    return tuple(pairs)


def _headers(value: Any, what: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, dict):
        raise _invalid(what, "is not a table")
    found = []
    for name, texts in value.items():
        for text in _texts(texts, f"{what}.{name[:40]!r}"):
            if not _HEADER_NAME.fullmatch(name) or not (text.isascii() and text.isprintable()):
                raise _invalid(what, f"{name[:40]!r}: has characters a header cannot have")
            found.append((name, text))
    return tuple(found)


def _seconds(value: Any, what: str) -> float | None:
    """A Go duration, such as `200ms` or `1m30s`."""
    if value is None or value == "":
        return None
    if not isinstance(value, str) or not _DURATION.fullmatch(value):
        raise _invalid(what, "is not a duration such as '200ms' or '30s'")
    return sum(float(number) * _SECONDS[unit] for number, unit in _DURATION_PART.findall(value)) or None


def _absolute(name: str, directory: str) -> str:
    return os.path.join(directory, name)


def _invalid(what: str, problem: str) -> InvalidVolumeError:
    return InvalidVolumeError(
        f"{what}: {problem}; an administrator of this node corrects it", field="registry-config-dir"
    )
