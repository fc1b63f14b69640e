"""What the doctor makes of what it reads, and a whole run of it here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from csi.cli import doctor
from csi.cli.doctor import Finding, Verdict
from csi.cli.main import main

OK, WARNING, FAILURE = Verdict.OK, Verdict.WARNING, Verdict.FAILURE


STORE = {"used_bytes": 10, "room_bytes": 30, "free_bytes": 50, "total_bytes": 100, "floor_bytes": 16}


@pytest.mark.parametrize(
    ("finding", "verdict"),
    [
        (doctor.kernel_finding("Linux", "6.18.44"), OK),
        (doctor.kernel_finding("Linux", "6.8.0-31-generic"), WARNING),
        (doctor.kernel_finding("Linux", "5.4.0"), FAILURE),
        (doctor.kernel_finding("Darwin", "25.0"), FAILURE),
        (doctor.fuse_finding(True, "", False), OK),
        (doctor.fuse_finding(False, "nodev\tfuse\n", True), OK),
        (doctor.fuse_finding(False, "nodev\tfuse\n", False), FAILURE),
        (doctor.fuse_finding(False, "\text4\n", True), FAILURE),
        (doctor.cgroup_finding(True), OK),
        (doctor.cgroup_finding(False), WARNING),
        (doctor.process_finding("keeper", "answers, pid 1"), OK),
        (doctor.process_finding("keeper", None), FAILURE),
        (doctor.cache_finding(STORE), OK),
        (doctor.cache_finding(STORE | {"room_bytes": -1}), WARNING),
        (doctor.cache_finding(STORE | {"room_bytes": 0, "free_bytes": 15}), WARNING),
        (doctor.disk_finding("/d", 100, 50, True), OK),
        (doctor.disk_finding("/d", 100, 17, True), OK),
        (doctor.disk_finding("/d", 100, 15, True), WARNING),
        (doctor.disk_finding("/d", 100, 50, False), FAILURE),
        (doctor.clock_finding(0), OK),
        (doctor.clock_finding(5), WARNING),
        (doctor.clock_finding(None), WARNING),
    ],
)
def test_a_finding_that_is_not_ok_says_what_to_do(finding: Finding, verdict: Verdict) -> None:
    assert finding.verdict is verdict
    assert bool(finding.advice) == (verdict is not OK)


def test_a_machine_without_the_driver_is_told_to_start_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [f"--state-dir={tmp_path}", f"--data-dir={tmp_path / 'not' / 'yet'}", "--output=json"]
    assert main(["doctor", *flags]) == 1
    findings = {found["subject"]: found for found in json.loads(capsys.readouterr().out)["findings"]}
    assert list(findings) == ["kernel", "FUSE", "cgroups", "keeper", "supervisor", "disk", "clock"]
    assert findings["keeper"]["verdict"] == "failure"
    assert "modelmount keeper" in findings["keeper"]["advice"]
    assert findings["disk"]["verdict"] != "failure"


def test_a_registry_that_does_not_answer_is_a_failure_with_its_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "127.0.0.1:1/team/model:v1", f"--state-dir={tmp_path}", f"--data-dir={tmp_path}"]) == 1
    assert "failure  registry: " in capsys.readouterr().out


def test_watching_needs_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--watch", f"--state-dir={tmp_path}"]) == 2
    assert "--watch needs a terminal" in capsys.readouterr().err


def test_a_cache_that_takes_nothing_more_says_which_limit_it_is() -> None:
    assert "--cache-limit" in doctor.cache_finding(STORE | {"room_bytes": -1}).advice
    assert "--cache-min-free" in doctor.cache_finding(STORE | {"room_bytes": -1, "free_bytes": 15}).advice
