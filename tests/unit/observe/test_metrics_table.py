"""The table of metrics: names, and the page made from it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from csi.observe.metrics import MOUNT_COUNTERS, TABLE, Kind, Metric

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("metric", TABLE, ids=lambda metric: metric.name)
def test_names_follow_the_conventions_of_prometheus(metric: Metric) -> None:
    assert re.fullmatch(r"modelmount_[a-z]+(_[a-z]+)*", metric.name)
    assert (metric.kind is Kind.COUNTER) == metric.name.endswith("_total")
    if metric.unit in ("bytes", "seconds"):
        assert metric.unit in metric.name
    assert metric.meaning.endswith(".")


def test_no_name_twice() -> None:
    assert len({metric.name for metric in TABLE}) == len(TABLE)


def test_every_counter_of_a_mount_says_where_its_value_is() -> None:
    assert all(metric.source for metric in MOUNT_COUNTERS)


def test_the_generated_pages_are_up_to_date() -> None:
    done = subprocess.run([sys.executable, ROOT / "docs" / "generate.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_metric_has_advice_in_the_operators_page() -> None:
    page = (ROOT / "docs" / "operate.md").read_text(encoding="utf-8")
    missing = [metric.name for metric in TABLE if metric.name not in page]
    assert not missing
