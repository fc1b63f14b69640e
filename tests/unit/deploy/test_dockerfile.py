"""Facts of the image that a build alone does not show."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
FINAL_STAGE = DOCKERFILE.rpartition("\nFROM ")[2]


def test_the_base_image_is_an_argument_pinned_by_digest() -> None:
    assert re.search(r"^ARG BASE=\S+@sha256:[0-9a-f]{64}$", DOCKERFILE, re.MULTILINE)
    assert set(re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)) == {"${BASE}"}


def test_it_runs_as_nobody_in_particular_under_an_init() -> None:
    assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", FINAL_STAGE, re.MULTILINE)
    assert 'ENTRYPOINT ["/usr/bin/tini", "--", "modelmount"]' in FINAL_STAGE


def test_the_final_stage_installs_nothing_to_build_with() -> None:
    assert not re.search(r"\b(gcc|\S+-dev|python3-venv|pip)\b", FINAL_STAGE)


def test_every_file_the_build_copies_reaches_it() -> None:
    """`.dockerignore` leaves everything out but what is listed."""
    allowed = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE))
    for line in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE):
        for name in line.split():
            assert name in allowed, name
            assert (ROOT / name).exists(), name
