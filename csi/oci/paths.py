"""Names of files inside a model: what may become a path in a mounted tree, and what may not."""

from __future__ import annotations

import re

from csi.errors import UnsupportedModelError

_MAX_PATH_BYTES = 4096
_MAX_COMPONENT_BYTES = 255
_MAX_DEPTH = 64
# What almost every name looks like: nothing below needs to look at it again. No segment begins with a dot.
_PLAIN_LENGTH = 250
_PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._+=@ -]*+(?:/[A-Za-z0-9_-][A-Za-z0-9._+=@ -]*+){0,30}+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def check_member_path(text: str, what: str) -> str:
    """`text` as a relative path, leading `./` removed. `what` names the layer or entry in error messages.

    Tested by segment, so that a name such as `a..b` stays legal. Lengths are of the UTF-8 form: 255 bytes a segment,
    4096 the whole, 64 segments.

    Raises: UnsupportedModelError (field `path`) for an absolute path, a `.`, `..` or empty segment, NUL, control
    characters (also the 8-bit ones, which terminals obey), a backslash, text that is not valid Unicode, or anything
    too long or too deep.

    Source: the rules that tar extractors and OCI clients arrived at after their path-traversal advisories; NAME_MAX
    and PATH_MAX of Linux.
    """
    if len(text) <= _PLAIN_LENGTH and _PLAIN.fullmatch(text):
        return text
    path = text
    while path.startswith("./"):
        path = path[2:]
    problem = _problem(path)
    if problem:
        raise UnsupportedModelError(
            f"{what}: file name {text[:200]!r} {problem}; the model must be packed again with plain relative names",
            path=text[:200],
        )
    return path


def _problem(path: str) -> str | None:
    if not path:
        return "is empty"
    if path.startswith("/"):
        return "is absolute"
    if _CONTROL.search(path):
        return "has control characters"
    if "\\" in path:
        return "has a backslash"
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        return "is not valid Unicode"
    if len(encoded) > _MAX_PATH_BYTES:
        return f"has {len(encoded)} bytes, more than {_MAX_PATH_BYTES}"
    segments = encoded.split(b"/")
    if len(segments) > _MAX_DEPTH:
        return f"is {len(segments)} levels deep, more than {_MAX_DEPTH}"
    for segment in segments:
        if segment == b"..":
            return "leads out of the model with '..'"
        if segment in (b"", b"."):
            return "has an empty or '.' segment"
        if len(segment) > _MAX_COMPONENT_BYTES:
            return f"has a segment of {len(segment)} bytes, more than {_MAX_COMPONENT_BYTES}"
    return None
