"""Credentials as values: where they are for, which of them fit a repository, how they cross to another process.

    Credential   one login: user and password, or a token
    Keyring      credentials by registry, as docker's config.json and image pull secrets write them

Matching is Kubernetes' own, so a pull secret that works for images works for models: every entry that fits is a
candidate, the most specific first, and they are tried in turn. What leaves a Keyring is a tuple of candidates for one
repository; only that crosses between processes, in memory, and no repr shows a secret.

Source: kubernetes pkg/credentialprovider (keyring.go, config.go); docker cli config/configfile.
"""

from __future__ import annotations

import base64
import binascii
import fnmatch
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from csi.errors import InvalidVolumeError

DOCKER_CONFIG_JSON = ".dockerconfigjson"
DOCKER_CONFIG_LEGACY = ".dockercfg"
IDENTITY_TOKEN_USER = "<token>"  # noqa: S105
"""The user name with which docker's helpers mark a secret that is an identity token."""

_MAX_CONFIG_BYTES = 1024 * 1024  # a Kubernetes secret is not larger
# All of them go in one control message of at most 64 KiB. A cloud's token has 2-4 KiB.
_MAX_CANDIDATES = 16
_MAX_WIRE_BYTES = 48 * 1024
_DOCKER_HUB = frozenset({"docker.io", "index.docker.io"})
_DOCKER_HUB_KEY = "index.docker.io"


@dataclass(frozen=True, slots=True)
class Credential:
    """One login. Exactly one of these is set: a password, an identity token, a registry token, a subject token.

    An identity token is a refresh token: the registry's token service takes it, the registry does not. A registry
    token is sent to the registry as it is. A subject token is exchanged at `exchange_url` (RFC 8693) for the password of
    `username`; the registry sees only that.
    """

    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    registry_token: str = field(default="", repr=False)
    subject_token: str = field(default="", repr=False)
    exchange_url: str = ""


Credentials = tuple[Credential, ...]
"""Candidates for one repository, in the order in which they are tried; empty to ask anonymously."""


@dataclass(frozen=True, slots=True)
class Keyring:
    """Entries in the order given; `key` is `host[:port][/path]`, the host's labels may be patterns (`*.example.com`).

    The empty key fits every repository: credentials that name no registry, such as a basic-auth secret's.
    """

    entries: tuple[tuple[str, Credential], ...] = ()

    def candidates(self, registry: str, repository: str) -> Credentials:
        """What fits `registry/repository`, most specific first, each once.

        Docker Hub's own entry (`https://index.docker.io/v1/`) fits docker.io when nothing else does.
        """
        fitting = [(key, found) for key, found in self.entries if key and fits(key, registry, repository)]
        if not fitting and registry in _DOCKER_HUB:
            fitting = [(key, found) for key, found in self.entries if key == _DOCKER_HUB_KEY]
        fitting.sort(key=lambda entry: entry[0], reverse=True)
        return united([found for _, found in fitting], [found for key, found in self.entries if not key])

    def named(self, registry: str) -> Keyring:
        """The same, but what names no registry is for this one alone (for none, if it is empty)."""
        return Keyring(tuple((key or registry, found) for key, found in self.entries if key or registry))


NO_LOGINS = Keyring()


def united(*several: Iterable[Credential]) -> Credentials:
    """All candidates in their order, each once."""
    return tuple(dict.fromkeys(found for candidates in several for found in candidates))


def of_secret(secret: Mapping[str, str]) -> Keyring:
    """The credentials in a Kubernetes secret: of type dockerconfigjson, dockercfg or basic-auth, by its keys.

    Raises: InvalidVolumeError that names the key, never a value.
    """
    entries: list[tuple[str, Credential]] = []
    if DOCKER_CONFIG_JSON in secret:
        entries += of_docker_config(secret[DOCKER_CONFIG_JSON], f"secret key {DOCKER_CONFIG_JSON}").entries
    if DOCKER_CONFIG_LEGACY in secret:
        entries += of_legacy_config(secret[DOCKER_CONFIG_LEGACY], f"secret key {DOCKER_CONFIG_LEGACY}").entries
    if "username" in secret and "password" in secret:
        entries.append(("", _login(secret["username"], secret["password"], "secret")))
    elif not {DOCKER_CONFIG_JSON, DOCKER_CONFIG_LEGACY} & set(secret):
        raise InvalidVolumeError(
            f"nodePublishSecretRef: the secret has the keys {', '.join(sorted(secret))[:200] or '(none)'}; expected "
            f"{DOCKER_CONFIG_JSON} (type kubernetes.io/dockerconfigjson), or username and password "
            "(type kubernetes.io/basic-auth)",
            field="secrets",
        )
    return Keyring(tuple(entries))


