"""`loads_strict`: one meaning or our own error, in linear time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from csi.errors import SizeMismatchError, UnsupportedModelError
from csi.oci.strict_json import loads_strict

_LIMIT = 4 * 1024 * 1024

_scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(st.characters(codec="utf-8"))
_values = st.recursive(
    _scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)


def load(data: bytes) -> dict[str, Any]:
    return loads_strict(data, "subject", _LIMIT)


def outcome(data: bytes) -> dict[str, Any] | UnsupportedModelError:
    try:
        return load(data)
    except UnsupportedModelError as error:
        return error


@given(st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), _values, max_size=6))
def test_what_json_writes_is_read_back(value: dict[str, Any]) -> None:
    assert load(json.dumps(value).encode()) == value
    assert load(json.dumps(value, ensure_ascii=False).encode()) == value


@given(st.binary(max_size=200) | st.text(alphabet='{}[]":,\\u0d8e1-. \n', max_size=200).map(str.encode))
@example(b"[" * 200_000)
@example(b'{"a":' * 200_000)
@example(b'{"a":"' + b"[" * 1000)
def test_any_bytes_give_an_object_or_our_error(data: bytes) -> None:
    value = outcome(data)
    if isinstance(value, UnsupportedModelError):
        assert str(value).startswith("subject: ")
        assert len(str(value)) < 500
    else:
        assert isinstance(value, dict)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"{} {}", "not valid JSON"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b'{"a": 1, "a": 1}', "'a' appears twice"),
        (b'{"o": {"b": 1, "\\u0062": 2}}', "'b' appears twice"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": Infinity}', "Infinity is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": 9223372036854775808}', "outside 64 bits"),
        (b'{"a": -9223372036854775809}', "outside 64 bits"),
        (b'{"a": ' + b"9" * 100_000 + b"}", "outside 64 bits"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b'{"a": "\xed\xa0\x80"}', "not UTF-8"),
        (b'{"a": "\\ud800"}', "half a surrogate pair"),
        (b'{"\\udc00": 1}', "half a surrogate pair"),
        (b"[]", "a JSON list, expected an object"),
        (b"null", "a JSON NoneType, expected an object"),
        (b"{'a': 1}", "not valid JSON"),
        (b'{"a": "\n"}', "not valid JSON"),
    ],
)
def test_ambiguous_or_broken_documents_are_refused(data: bytes, problem: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"^subject: ") as caught:
        load(data)
    assert problem in str(caught.value)


def test_limits_of_numbers_and_escaped_pairs_are_accepted() -> None:
    assert load(b'{"a": 9223372036854775807, "b": -9223372036854775808, "c": 1.5e300}')["a"] == 2**63 - 1
    assert load(b'{"a": "\\ud83d\\ude00 \\\\ud800"}')["a"] == "\U0001f600 \\ud800"


def test_depth_is_counted_outside_strings_only() -> None:
    assert load(b'{"a": "' + b"[" * 1000 + b'"}')
    assert load(b'{"a": ' + b"[" * 63 + b"]" * 63 + b"}")
    with pytest.raises(UnsupportedModelError, match="nested deeper than 64"):
        load(b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}")


def test_size_limit_is_inclusive_and_carries_the_numbers() -> None:
    assert loads_strict(b"{}", "subject", 2) == {}
    with pytest.raises(SizeMismatchError, match="subject: 3 bytes, the limit is 2") as caught:
        loads_strict(b"{ }", "subject", 2)
    assert caught.value.fields == {"expected": 2, "actual": 3, "subject": "subject"}


@pytest.mark.parametrize(
    "hostile",
    [
        lambda length: b"[" * 65 + b'"' + b'\\"' * (length // 2),
        lambda length: b"[" * 65 + b'"' + b'\\"' * (length // 2) + b"\\",
        lambda length: b'"' * length,
        lambda length: b"[" * length,
        lambda length: b"[]" * (length // 2),
        lambda length: b'{"a":"' + b"\\\\" * (length // 2) + b'"' + b"[" * 70,
    ],
    ids=["open string of quotes", "open escape", "quotes", "deep", "wide", "backslashes"],
)
def test_hostile_documents_take_linear_work(hostile: Callable[[int], bytes]) -> None:
    """The processor time of this thread, so that a busy machine does not count: sixteen times the bytes, not 256 times the work."""
    short, long = (min(cpu_of_refusal(hostile(length)) for _ in range(3)) for length in (1 << 17, 1 << 21))
    assert long < 64 * short + 0.05


def cpu_of_refusal(data: bytes) -> float:
    began = time.thread_time()
    with pytest.raises(UnsupportedModelError):
        load(data)
    return time.thread_time() - began
