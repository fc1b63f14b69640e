"""Sizes as people write them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of `500GB`, `1.5Ti`, `100000`. Raises: ValueError for anything else."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"{text[:40]!r} is no size; write 500GB, 2TiB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2].upper()])
