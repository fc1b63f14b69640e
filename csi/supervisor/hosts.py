"""Reads a node's `hosts.toml` and the certificates it names. Administrators write these; nothing of a tenant is read here."""

from __future__ import annotations

import os
from dataclasses import replace

from csi.errors import InvalidVolumeError
from csi.registry_hosts import MAX_FILE_BYTES, RegistryHost, directory_names, own_host, parse_hosts_toml


def read_hosts(config_dir: str, registry: str) -> tuple[RegistryHost, ...]:
    """The hosts for `registry`, with the texts of their certificates and keys; empty where nothing is configured.

    Raises: InvalidVolumeError naming the file.
    """
    for name in directory_names(registry):
        directory = os.path.join(config_dir, name)
        if os.path.isdir(directory):
            break
    else:
        return ()
    text = _read(os.path.join(directory, "hosts.toml"), missing_is_empty=True)
    hosts = parse_hosts_toml(text, registry, directory) if text.strip() else _of_certificates(registry, directory)
    return tuple(
        replace(
            host,
            ca=tuple(_read(path) for path in host.ca),
            client=tuple((_read(cert), _read(key) if key else "") for cert, key in host.client),
        )
        for host in hosts
    )


def _of_certificates(registry: str, directory: str) -> tuple[RegistryHost, ...]:
    """Docker's habit: `*.crt` are CAs, `*.cert` with `*.key` client certificates, for the registry itself."""
    names = sorted(os.listdir(directory))
    ca = tuple(os.path.join(directory, name) for name in names if name.endswith(".crt"))
    client = []
    for name in names:
        if name.endswith(".cert"):
            key = f"{name.removesuffix('.cert')}.key"
            client.append((os.path.join(directory, name), os.path.join(directory, key) if key in names else ""))
    return (replace(own_host(registry), ca=ca, client=tuple(client)),) if ca or client else ()


def _read(path: str, *, missing_is_empty: bool = False) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError as exc:
        if missing_is_empty:
            return ""
        raise _unreadable(path, str(exc.strerror)) from exc
    except OSError as exc:
        raise _unreadable(path, str(exc.strerror)) from exc
    except UnicodeDecodeError:
        raise _unreadable(path, "is not text") from None
    if len(text) > MAX_FILE_BYTES:
        raise _unreadable(path, f"is larger than {MAX_FILE_BYTES} bytes")
    return text


def _unreadable(path: str, reason: str) -> InvalidVolumeError:
    return InvalidVolumeError(f"{path}: cannot be used: {reason}", field="registry-config-dir")
