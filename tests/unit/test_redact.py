"""What looks like a secret does not get through, and the rest does."""

from __future__ import annotations

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi.observe.logs import JsonFormatter, TextFormatter
from csi.redact import scrub

JWT = "eyJhbGciOiJSUzI1NiIsImtpZCI6IjEifQ.eyJzdWIiOiJzeXN0ZW06c2VydmljZWFjY291bnQifQ.c2lnbmF0dXJl-_"


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        ("Authorization: Basic dXNlcjpwYXNz", "Authorization: Basic ***"),
        ("sent Bearer abc.def-123~x=", "sent Bearer ***"),
        (f"token {JWT} refused", "token *** refused"),
        ("https://user:pass@r.io/v2/", "https://***@r.io/v2/"),
        ("GET https://cdn.io/blob?X-Amz-Signature=abc&e=1 403", "GET https://cdn.io/blob?*** 403"),
        ("r.io/team/model@sha256:" + "ab" * 32, "r.io/team/model@sha256:" + "ab" * 32),
        ("basic model of 3 layers; what next?", "basic model of 3 layers; what next?"),
        ("oci://r.io/team/model:v1", "oci://r.io/team/model:v1"),
    ],
)
def test_secrets_go_and_the_rest_stays(text: str, scrubbed: str) -> None:
    assert scrub(text) == scrubbed


@given(st.text(max_size=200))
def test_json_stays_json_and_scrubbing_is_idempotent(text: str) -> None:
    once = scrub(json.dumps({"message": f"{text} Bearer {text}"}))
    json.loads(once)
    assert scrub(once) == once


@pytest.mark.parametrize("formatter", [JsonFormatter("node"), TextFormatter("%(message)s")])
def test_no_formatter_lets_a_token_through(formatter: logging.Formatter) -> None:
    try:
        raise ValueError(f"cannot parse {JWT}")
    except ValueError as exc:
        record = logging.LogRecord("csi", logging.ERROR, __file__, 1, "failed: %s", (JWT,), (type(exc), exc, None))
    assert JWT not in formatter.format(record)
