"""Sizes as people write them."""

from __future__ import annotations

import pytest

from csi.quantity import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("500GB", 500 * 10**9), ("2TiB", 2 * 2**40), ("1.5g", 1_500_000_000), ("64 Mi", 64 * 2**20), ("7B", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "5 apples", "1e9", "1PB", "iB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no size"):
        parse_size(text)
