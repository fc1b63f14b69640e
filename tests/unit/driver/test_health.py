"""From the supervisor's status to volume health."""

from __future__ import annotations

from typing import Any

import pytest

from csi.driver.health import Severity, node_troubles, troubles_of


def mount(**changes: Any) -> dict[str, Any]:
    """A mount that is well, with half a blob in its cache."""
    progress = {
        "last_error": None,
        "blobs": [{"digest": "sha256:ab", "blocks": 4, "present_blocks": 2, "state": "filling"}],
        **changes.pop("progress", {}),
    }
    return {"dead": False, "worker_alive": True, "reads": {"reads": 1}, "progress": progress, **changes}


def failing(kind: str, **progress: Any) -> dict[str, Any]:
    error = {"last_error": "why", "last_error_kind": kind, "last_error_at": 20.0, "last_block_at": 10.0}
    return mount(progress={**error, **progress})


def reasons(status: dict[str, Any] | None) -> list[str]:
    return [trouble.reason for trouble in troubles_of(status, "/target")]


def test_a_mount_that_is_well_has_no_entry() -> None:
    assert reasons(mount()) == []


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (None, ["MountLost"]),
        (mount(dead=True), ["MountLost"]),
        (mount(worker_alive=False), ["WorkerRestarting"]),
        (mount(worker_alive=False, worker_resting=True, reads={}), []),
        (mount(reads={}), ["WorkerNotAnswering"]),
        (failing("RegistryUnavailableError"), ["RegistryUnreachable"]),
        (failing("RegistryAuthError"), ["CredentialsExpired"]),
        (failing("ModelNotFoundError"), ["ModelGone"]),
        (failing("CacheError"), ["CacheFailure"]),
        (mount(refused={"/target": "no"}), ["AccessRefused"]),
        (mount(refused={"/other": "no"}), []),
        (failing("SomethingNew"), ["FetchFailing"]),
        (failing("RegistryUnavailableError", last_block_at=30.0), []),
        (failing("RegistryUnavailableError", blobs=[{"blocks": 4, "present_blocks": 4, "state": "verified"}]), []),
    ],
)
def test_causes_and_reasons(status: dict[str, Any] | None, expected: list[str]) -> None:
    assert reasons(status) == expected


def test_wrong_bytes_are_one_entry_however_they_were_found() -> None:
    blobs = [{"digest": "sha256:ab", "blocks": 4, "present_blocks": 2, "state": "poisoned"}]
    found = troubles_of(failing("DigestMismatchError", blobs=blobs), "/target")
    assert [(trouble.reason, trouble.severity) for trouble in found] == [("IntegrityFailure", Severity.DATA_LOSS)]


def test_the_node_reports_what_more_than_one_volume_is_about() -> None:
    mounts = [failing("RegistryUnavailableError"), failing("RegistryUnavailableError"), mount(worker_alive=False)]
    (trouble,) = node_troubles(mounts)
    assert (trouble.reason, trouble.message) == ("RegistryUnreachable", "2 of 3 mounts: why")
