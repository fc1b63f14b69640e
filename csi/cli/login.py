"""The flags with which a person logs in to a registry. Passwords come from stdin or a prompt, never from an argument."""

from __future__ import annotations

import argparse
import getpass
import sys

from csi.errors import InvalidVolumeError
from csi.oci.reference import Reference


def add_flags(parser: argparse.ArgumentParser) -> None:
    """`--username` and `--password-stdin`."""
    parser.add_argument("--username", help="registry user")
    parser.add_argument("--password-stdin", action="store_true", help="read the registry password from stdin")


def credentials_of(args: argparse.Namespace, reference: Reference) -> dict[str, str] | None:
    """`username` and `password`, or None for anonymous. Raises: InvalidVolumeError for half a login."""
    if not args.username:
        if args.password_stdin:
            raise InvalidVolumeError("--password-stdin needs --username", field="username")
        return None
    if reference.is_layout:
        raise InvalidVolumeError("--username: a directory needs no credentials", field="username")
    if args.password_stdin:
        password = sys.stdin.readline().rstrip("\r\n")
    elif sys.stdin.isatty():
        password = getpass.getpass("registry password: ")
    else:
        raise InvalidVolumeError("--username needs --password-stdin (or a terminal to ask on)", field="password")
    if not password:
        raise InvalidVolumeError("the password is empty", field="password")
    return {"username": args.username, "password": password}
