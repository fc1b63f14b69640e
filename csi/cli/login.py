"""Who a person is to a registry: the flags, and docker's own configuration file. Passwords come from stdin or a prompt,
never from an argument.
"""

from __future__ import annotations

import argparse
import getpass
import sys

from csi.credentials import Credential, Credentials
from csi.errors import InvalidVolumeError
from csi.keychain.docker_config import configured, default_config
from csi.oci.reference import Reference
from csi.registry_hosts import RegistryHost
from csi.supervisor.hosts import read_hosts


def add_flags(parser: argparse.ArgumentParser) -> None:
    """`--username`, `--password-stdin` and `--registry-config`."""
    parser.add_argument("--username", help="registry user (default: who 'docker login' logged in)")
    parser.add_argument("--password-stdin", action="store_true", help="read the registry password from stdin")
    parser.add_argument(
        "--registry-config",
        metavar="FILE",
        help="docker's configuration file with logins (default $DOCKER_CONFIG/config.json or ~/.docker/config.json)",
    )


def add_hosts_flag(parser: argparse.ArgumentParser) -> None:
    """`--registry-config-dir`."""
    parser.add_argument(
        "--registry-config-dir",
        metavar="DIR",
        help="containerd's hosts.toml files: mirrors and certificates of registries, as a node uses them (default none)",
    )


def hosts_of(args: argparse.Namespace, reference: Reference) -> tuple[RegistryHost, ...]:
    """Who serves the registry; empty for the registry itself. Raises: InvalidVolumeError naming the file."""
    if args.registry_config_dir is None or reference.is_layout:
        return ()
    return read_hosts(args.registry_config_dir, reference.registry)


def credentials_of(args: argparse.Namespace, reference: Reference) -> Credentials:
    """The user on the command line, else what the configuration file and its helpers have for the repository; empty for
    anonymous.

    Raises: InvalidVolumeError for half a login, or a configuration file that cannot be used; RegistryUnavailableError for
    a helper that fails.
    """
    if not args.username:
        if args.password_stdin:
            raise InvalidVolumeError("--password-stdin needs --username", field="username")
        if reference.is_layout:
            return ()
        return configured(
            args.registry_config or default_config(),
            reference.registry,
            reference.repository,
            may_be_missing=args.registry_config is None,
        )
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
