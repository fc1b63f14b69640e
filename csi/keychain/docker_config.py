"""docker's configuration file with its credential helpers (`docker-credential-*`).

    credHelpers   the helper of one registry; it alone is asked for that registry
    credsStore    the helper of all others
    auths         logins in the file itself

Source: docker cli config/configfile, docker-credential-helpers' protocol (`get`: a server's address on stdin, a JSON
object with Username and Secret on stdout).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from typing import Any

from csi.credentials import Credential, Credentials, helper_answer, json_object, of_docker_config, registry_key, united
from csi.errors import InvalidVolumeError, RegistryUnavailableError
from csi.keychain.programs import run

_HELPER_TIMEOUT_S = 20.0
_HELPER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MAX_CONFIG_BYTES = 1024 * 1024
_DOCKER_HUB_SERVER = "https://index.docker.io/v1/"


def default_config() -> str:
    """The file docker itself uses."""
    directory = os.environ.get("DOCKER_CONFIG") or os.path.join(os.path.expanduser("~"), ".docker")
    return os.path.join(directory, "config.json")


def configured(path: str, registry: str, repository: str, *, may_be_missing: bool = False) -> Credentials:
    """The candidates of the file at `path` for one repository; it is read anew each time. A helper is run for this
    registry only.

    Raises: InvalidVolumeError for a file that cannot be used, RegistryUnavailableError for a helper that fails.
    """
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read(_MAX_CONFIG_BYTES + 1)
    except OSError as exc:
        if may_be_missing and isinstance(exc, FileNotFoundError | NotADirectoryError):
            return ()
        raise InvalidVolumeError(f"{path}: cannot be read: {exc.strerror}", field="registry-config") from exc
    document = json_object(text, path)
    written = of_docker_config(text, path).candidates(registry, repository)
    helper, is_own = _helper_of(document, registry, path)
    found = _ask(helper, registry) if helper else None
    if is_own:
        return () if found is None else (found,)
    return united(() if found is None else (found,), written)


def _helper_of(document: dict[str, Any], registry: str, path: str) -> tuple[str, bool]:
    """Its name, and whether it is this registry's own; empty for none."""
    own = document.get("credHelpers") or {}
    store = document.get("credsStore") or ""
    if not isinstance(own, dict) or not isinstance(store, str) or not all(isinstance(one, str) for one in own.values()):
        raise InvalidVolumeError(f"{path}: credHelpers or credsStore is malformed", field="registry-config")
    wanted = {registry, "index.docker.io"} if registry == "docker.io" else {registry}
    for server, helper in own.items():
        if registry_key(server) in wanted:
            return _checked(helper, path), True
    return (_checked(store, path), False) if store else ("", False)


def _checked(name: str, path: str) -> str:
    if not _HELPER_NAME.fullmatch(name):
        raise InvalidVolumeError(
            f"{path}: {name[:40]!r} is not the name of a credential helper", field="registry-config"
        )
    return name


def _ask(helper: str, registry: str) -> Credential | None:
    """None when the helper knows nobody for the registry: it says so with a status other than 0, as for any trouble, so
    its text is looked at.
    """
    program = shutil.which(f"docker-credential-{helper}")
    if program is None:
        raise RegistryUnavailableError(
            f"docker-credential-{helper}: is not in the PATH of this process; install it there, or take {helper!r} out of "
            "the configuration"
        )
    server = _DOCKER_HUB_SERVER if registry == "docker.io" else registry
    output, status = run([program, "get"], f"{server}\n".encode(), _HELPER_TIMEOUT_S)
    if status != 0:
        if b"credentials not found" in output.lower():
            return None
        raise RegistryUnavailableError(
            f"docker-credential-{helper}: ended with status {status} for {registry}; run it by hand to see why"
        )
    try:
        answer = json.loads(output)
        username, secret = answer["Username"], answer["Secret"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise RegistryUnavailableError(
            f"docker-credential-{helper}: its answer is not what the protocol says"
        ) from None
    if not isinstance(username, str) or not isinstance(secret, str):
        raise RegistryUnavailableError(f"docker-credential-{helper}: its answer is not what the protocol says")
    return helper_answer(username, secret) if secret else None
