"""What registries say in headers, parsed. Nothing here raises, whatever the text is, and time is linear in its length.

Source: RFC 9110, sections 10.2.3 (Retry-After), 11.6.1 (WWW-Authenticate) and 14.4 (Content-Range).
"""

from __future__ import annotations

import email.utils
import re
from collections.abc import Mapping
from dataclasses import dataclass

_MAX_HEADER = 8192
_MAX_CHALLENGES = 16
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]++"  # noqa: S105
# Possessive: an open quote must not be tried again from every backslash in it.
_PARAMETER = re.compile(rf'[ \t]*+({_TOKEN})[ \t]*+=[ \t]*+(?:"((?:[^"\\]|\\.)*+)"|({_TOKEN}))[ \t]*+')
_SCHEME = re.compile(rf"[\s,]*+({_TOKEN})(?=[\s,]|$)")
_COMMA = re.compile(r",[\s,]*+")
_QUOTED_PAIR = re.compile(r"\\(.)")
_CONTENT_RANGE = re.compile(r"\s*+(?:bytes\s++)?(\d{1,19})-(\d{1,19})/(\d{1,19}|\*)\s*+", re.ASCII)


@dataclass(frozen=True, slots=True)
class Challenge:
    """One scheme of a WWW-Authenticate header, lower case, with its parameters (names lower case)."""

    scheme: str
    parameters: Mapping[str, str]


def parse_challenges(header: str) -> list[Challenge]:
    """The challenges of a WWW-Authenticate header, at most 16. What cannot be parsed ends the list.

    Several headers of that name are one with commas between. A parameter that is named twice keeps its first value.
    """
    challenges: list[Challenge] = []
    text, position = header[:_MAX_HEADER], 0
    while len(challenges) < _MAX_CHALLENGES and (scheme := _SCHEME.match(text, position)):
        position = scheme.end()
        parameters: dict[str, str] = {}
        while parameter := _PARAMETER.match(text, position):
            quoted, plain = parameter[2], parameter[3]
            value = _QUOTED_PAIR.sub(r"\1", quoted) if quoted is not None else plain
            parameters.setdefault(parameter[1].lower(), value)
            position = parameter.end()
            comma = _COMMA.match(text, position)
            if comma is None:
                break
            position = comma.end()
        challenges.append(Challenge(scheme[1].lower(), parameters))
    return challenges


def parse_content_range(header: str) -> tuple[int, int, int | None] | None:
    """First byte, last byte and total (None for `*`) of a Content-Range; None when it is not one.

    A missing `bytes ` is tolerated: at least one widespread registry has left it out.
    """
    match = _CONTENT_RANGE.fullmatch(header)
    if match is None:
        return None
    first, last = int(match[1]), int(match[2])
    total = None if match[3] == "*" else int(match[3])
    if first > last or (total is not None and last >= total):
        return None
    return first, last, total


def parse_retry_after(header: str, now: float) -> float | None:
    """Seconds to wait, from a number or an HTTP date; None for anything else. Never negative."""
    text = header.strip()[:64]
    if text.isascii() and text.isdigit():
        return float(int(text))
    try:
        when = email.utils.parsedate_to_datetime(text)
        return max(0.0, when.timestamp() - now)
    except (TypeError, ValueError, OverflowError, OSError, IndexError):
        return None


def parse_size(header: str | None) -> int | None:
    """A Content-Length; None when it is not a number."""
    return int(header) if header and header.isascii() and header.isdigit() and len(header) < 20 else None
