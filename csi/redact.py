"""The last line of defence between a secret and a log line or an error message.

The first is that secrets are never put there. This one finds what looks like one all the same, in a text that somebody
else wrote (a library's exception, a registry's answer): Authorization headers, JSON web tokens, user info and queries of
URLs. Standard library only. Safe on JSON: what it replaces has no quotes in it.
"""

from __future__ import annotations

import re

REDACTED = "***"

_PATTERNS = (
    (re.compile(r"\b(Basic|Bearer)(\s+)[A-Za-z0-9+/=._~-]{6,}", re.IGNORECASE), rf"\1\2{REDACTED}"),
    (re.compile(r"\beyJ[A-Za-z0-9_-]{6,}\.[A-Za-z0-9_-]{6,}(?:\.[A-Za-z0-9_-]*)?"), REDACTED),
    (re.compile(r"(\b[a-z][a-z0-9+.-]{1,20}://)[^/\s@\"'\\]+@"), rf"\1{REDACTED}@"),
    (re.compile(r"(\bhttps?://[^\s?\"'\\]{1,2000})\?[^\s\"'\\]+"), rf"\1?{REDACTED}"),
)


def scrub(text: str) -> str:
    """`text` without what looks like a secret. Scrubbing twice changes nothing more."""
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text
