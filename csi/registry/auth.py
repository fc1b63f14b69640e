"""What to send a registry that wants to know who asks: nothing, Basic, or a token (`token_auth`).

Challenges are parsed by RFC 9110, section 11.6.1.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

_MAX_HEADER = 8192
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # noqa: S105
_PARAMETER = re.compile(rf'\s*({_TOKEN})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|({_TOKEN}))\s*')
_SCHEME = re.compile(rf"\s*({_TOKEN})(?=\s|,|$)")


@dataclass(frozen=True, slots=True)
class Credentials:
    """A registry user. The password is in no repr."""

    username: str
    password: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Challenge:
    """One scheme of a WWW-Authenticate header, lower case, with its parameters (names lower case)."""

    scheme: str
    parameters: Mapping[str, str]


class Authenticator(Protocol):
    """Thread-safe. Asked before a request, told after a 401."""

    def authorization(self) -> str | None:
        """The Authorization header for the registry itself, None to ask anonymously."""

    def has_credentials(self) -> bool:
        """Whether somebody has logged in."""

    def on_challenge(self, challenges: list[Challenge], refused: str | None) -> bool:
        """A 401 came with these for a request that carried `refused`. True when the request is worth repeating."""

    def replace(self, credentials: Credentials | None) -> None:
        """Use other credentials from now on."""


class BasicAuthenticator:
    """Sends Basic credentials with every request to the registry, as they are wanted on each anyway."""

    def __init__(self, credentials: Credentials | None) -> None:
        self._credentials = credentials

    def authorization(self) -> str | None:
        """See `Authenticator`."""
        held = self._credentials
        if held is None:
            return None
        return "Basic " + base64.b64encode(f"{held.username}:{held.password}".encode()).decode()

    def has_credentials(self) -> bool:
        """See `Authenticator`."""
        return self._credentials is not None

    def on_challenge(self, challenges: list[Challenge], refused: str | None) -> bool:
        """Nothing better can be offered."""
        return False

    def replace(self, credentials: Credentials | None) -> None:
        """See `Authenticator`."""
        self._credentials = credentials


def parse_challenges(header: str) -> list[Challenge]:
    """The challenges of a WWW-Authenticate header. What cannot be parsed ends the list; never raises."""
    challenges: list[Challenge] = []
    text, position = header[:_MAX_HEADER], 0
    while position < len(text):
        scheme = _SCHEME.match(text, position)
        if scheme is None:
            break
        position = scheme.end()
        parameters: dict[str, str] = {}
        while parameter := _PARAMETER.match(text, position):
            quoted, plain = parameter[2], parameter[3]
            parameters[parameter[1].lower()] = re.sub(r"\\(.)", r"\1", quoted) if quoted is not None else plain
            position = parameter.end()
            comma = re.compile(r",\s*").match(text, position)
            if comma is None:
                break
            position = comma.end()
            if _PARAMETER.match(text, position) is None:
                break  # the next scheme
        challenges.append(Challenge(scheme[1].lower(), parameters))
        separator = re.compile(r"[\s,]*").match(text, position)
        position = separator.end() if separator else len(text)
    return challenges
