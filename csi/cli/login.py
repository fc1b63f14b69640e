"""Who a person is to a registry: the flags, and docker's own configuration file. Passwords come from stdin or a prompt,
never from an argument.
"""

from __future__ import annotations

import argparse
import getpass
import os
import sys

from csi.credentials import Credential, Credentials, Keyring, of_docker_config
from csi.errors import InvalidVolumeError
from csi.oci.reference import Reference


def add_flags(parser: argparse.ArgumentParser) -> None:
    """`--username`, `--password-stdin` and `--registry-config`."""
    parser.add_argument("--username", help="registry user (default: who 'docker login' logged in)")
    parser.add_argument("--password-stdin", action="store_true", help="read the registry password from stdin")
    parser.add_argument(
        "--registry-config",
        metavar="FILE",
        help="docker's configuration file with logins (default $DOCKER_CONFIG/config.json or ~/.docker/config.json)",
    )


def credentials_of(args: argparse.Namespace, reference: Reference) -> Credentials:
    """The user on the command line, else what the configuration file has for the repository; empty for anonymous.

    Raises: InvalidVolumeError for half a login, or a configuration file that cannot be used.
    """
    if not args.username:
        if args.password_stdin:
            raise InvalidVolumeError("--password-stdin needs --username", field="username")
        if reference.is_layout:
            return ()
        return _configured(args.registry_config).candidates(reference.registry, reference.repository)
    if reference.is_layout:
        raise InvalidVolumeError("--username: a directory needs no credentials", field="username")
    if ":" in args.username:
        raise InvalidVolumeError("--username: has a ':', which Basic authentication cannot express", field="username")
    if args.password_stdin:
        password = sys.stdin.readline().rstrip("\r\n")
    elif sys.stdin.isatty():
        password = getpass.getpass("registry password: ")
    else:
        raise InvalidVolumeError("--username needs --password-stdin (or a terminal to ask on)", field="password")
    if not password:
        raise InvalidVolumeError("the password is empty", field="password")
    return (Credential(args.username, password),)


def _configured(path: str | None) -> Keyring:
    """A file that was not asked for may be missing."""
    directory = os.environ.get("DOCKER_CONFIG") or os.path.join(os.path.expanduser("~"), ".docker")
    file = path or os.path.join(directory, "config.json")
    try:
        with open(file, encoding="utf-8", errors="replace") as opened:
            text = opened.read()
    except OSError as exc:
        if path is None and isinstance(exc, FileNotFoundError | NotADirectoryError):
            return Keyring()
        raise InvalidVolumeError(f"{file}: cannot be read: {exc.strerror}", field="registry-config") from exc
    return of_docker_config(text, file)
