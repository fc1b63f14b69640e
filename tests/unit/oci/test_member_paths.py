"""`check_member_path`: plain relative names and nothing else."""

from __future__ import annotations

import posixpath

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from csi.errors import UnsupportedModelError
from csi.oci.paths import check_member_path

_names = st.text(st.characters(), max_size=60) | st.text(alphabet="./\\ab\0\n\x9b\ud800é", max_size=12)


def outcome(text: str) -> str | UnsupportedModelError:
    try:
        return check_member_path(text, "layers[0]")
    except UnsupportedModelError as error:
        return error


@given(_names)
@example("a/" * 5000)
@example("../" * 5000)
def test_any_text_gives_a_safe_path_or_our_error(text: str) -> None:
    path = outcome(text)
    if isinstance(path, UnsupportedModelError):
        assert str(path).startswith("layers[0]: file name ")
        assert str(path).isprintable()
        assert len(str(path)) < 1200
        return
    assert posixpath.normpath(path) == path
    assert not path.startswith(("/", "../"))
    assert path.isprintable() or not any(ord(c) < 0xA0 for c in path if not c.isprintable())
    assert all(0 < len(segment) <= 255 for segment in path.encode().split(b"/"))
    assert check_member_path(path, "again") == path


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("model.safetensors", "model.safetensors"),
        ("./config.json", "config.json"),
        ("././a/b", "a/b"),
        ("a..b", "a..b"),
        ("..a/b..", "..a/b.."),
        ("...", "..."),
        (".hidden", ".hidden"),
        ("modèle/重み.bin", "modèle/重み.bin"),
        ("with blank.bin", "with blank.bin"),
        ("x" * 255, "x" * 255),
        ("/".join(["d"] * 64), "/".join(["d"] * 64)),
    ],
)
def test_plain_names_pass(text: str, path: str) -> None:
    assert check_member_path(text, "file") == path


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "is empty"),
        ("./", "is empty"),
        ("/etc/passwd", "is absolute"),
        (".//etc/passwd", "is absolute"),
        ("..", "leads out of the model"),
        ("../x", "leads out of the model"),
        ("a/../b", "leads out of the model"),
        ("a/./b", "empty or '.' segment"),
        ("a//b", "empty or '.' segment"),
        ("a/", "empty or '.' segment"),
        (".", "empty or '.' segment"),
        ("a\0b", "control characters"),
        ("a\nb", "control characters"),
        ("a\x7fb", "control characters"),
        ("a\x9bb", "control characters"),
        ("a\\b", "backslash"),
        ("a\ud800", "not valid Unicode"),
        ("x" * 256, "a segment of 256 bytes, more than 255"),
        ("é" * 128, "a segment of 256 bytes, more than 255"),
        ("/".join(["d" * 200] * 21), "has 4220 bytes, more than 4096"),
        ("/".join(["d"] * 65), "is 65 levels deep, more than 64"),
    ],
)
def test_refusals_name_the_path_and_the_rule(text: str, rule: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        check_member_path(text, "layers[3]")
    assert rule in str(caught.value)
    assert str(caught.value).startswith("layers[3]: file name ")
    assert str(caught.value.fields["path"]) in text