def of_docker_config(text: str, what: str) -> Keyring:
    """The `auths` of docker's config.json. `what` names it in messages. Helpers it names are not asked here.

    Raises: InvalidVolumeError.
    """
    config = json_object(text, what)
    return _keyring(config.get("auths") or {}, f"{what}: auths")


def of_legacy_config(text: str, what: str) -> Keyring:
    """The older form, which is the content of `auths` alone. Raises: InvalidVolumeError."""
    return _keyring(json_object(text, what), what)


def helper_answer(username: str, secret: str) -> Credential:
    """What a credential helper or provider gave: a login, or an identity token. Raises: InvalidVolumeError."""
    if username == IDENTITY_TOKEN_USER:
        return Credential(identity_token=_header_safe(secret, "identity token"))
    return _login(username, secret, "credential helper")


def within_limits(credentials: Sequence[Credential]) -> Credentials:
    """The first of them, as many as one message carries."""
    kept, left = [], _MAX_WIRE_BYTES
    for one in credentials[:_MAX_CANDIDATES]:
        left -= len(json.dumps(_texts(one)))
        if left < 0:
            break
        kept.append(one)
    return tuple(kept)


def to_wire(credentials: Sequence[Credential]) -> list[dict[str, str]]:
    """For a control message, in memory only. Raises: InvalidVolumeError for more than one message carries."""
    if len(within_limits(credentials)) < len(credentials):
        raise InvalidVolumeError(
            f"credentials: the {len(credentials)} entries that fit the repository are more than {_MAX_CANDIDATES}, or "
            f"larger than {_MAX_WIRE_BYTES} bytes; remove those that are not needed",
            field="secrets",
        )
    return [_texts(one) for one in credentials]


def from_wire(value: Any) -> Credentials:
    """Inverse of `to_wire`; None is nobody's. Raises: InvalidVolumeError for anything else."""
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise InvalidVolumeError("credentials: malformed", field="secrets")
    try:
        found = tuple(Credential(**one) for one in value)
    except TypeError:
        raise InvalidVolumeError("credentials: unknown fields", field="secrets") from None
    if not all(isinstance(text, str) for one in value for text in one.values()):
        raise InvalidVolumeError("credentials: a field is not a text", field="secrets")
    return found


def keyring_to_wire(keyring: Keyring) -> list[tuple[str, dict[str, str]]]:
    """For another process, in memory only: too large for a control message."""
    return [(key, _texts(found)) for key, found in keyring.entries]


def keyring_from_wire(value: Any) -> Keyring:
    """Inverse of `keyring_to_wire`. Raises: InvalidVolumeError for anything else."""
    try:
        keys, found = [str(key) for key, _ in value], from_wire([one for _, one in value])
    except (TypeError, ValueError):
        raise InvalidVolumeError("credentials: malformed", field="secrets") from None
    return Keyring(tuple(zip(keys, found, strict=True)))


def registry_key(name: str) -> str:
    """A key of `auths` as it is matched: without scheme and without `/v1/`, `/v2/`; empty for a malformed one."""
    if not name.startswith(("https://", "http://")):
        name = f"https://{name}"
    try:
        parts = urlsplit(name)
        _ = parts.port
    except ValueError:
        return ""
    if "@" in parts.netloc:
        return ""
    path = parts.path
    if path.startswith(("/v1/", "/v2/")):
        path = path[3:]
    return parts.netloc.lower() + (path if path != "/" else "")


