"""Credentials: docker's and Kubernetes' files, and which entries fit a repository."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi.credentials import (
    Credential,
    Keyring,
    from_wire,
    helper_answer,
    of_docker_config,
    of_secret,
    registry_key,
    to_wire,
    united,
    within_limits,
)
from csi.errors import InvalidVolumeError


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def config(auths: dict[str, Any]) -> str:
    return json.dumps({"auths": auths})


def names(auths: dict[str, str], registry: str, repository: str) -> list[str]:
    """User names of the candidates; each entry's user is its key."""
    text = config({key: {"auth": b64(f"{user}:pw")} for key, user in auths.items()})
    return [found.username for found in of_docker_config(text, "test").candidates(registry, repository)]


@pytest.mark.parametrize(
    ("key", "registry", "repository", "fits"),
    [
        # as in kubernetes pkg/credentialprovider/keyring_test.go
        ("gcr.io", "gcr.io", "a/b", True),
        ("https://gcr.io", "gcr.io", "a/b", True),
        ("http://gcr.io/", "gcr.io", "a/b", True),
        ("https://gcr.io/v1/", "gcr.io", "a/b", True),
        ("https://gcr.io/v2/a", "gcr.io", "a/b", True),
        ("*.docker.io", "prefix.docker.io", "a", True),
        ("prefix.*.io", "prefix.docker.io", "a", True),
        ("prefix.docker.*", "prefix.docker.io", "a", True),
        ("*.*.io", "prefix.docker.io", "a", True),
        ("*.io", "prefix.docker.io", "a", False),
        ("*.docker.io", "kubernetes.io", "a", False),
        ("a*c.io", "abc.io", "a", True),
        ("gcr.io:443", "gcr.io", "a", False),
        ("gcr.io", "gcr.io:443", "a", False),
        ("gcr.io:5000/x", "gcr.io:5000", "x/y", True),
        ("gcr.io/foo", "gcr.io", "foobar", True),  # a plain prefix, without segments
        ("gcr.io/foo/bar", "gcr.io", "foo", False),
        ("GCR.io", "gcr.io", "a", True),
        ("[::1]:5000", "[::1]:5000", "a", True),
        ("[::1]:5000", "[::2]:5000", "a", False),
        ("https://index.docker.io/v1/", "docker.io", "library/x", True),
        ("https://index.docker.io/v1/", "quay.io", "library/x", False),
        ("gcr.io.evil.com", "gcr.io", "a", False),
        ("user@gcr.io", "gcr.io", "a", False),
        ("gcr.io:port", "gcr.io", "a", False),
        ("", "gcr.io", "a", False),
    ],
)
def test_which_entries_fit(key: str, registry: str, repository: str, fits: bool) -> None:
    assert names({key: "user"}, registry, repository) == (["user"] if fits else [])


def test_every_entry_that_fits_is_a_candidate_the_most_specific_first() -> None:
    auths = {
        "*.io": "glob",
        "quay.io": "host",
        "quay.io/team": "team",
        "quay.io/team/model": "model",
        "gcr.io": "other",
    }
    assert names(auths, "quay.io", "team/model") == ["model", "team", "host", "glob"]
    assert names({"docker.io": "a", "https://index.docker.io/v1/": "hub"}, "docker.io", "x/y") == ["a"]


def test_the_forms_of_an_entry() -> None:
    auths = {
        "a.io": {"auth": b64("ann:se:cret")},
        "b.io": {"auth": b64("ann:x").rstrip("="), "username": "overridden", "password": "p"},
        "c.io": {"username": "ann", "password": "x", "email": "a@b.c"},
        "d.io": {"auth": b64("ann:"), "identitytoken": "refresh"},
        "e.io": {"registrytoken": "bearer"},
        "f.io": {"auth": b64("<token>:refresh")},
        "g.io": {},
        "h.io": {"auth": None},
    }
    keyring = of_docker_config(config(auths), "test")
    assert [(key, found) for key, found in keyring.entries] == [
        ("a.io", Credential("ann", "se:cret")),
        ("b.io", Credential("ann", "x")),
        ("c.io", Credential("ann", "x")),
        ("d.io", Credential(identity_token="refresh")),
        ("e.io", Credential(registry_token="bearer")),
        ("f.io", Credential(identity_token="refresh")),
    ]


