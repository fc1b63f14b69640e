"""Which repositories a StorageClass lets its claims name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi.driver.provisioner import check_name, is_allowed, parse_allowed, volume_id_of
from csi.errors import InvalidVolumeError
from csi.oci.reference import Reference


@pytest.mark.parametrize(
    ("pattern", "reference", "allowed"),
    [
        ("r.io/team/model", "r.io/team/model:v1", True),
        ("r.io/team/model", "r.io/team/model-x:v1", False),
        ("r.io/team/model", "r.io/team/model/sub:v1", False),
        ("r.io/team/*", "r.io/team/model:v1", True),
        ("r.io/team/*", "r.io/team/a/b:v1", True),
        ("r.io/team/*", "r.io/team:v1", False),
        ("r.io/team/*", "r.io/teams/model:v1", False),
        ("r.io/*", "r.io/anything:v1", True),
        ("r.io/*", "r.io:5000/anything:v1", False),
        ("r.io/*", "r.io.evil.example/anything:v1", False),
        ("a.io/x, b.io/y\n c.io/*", "c.io/z:v1", True),
        ("a.io/x,b.io/y", "b.io/y@sha256:" + "0" * 64, True),
        ("localhost:5000/*", "localhost:5000/m:1", True),
    ],
)
def test_a_pattern_lists_a_repository_or_everything_below(pattern: str, reference: str, allowed: bool) -> None:
    assert is_allowed(Reference.parse(reference), parse_allowed(pattern)) is allowed


@pytest.mark.parametrize(
    "pattern", ["*", "*.io/x", "r.io/*/x", "r.io/a*", "r.io/../x", "R.io/x", "https://r.io/x", "/x"]
)
def test_a_pattern_that_could_mean_more_than_it_says_is_refused(pattern: str) -> None:
    with pytest.raises(InvalidVolumeError, match="allowedRepositories"):
        parse_allowed(pattern)


@given(st.text(max_size=200))
def test_a_name_is_refused_or_becomes_an_id_that_is_a_label(name: str) -> None:
    try:
        check_name(name)
    except InvalidVolumeError:
        return
    except UnicodeEncodeError:  # a lone surrogate: protobuf has refused it before
        return
    volume_id = volume_id_of(name)
    assert len(volume_id) <= 63
    assert volume_id.removeprefix("mv-").isalnum()


@given(st.text(min_size=1, max_size=60))
def test_patterns_parse_or_are_refused(text: str) -> None:
    try:
        patterns = parse_allowed(text)
    except InvalidVolumeError:
        return
    assert patterns
    assert all(pattern.count("*") <= 1 for pattern in patterns)
