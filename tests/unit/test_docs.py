"""The pages say what the code does: no error, health reason or link without its place."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from csi.driver import health
from csi.driver.status_map import status_of
from csi.errors import all_error_classes

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


@pytest.mark.parametrize("name", sorted(all_error_classes()))
def test_every_error_has_an_entry_with_its_code(name: str) -> None:
    rows = [line for line in (DOCS / "troubleshoot.md").read_text(encoding="utf-8").splitlines() if f" {name}" in line]
    code = status_of(all_error_classes()[name]("x")).name.replace("_", "").lower()
    assert any(row.lower().startswith(f"| {code} |") for row in rows), f"{name} ({code}) is not in docs/troubleshoot.md"


def test_every_health_reason_has_advice() -> None:
    source = Path(health.__file__).read_text(encoding="utf-8")
    quoted = set(re.findall(r'"([A-Z][a-z]+(?:[A-Z][a-z]+)+)"', source))
    reasons = {name for name in quoted if not name.endswith(("Error", "VolumeHealth", "StorageHealth"))}
    page = (DOCS / "operate.md").read_text(encoding="utf-8")
    assert reasons
    assert not [reason for reason in reasons if reason not in page]


def test_every_event_says_what_to_do() -> None:
    source = (ROOT / "csi" / "driver" / "announcer.py").read_text(encoding="utf-8")
    reasons = set(re.findall(r'Announcement\((?:True|False), "(\w+)"', source))
    page = (DOCS / "operate.md").read_text(encoding="utf-8")
    assert reasons
    assert not [reason for reason in reasons if f"| `{reason}` |" not in page]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_tests_that_show_kubelets_behaviour_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "tests" / "csi" / "README.md").read_text(encoding="utf-8")))
    assert len(named) > 60
    defined = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert named <= defined, sorted(named - defined)