def test_the_types_of_secrets() -> None:
    auths = {"quay.io": {"auth": b64("ann:pw")}}
    ann = (Credential("ann", "pw"),)
    assert of_secret({".dockerconfigjson": config(auths)}).candidates("quay.io", "a/b") == ann
    assert of_secret({".dockerconfigjson": config(auths)}).candidates("gcr.io", "a/b") == ()
    assert of_secret({".dockercfg": json.dumps(auths)}).candidates("quay.io", "a/b") == ann
    both = {"username": "bob", "password": "x", ".dockerconfigjson": config(auths)}
    assert of_secret(both).candidates("quay.io", "a/b") == (*ann, Credential("bob", "x"))
    assert of_secret({"username": "bob", "password": "x"}).candidates("any.io:5000", "a") == (Credential("bob", "x"),)


@pytest.mark.parametrize(
    ("secret", "said"),
    [
        ({}, "(none)"),
        ({"username": "canary"}, "the keys username; expected .dockerconfigjson"),
        ({"username": "ca:nary", "password": "canary"}, "has a ':'"),
        ({"username": "u", "password": ""}, "is empty"),
        ({".dockerconfigjson": "canary"}, ".dockerconfigjson: is not JSON"),
        ({".dockerconfigjson": '["canary"]'}, "is not a JSON object"),
        ({".dockerconfigjson": "[" * 9000}, "is not JSON"),
        ({".dockerconfigjson": '{"auths": "canary"}'}, "auths: is not an object"),
        ({".dockerconfigjson": '{"auths": {"a.io": "canary"}}'}, "auths['a.io']: is not an object"),
        ({".dockerconfigjson": '{"auths": {"a.io": {"auth": "canary!"}}}'}, "auths['a.io'].auth: is not base64"),
        ({".dockerconfigjson": config({"a.io": {"auth": b64("canary")}})}, "is not base64 of username:password"),
        ({".dockerconfigjson": config({"a.io": {"auth": 7}})}, ".auth: is not a text"),
        ({".dockerconfigjson": config({"a.io": {"registrytoken": "canary\r\nx: y"}})}, "a token cannot have"),
        ({".dockercfg": " " * (1 << 20) + " "}, "larger than"),
    ],
)
def test_what_is_wrong_with_a_secret_is_said_without_its_values(secret: dict[str, str], said: str) -> None:
    with pytest.raises(InvalidVolumeError) as caught:
        of_secret(secret)
    assert said in str(caught.value)
    assert "canary" not in str(caught.value).replace("the keys username", "")
    assert caught.value.__cause__ is None


def test_nothing_shows_a_secret() -> None:
    every = Credential("ann", "canary-1", "canary-2", "canary-3")
    assert "canary" not in repr(every) + str(every) + repr(Keyring((("a.io", every),))) + f"{(every,)}"


def test_candidates_cross_to_another_process_and_are_bounded() -> None:
    some = (Credential("ann", "pw"), Credential(identity_token="t"), Credential(registry_token="r"))
    assert from_wire(json.loads(json.dumps(to_wire(some)))) == some
    assert from_wire(None) == from_wire([]) == ()
    many = tuple(Credential(f"u{number}", "p") for number in range(17))
    large = tuple(Credential(f"u{number}", "p" * 9000) for number in range(8))
    for too_much in (many, large):
        with pytest.raises(InvalidVolumeError):
            to_wire(too_much)
        assert to_wire(within_limits(too_much))
    assert united(some, some[:1], many[:1]) == (*some, many[0])


@pytest.mark.parametrize("value", ["x", {}, [1], [{"username": 1}], [{"user": "x"}], [["a"]]])
def test_a_malformed_message_is_refused(value: Any) -> None:
    with pytest.raises(InvalidVolumeError):
        from_wire(value)


def test_a_helper_gives_a_login_or_an_identity_token() -> None:
    assert helper_answer("ann", "pw") == Credential("ann", "pw")
    assert helper_answer("<token>", "refresh") == Credential(identity_token="refresh")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
ENTRY = st.dictionaries(st.sampled_from(["auth", "username", "password", "identitytoken", "registrytoken"]), JSON)


@given(st.text(max_size=60) | JSON.map(json.dumps) | st.dictionaries(st.text(max_size=20), ENTRY | JSON).map(config))
def test_any_secret_is_a_keyring_or_our_error(text: str) -> None:
    for key in (".dockerconfigjson", ".dockercfg"):
        try:
            keyring = of_secret({key: text})
        except InvalidVolumeError:
            continue
        assert keyring.candidates("quay.io", "a/b") is not None


@given(
    st.text(alphabet="*[]?a.:/-!^0", max_size=300), st.sampled_from(["a.a", "a", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa.a"])
)
def test_matching_any_key_ends(key: str, registry: str) -> None:
    Keyring(((registry_key(key) or "x", Credential("u", "p")),)).candidates(registry, "a/a")
