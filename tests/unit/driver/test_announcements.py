"""What a pod's owner is told, and how often."""

from __future__ import annotations

from typing import Any

from csi.driver.announcer import Told, announce, progress_text

TARGET = "/target"


def mount(present: int, state: str = "filling", **changes: Any) -> dict[str, Any]:
    blob = {"digest": "sha256:a", "size_bytes": 100_000_000, "blocks": 100, "present_blocks": present, "state": state}
    progress = {"last_error": None, "blobs": [blob]}
    status = {"reference": "r.io/m:1", "dead": False, "worker_alive": True, "reads": {"n": 1}, "progress": progress}
    return status | changes


def test_a_pull_is_told_twice_a_minute_at_most_and_ends_with_verified() -> None:
    told, said = Told(), []
    for second in range(0, 120, 5):
        now, told = announce(told, mount(second * 100 // 120), TARGET, float(second))
        said += now
    assert [one.reason for one in said] == ["ModelPulling"] * 3
    assert "25 % (25.0 of 100.0 MB), 0.8 MB/s, 90 s left" in said[0].message
    said, told = announce(told, mount(100, "verified"), TARGET, 125.0)
    assert [(one.reason, one.warning) for one in said] == [("ModelVerified", False)]
    assert announce(told, mount(100, "verified"), TARGET, 500.0)[0] == []


def test_a_model_that_is_there_already_says_nothing() -> None:
    assert announce(Told(), mount(100, "verified"), TARGET, 0.0)[0] == []


def test_trouble_is_told_once_and_so_is_its_end() -> None:
    said, told = announce(Told(), mount(50, worker_alive=False), TARGET, 0.0)
    assert [(one.reason, one.warning) for one in said] == [("ModelDegraded", True)]
    assert said[0].message.startswith("WorkerRestarting: ")
    said, told = announce(told, mount(50, worker_alive=False), TARGET, 5.0)
    assert said == []
    said, told = announce(told, mount(50), TARGET, 10.0)
    assert [(one.reason, one.message) for one in said] == [("ModelHealed", "WorkerRestarting is over")]
    said, told = announce(told, None, TARGET, 15.0)
    assert said[0].message.startswith("MountLost: ")


def test_progress_without_a_rate_has_no_end() -> None:
    assert progress_text(0, 1_000_000, 0.0) == "0 % (0.0 of 1.0 MB), 0.0 MB/s"
    assert progress_text(0, 0, 0.0).startswith("100 %")
