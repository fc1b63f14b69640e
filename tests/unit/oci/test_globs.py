"""Patterns for files, against the definition and against patience."""

from __future__ import annotations

import pytest

from csi.errors import InvalidVolumeError
from csi.oci.globs import Globs


@pytest.mark.parametrize(
    ("pattern", "fits", "not_fits"),
    [
        ("*.json", ["a.json", ".json"], ["a/b.json", "a.jsonl"]),
        ("**/*.json", ["a.json", "a/b.json", "a/b/c.json"], ["a/b"]),
        ("onnx/**", ["onnx/a", "onnx/b/c"], ["onnxx/a", "a/onnx/b"]),
        ("a/**/z", ["a/z", "a/b/z", "a/b/c/z"], ["a/b", "z", "a/z/b"]),
        ("**", ["a", "a/b/c"], []),
        ("**/**/x", ["x", "a/x", "a/b/x"], ["x/a"]),
        ("model-0000?-of-*", ["model-00001-of-00002.safetensors"], ["model-00011-of-2"]),
        ("[ab]*.bin", ["a1.bin", "b.bin"], ["c.bin"]),
        ("[!a].bin", ["b.bin"], ["a.bin"]),
        ("./a", ["a"], ["b/a"]),
        ("a*, b", ["abc", "b"], ["c"]),
    ],
)
def test_what_patterns_fit(pattern: str, fits: list[str], not_fits: list[str]) -> None:
    globs = Globs.parse(pattern)
    assert [path for path in fits + not_fits if globs.match(path)] == fits


@pytest.mark.parametrize("text", ["", "a,,b", "/a", "a//b", "../x", "a/./b", "a/..", "x" * 513, ",".join(["a"] * 65)])
def test_patterns_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(InvalidVolumeError) as caught:
        Globs.parse(text)
    assert caught.value.fields["field"] == "files"


def test_equal_patterns_are_equal() -> None:
    assert Globs.parse("a, b") == Globs.parse("a,b")
    assert Globs.parse("a") != Globs.parse("b")
    assert not Globs()


def test_a_malicious_pattern_gains_nothing() -> None:
    globs = Globs.parse("/".join(["**", "*a*a*a*a*a*a*a*b"] * 16))
    assert not globs.match("/".join(["a" * 255] * 16))
