"""JSON from strangers: one meaning or none.

Parsers disagree about duplicate keys, NaN, huge numbers and half surrogates, and whoever makes two programs read one
document differently has bypassed what the first of them checked. So all of that is refused, and so is anything large
or deep. Time and memory are linear in the size of the document, whatever is in it.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from csi.errors import SizeMismatchError, UnsupportedModelError

_MAX_DEPTH = 64
_MAX_INT = 2**63
_HALF_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def loads_strict(data: bytes, what: str, limit_bytes: int) -> dict[str, Any]:
    """The JSON object in `data` (UTF-8). `what` is the subject of error messages. Its texts can all be encoded again.

    Raises: SizeMismatchError over `limit_bytes`; UnsupportedModelError for anything but one unambiguous object.
    """
    if len(data) > limit_bytes:
        raise SizeMismatchError(
            f"{what}: {len(data)} bytes, the limit is {limit_bytes}",
            expected=limit_bytes,
            actual=len(data),
            subject=what,
        )
    if _depth_exceeds(data, _MAX_DEPTH):
        raise UnsupportedModelError(f"{what}: JSON nested deeper than {_MAX_DEPTH} levels")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_int=_bounded_int,
            parse_float=_finite_float,
        )
        if _HALF_SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as exc:
        raise UnsupportedModelError(f"{what}: not UTF-8 at byte {exc.start}") from exc
    except UnicodeEncodeError as exc:
        raise UnsupportedModelError(f"{what}: has half a surrogate pair in a text, which is not Unicode") from exc
    except (ValueError, RecursionError) as exc:
        raise UnsupportedModelError(f"{what}: not valid JSON: {str(exc)[:200]}") from exc
    if not isinstance(value, dict):
        raise UnsupportedModelError(f"{what}: a JSON {type(value).__name__}, expected an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key[:80]!r} appears twice in one object")
        result[key] = value
    return result


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _bounded_int(text: str) -> int:
    if len(text) > 20 or not -_MAX_INT <= int(text) < _MAX_INT:
        raise ValueError(f"number {text[:24]} is outside 64 bits")
    return int(text)


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number {text[:24]} is too large")
    return value


# Possessive, and an open string runs to the end of the data: with backtracking, an open string full of escaped quotes
# took quadratic time (hours for 4 MiB).
_STRING = re.compile(rb'"(?:[^"\\]++|\\.?)*+"?', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")


def _depth_exceeds(data: bytes, limit: int) -> bool:
    """Counts brackets outside strings, so that the parser itself never recurses deeper."""
    if data.count(b"[") + data.count(b"{") <= limit:
        return False
    depth = 0
    for bracket in _BRACKET.findall(_STRING.sub(b"", data)):
        depth += 1 if bracket in b"[{" else -1
        if depth > limit:
            return True
    return False
