"""Every artifact of the collection, read without a mount."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from formats.artifacts import ARTIFACTS, Artifact
from formats.reading import shown_by


@pytest.mark.parametrize("make", ARTIFACTS.values(), ids=ARTIFACTS)
def test_what_a_producer_wrote_is_what_is_shown(make: Callable[[], Artifact]) -> None:
    found = make()
    assert shown_by(found) == found.shows
