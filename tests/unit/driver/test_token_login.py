"""How a pod's service-account token becomes a registry login."""

from __future__ import annotations

import json

import pytest

from csi.credentials import Credential
from csi.driver.token_login import parse_token_logins, service_account_of, token_credentials
from csi.errors import InvalidVolumeError
from csi.oci.reference import Reference

KEY = "csi.storage.k8s.io/serviceAccount.tokens"
REFERENCE = Reference.parse("r.io:5000/team/model:v1")
LOGINS = parse_token_logins(
    [
        "r.io:5000=identity",
        "b.io=bearer",
        "c.io=basic:robot$a",
        "d.io=exchange:oauth:https://sts.io/v1/token?audience=a:b",
    ]
)


def tokens(**by_audience: str) -> str:
    return json.dumps({audience: {"token": token} for audience, token in by_audience.items()})


def test_each_method() -> None:
    secrets = {KEY: tokens(any="jwt")}
    found = {
        registry: token_credentials(secrets, {}, Reference.parse(f"{registry}/m:1"), LOGINS)
        for registry in ("r.io:5000", "b.io", "c.io", "d.io", "other.io")
    }
    assert found == {
        "r.io:5000": (Credential(identity_token="jwt"),),
        "b.io": (Credential(registry_token="jwt"),),
        "c.io": (Credential(username="robot$a", password="jwt"),),
        "d.io": (
            Credential(username="oauth", subject_token="jwt", exchange_url="https://sts.io/v1/token?audience=a:b"),
        ),
        "other.io": (),
    }


def test_the_audience_of_the_registry_is_chosen_and_secrets_come_first() -> None:
    both = json.dumps({"r.io:5000": {"token": "right"}, "vault": {"token": "wrong"}})
    assert token_credentials({KEY: both}, {KEY: tokens(x="old")}, REFERENCE, LOGINS)[0].identity_token == "right"
    assert token_credentials({}, {KEY: tokens(x="old")}, REFERENCE, LOGINS)[0].identity_token == "old"
    with pytest.raises(InvalidVolumeError, match="audience"):
        token_credentials({KEY: tokens(a="canary-1", b="canary-2")}, {}, REFERENCE, LOGINS)


@pytest.mark.parametrize(
    "text", ["{", "[]", "1", '{"a": 1}', '{"a": {"token": "with blank"}}', '{"a": {"token": "ü"}}']
)
def test_what_kubelet_does_not_send_is_refused_without_showing_it(text: str) -> None:
    with pytest.raises(InvalidVolumeError) as caught:
        token_credentials({KEY: text}, {}, REFERENCE, LOGINS)
    assert "blank" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "r.io",
        "=bearer",
        "r.io=magic",
        "r.io=basic",
        "r.io=bearer:x",
        "r.io/team=bearer",
        "r.io=exchange:u",
        "r.io=exchange:u:sts.io",
        "r.io=exchange::https://sts.io/",
        "r.io=exchange:u:https://a@b/",
    ],
)
def test_a_malformed_setting_is_refused(text: str) -> None:
    with pytest.raises(InvalidVolumeError, match="--token-login"):
        parse_token_logins([text])


def test_the_service_account_is_kubelets_word() -> None:
    prefix = "csi.storage.k8s.io"
    assert service_account_of({f"{prefix}/pod.namespace": "a", f"{prefix}/serviceAccount.name": "b"}) == "a/b"
    assert service_account_of({f"{prefix}/pod.namespace": "a"}) == ""
