"""kubelet's credential provider plugins, by their exec contract: one JSON request on stdin, one JSON answer on stdout.

A node has these for its images already; the same programs and the same configuration file serve models. Answers are kept
as they say: per image, per registry or for all, for as long as they say, in memory.

Providers that want a service account's token (`tokenAttributes`) are not asked here: a node has no such token.

Source: kubernetes pkg/credentialprovider/plugin, kubelet.config.k8s.io CredentialProviderConfig.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import threading
import time
from dataclasses import dataclass
from typing import Any

import yaml

from csi.credentials import Credentials, Keyring, fits, helper_answer, registry_key
from csi.errors import InvalidVolumeError, ModelMountError, RegistryUnavailableError
from csi.keychain.programs import run

log = logging.getLogger(__name__)

_TIMEOUT_S = 60.0  # kubelet's own
_MAX_CONFIG_BYTES = 1024 * 1024
_MAX_KEPT = 1024
_API_VERSIONS = ("credentialprovider.kubelet.k8s.io/v1", "credentialprovider.kubelet.k8s.io/v1beta1",
                 "credentialprovider.kubelet.k8s.io/v1alpha1")  # fmt: skip
_DURATION = re.compile(r"(?:(\d+(?:\.\d*)?)h)?(?:(\d+(?:\.\d*)?)m)?(?:(\d+(?:\.\d*)?)s)?")
_GLOBAL = ""


@dataclass(frozen=True, slots=True)
class Provider:
    """One entry of the configuration. `environment` may hold secrets."""

    name: str
    api_version: str
    match_images: tuple[str, ...]
    default_cache_s: float
    arguments: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]


class CredentialPlugins:
    """Thread-safe; calls block as long as a program runs. A program is run once however many ask for the same image."""

    def __init__(self, config_path: str, bin_dir: str) -> None:
        """Reads the configuration. Raises: InvalidVolumeError naming what is wrong with it."""
        self._bin_dir = bin_dir
        self._providers = parse_config(_read(config_path), config_path)
        self._locks = {provider.name: threading.Lock() for provider in self._providers}
        self._kept: dict[tuple[str, str], tuple[float, Keyring]] = {}

    def candidates(self, registry: str, repository: str) -> Credentials:
        """Of every provider whose `matchImages` fit. A provider that fails is passed over, as kubelet does."""
        found: list[Any] = []
        for provider in self._providers:
            if not any(fits(registry_key(pattern), registry, repository) for pattern in provider.match_images):
                continue
            try:
                keyring = self._ask(provider, registry, repository)
            except ModelMountError as exc:
                log.warning("credential provider %s for %s: %s", provider.name, registry, exc)
                continue
            found += keyring.candidates(registry, repository)
        return tuple(dict.fromkeys(found))

    def _ask(self, provider: Provider, registry: str, repository: str) -> Keyring:
        image = f"{registry}/{repository}"
        with self._locks[provider.name]:
            for key in (image, registry, _GLOBAL):
                until, kept = self._kept.get((provider.name, key), (0.0, Keyring()))
                if time.monotonic() < until:
                    return kept
            request = {"kind": "CredentialProviderRequest", "apiVersion": provider.api_version, "image": image}
            output, status = run(
                [os.path.join(self._bin_dir, provider.name), *provider.arguments],
                json.dumps(request).encode(),
                _TIMEOUT_S,
                dict(provider.environment),
            )
            if status != 0:
                raise RegistryUnavailableError(f"ended with status {status}; run it by hand on this node to see why")
            kind, lifetime_s, keyring = parse_answer(output, provider)
            key = {"Image": image, "Registry": registry, "Global": _GLOBAL}[kind]
            if lifetime_s > 0:
                if len(self._kept) >= _MAX_KEPT:
                    self._kept.clear()
                self._kept[provider.name, key] = (time.monotonic() + lifetime_s, keyring)
            return keyring


def parse_config(text: str, what: str) -> tuple[Provider, ...]:
    """A CredentialProviderConfig, as YAML or JSON. Raises: InvalidVolumeError naming the field."""
    try:
        document = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        raise _invalid(what, "is not YAML") from None
    if not isinstance(document, dict) or document.get("kind") != "CredentialProviderConfig":
        raise _invalid(what, "is not a CredentialProviderConfig")
    providers = document.get("providers")
    if not isinstance(providers, list) or not providers:
        raise _invalid(what, "providers: is empty")
    found = []
    for position, entry in enumerate(providers):
        where = f"{what}: providers[{position}]"
        if not isinstance(entry, dict):
            raise _invalid(where, "is not an object")
        if entry.get("tokenAttributes"):
            log.info("%s wants service account tokens and is not asked", where)
            continue
        found.append(_provider(entry, where))
    if len({provider.name for provider in found}) != len(found):
        raise _invalid(what, "providers: a name appears twice")
    return tuple(found)


def parse_answer(output: bytes, provider: Provider) -> tuple[str, float, Keyring]:
    """Cache key type, seconds to keep it, credentials. Raises: RegistryUnavailableError; nothing of the answer is in it."""
    try:
        answer = json.loads(output)
        kind, auth = answer["cacheKeyType"], answer.get("auth") or {}
        if answer["kind"] != "CredentialProviderResponse" or answer["apiVersion"] != provider.api_version:
            raise ValueError
        lifetime = answer.get("cacheDuration")
        lifetime_s = provider.default_cache_s if lifetime is None else duration_s(lifetime)
        if kind not in ("Image", "Registry", "Global") or lifetime_s is None:
            raise ValueError
        entries = tuple(
            (key, helper_answer(login["username"], login["password"]))
            for pattern, login in auth.items()
            if (key := registry_key(pattern)) and login.get("password")
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, InvalidVolumeError):
        raise RegistryUnavailableError(
            "its answer is not a CredentialProviderResponse of the version asked for"
        ) from None
    return kind, lifetime_s, Keyring(entries)


def duration_s(text: Any) -> float | None:
    """A Go duration such as `12h0m0s` in seconds; None for anything else."""
    if text == "0":
        return 0.0
    match = _DURATION.fullmatch(text) if isinstance(text, str) and 0 < len(text) < 64 else None
    if match is None:
        return None
    hours, minutes, seconds = (float(part or 0) for part in match.groups())
    total = hours * 3600 + minutes * 60 + seconds
    return total if math.isfinite(total) else None


def _provider(entry: dict[str, Any], where: str) -> Provider:
    name, version = entry.get("name"), entry.get("apiVersion")
    if not isinstance(name, str) or not name or "/" in name or " " in name or name in (".", ".."):
        raise _invalid(where, "name: is not the name of a program")
    if version not in _API_VERSIONS:
        raise _invalid(where, f"apiVersion: expected one of {', '.join(_API_VERSIONS)}")
    images, arguments = entry.get("matchImages"), entry.get("args") or []
    if not isinstance(images, list) or not images or not all(isinstance(one, str) for one in images):
        raise _invalid(where, "matchImages: is not a list of patterns")
    if not isinstance(arguments, list) or not all(isinstance(one, str) for one in arguments):
        raise _invalid(where, "args: is not a list of texts")
    default_s = duration_s(entry.get("defaultCacheDuration"))
    if default_s is None:
        raise _invalid(where, "defaultCacheDuration: is not a duration such as 12h or 0s")
    try:
        environment = tuple((str(one["name"]), str(one["value"])) for one in entry.get("env") or [])
    except (KeyError, TypeError):
        raise _invalid(where, "env: is not a list of name and value") from None
    return Provider(name, version, tuple(images), default_s, tuple(arguments), environment)


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(_MAX_CONFIG_BYTES)
    except OSError as exc:
        raise _invalid(path, f"cannot be read: {exc.strerror}") from exc


def _invalid(what: str, problem: str) -> InvalidVolumeError:
    return InvalidVolumeError(f"{what}: {problem}", field="credential-provider-config")
