"""Access records: who is remembered, how long, and what a damaged record is worth."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from csi.oci.digest import Digest
from csi.supervisor.access import AccessRecords, Caller, Model

MODEL = Model("shared", "r.io/team/model", Digest("sha256", "a" * 64))
ALICE, BOB = Caller("alice's"), Caller("bob's")
NOBODY = Caller("")


class Clock:
    """Seconds, moved by hand."""

    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def records(tmp_path: Path, clock: Clock) -> AccessRecords:
    return AccessRecords(str(tmp_path / "access"), 3600, clock)


def test_a_grant_is_for_its_caller_and_its_model(records: AccessRecords, clock: Clock) -> None:
    records.grant(MODEL, ALICE)
    clock.now += 10
    assert records.age_s(MODEL, ALICE) == 10
    assert records.age_s(MODEL, BOB) is None
    assert records.age_s(MODEL, NOBODY) is None
    for other in (
        Model("namespace-a", MODEL.origin, MODEL.digest),
        Model(MODEL.domain, "evil.example/x", MODEL.digest),
        Model(MODEL.domain, MODEL.origin, Digest("sha256", "b" * 64)),
    ):
        assert records.age_s(other, ALICE) is None


def test_what_anybody_may_pull_is_anybodys(records: AccessRecords) -> None:
    records.grant(MODEL, NOBODY)
    assert records.age_s(MODEL, BOB) == 0


def test_a_rotated_token_of_the_same_service_account_is_the_same_caller(records: AccessRecords) -> None:
    records.grant(MODEL, Caller("token 1", "apps/reader"))
    assert records.age_s(MODEL, Caller("token 2", "apps/reader")) == 0
    assert records.age_s(MODEL, Caller("token 2", "apps/other")) is None
    assert records.age_s(MODEL, Caller("token 2")) is None


def test_a_grant_ends_with_its_life_a_refusal_or_a_clock_that_went_back(records: AccessRecords, clock: Clock) -> None:
    records.grant(MODEL, ALICE)
    records.grant(MODEL, BOB)
    records.revoke(MODEL, BOB)
    assert records.age_s(MODEL, BOB) is None
    clock.now += 3601
    assert records.age_s(MODEL, ALICE) is None
    clock.now -= 7200
    assert records.age_s(MODEL, ALICE) is None


def test_it_is_kept_across_restarts_without_the_credentials(tmp_path: Path, clock: Clock) -> None:
    AccessRecords(str(tmp_path / "access"), 3600, clock).grant(MODEL, ALICE)
    assert AccessRecords(str(tmp_path / "access"), 3600, clock).age_s(MODEL, ALICE) == 0
    for name in os.listdir(tmp_path / "access"):
        assert b"alice" not in (tmp_path / "access" / name).read_bytes()
    assert os.stat(tmp_path / "access" / "key").st_mode & 0o777 == 0o600


@pytest.mark.allow_logs
@pytest.mark.parametrize("content", [b"", b"[]", b'{"seen": 1}', b'{"seen": {"anonymous": "x"}}', b"\xff"])
def test_a_damaged_record_is_no_record(tmp_path: Path, records: AccessRecords, content: bytes) -> None:
    records.grant(MODEL, ALICE)
    (path,) = (tmp_path / "access").glob("*.json")
    path.write_bytes(content)
    assert records.age_s(MODEL, ALICE) is None
    records.grant(MODEL, ALICE)
    assert records.age_s(MODEL, ALICE) == 0


def test_a_record_has_a_hundred_callers_at_most(records: AccessRecords, clock: Clock) -> None:
    for number in range(120):
        clock.now += 1
        records.grant(MODEL, Caller(f"caller {number}"))
    assert records.age_s(MODEL, Caller("caller 0")) is None
    assert records.age_s(MODEL, Caller("caller 119")) == 0