def json_object(text: str, what: str) -> dict[str, Any]:
    """Raises: InvalidVolumeError for anything but a JSON object of at most 1 MiB; the text is in no message."""
    if len(text) > _MAX_CONFIG_BYTES:
        raise InvalidVolumeError(f"{what}: larger than {_MAX_CONFIG_BYTES} bytes", field="secrets")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidVolumeError(f"{what}: is not JSON", field="secrets") from None
    if not isinstance(value, dict):
        raise InvalidVolumeError(f"{what}: is not a JSON object", field="secrets")
    return value


def _keyring(auths: Any, what: str) -> Keyring:
    if not isinstance(auths, dict):
        raise InvalidVolumeError(f"{what}: is not an object of registries", field="secrets")
    entries = []
    for name, value in auths.items():
        key, found = registry_key(name), _entry(value, f"{what}[{name[:100]!r}]")
        if key and found is not None:
            entries.append((key, found))
    return Keyring(tuple(entries))


def _entry(value: Any, what: str) -> Credential | None:
    """None for an entry without a login: docker writes one for a registry whose login a helper keeps."""
    if not isinstance(value, dict):
        raise InvalidVolumeError(f"{what}: is not an object", field="secrets")
    texts: dict[str, str] = {}
    for name in ("username", "password", "auth", "identitytoken", "registrytoken"):
        text = value.get(name) or ""
        if not isinstance(text, str):
            raise InvalidVolumeError(f"{what}.{name}: is not a text", field="secrets")
        texts[name] = text
    if texts["registrytoken"]:
        return Credential(registry_token=_header_safe(texts["registrytoken"], f"{what}.registrytoken"))
    if texts["identitytoken"]:
        return Credential(identity_token=_header_safe(texts["identitytoken"], f"{what}.identitytoken"))
    username, password = texts["username"], texts["password"]
    if texts["auth"]:
        username, password = _decoded_auth(texts["auth"], f"{what}.auth")
    if not username and not password:
        return None
    if username == IDENTITY_TOKEN_USER:
        return Credential(identity_token=_header_safe(password, what))
    return _login(username, password, what)


def _decoded_auth(auth: str, what: str) -> tuple[str, str]:
    try:
        # Padding is left out by some writers.
        text = base64.b64decode(auth.strip() + "=" * (-len(auth.strip()) % 4), validate=True).decode()
    except (binascii.Error, ValueError):
        raise InvalidVolumeError(f"{what}: is not base64 of username:password", field="secrets") from None
    username, colon, password = text.partition(":")
    if not colon:
        raise InvalidVolumeError(f"{what}: is not base64 of username:password", field="secrets")
    return username, password.rstrip("\0")


def _login(username: str, password: str, what: str) -> Credential:
    if ":" in username:
        raise InvalidVolumeError(
            f"{what}: the user name has a ':', which Basic authentication cannot express", field="username"
        )
    if not password:
        raise InvalidVolumeError(f"{what}: the password is empty", field="password")
    return Credential(username, password)


def _header_safe(token: str, what: str) -> str:
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise InvalidVolumeError(f"{what}: has characters a token cannot have", field="secrets")
    return token


def _texts(one: Credential) -> dict[str, str]:
    names = ("username", "password", "identity_token", "registry_token", "subject_token", "exchange_url")
    return {name: text for name in names if (text := getattr(one, name))}


def fits(key: str, registry: str, repository: str) -> bool:
    """Whether the key of an entry is for that repository. Equal ports, as many host labels, each a match; the path is a plain prefix, as in Kubernetes: `reg/foo` fits
    `reg/foobar`.
    """
    authority, slash, path = key.partition("/")
    if not f"/{repository}".startswith(slash + path):
        return False
    pattern, wanted = _split_authority(authority), _split_authority(registry)
    if pattern[1] != wanted[1] or len(pattern[0]) != len(wanted[0]):
        return False
    return all(fnmatch.fnmatchcase(label, glob) for glob, label in zip(pattern[0], wanted[0], strict=True))


def _split_authority(authority: str) -> tuple[list[str], str]:
    """Host labels and port. An IPv6 address is one label per dot, as it is to Kubernetes."""
    host, colon, port = authority.rpartition(":")
    if not colon or port.endswith("]"):
        return authority.strip("[]").split("."), ""
    return host.strip("[]").split("."), port
