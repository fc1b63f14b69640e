"""Which manifest of an index is the model: digest, selector, platform, the only one; never a guess."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi.errors import ContentError, UnsupportedModelError
from csi.oci.digest import Digest
from csi.oci.formats.index import chosen, pick, platform_of
from csi.oci.manifest import DOCKER_LIST, OCI_INDEX, OCI_MANIFEST, Index, parse

MODELPACK = "application/vnd.cncf.model.manifest.v1+json"


def entry(name: str, platform: str = "", artifact_type: str = "", **annotations: str) -> dict[str, Any]:
    os, _, architecture = platform.partition("/")
    architecture, _, variant = architecture.partition("/")
    return {
        "mediaType": OCI_MANIFEST,
        "digest": str(Digest.of(name.encode())),
        "size": 100,
        **({"platform": {"os": os, "architecture": architecture, "variant": variant}} if platform else {}),
        **({"artifactType": artifact_type} if artifact_type else {}),
        "annotations": {key.replace("__", "."): value for key, value in annotations.items()},
    }


def index(*entries: dict[str, Any], **more: Any) -> bytes:
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries, **more}).encode()


def picked(data: bytes, selector: str = "", platform: str = "linux/amd64") -> Digest:
    parsed = parse(data)
    assert isinstance(parsed, Index)
    return pick(parsed, selector, platform).descriptor.digest


def undecided(data: bytes, selector: str = "", platform: str = "linux/amd64") -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        picked(data, selector, platform)
    return str(caught.value)


Q4 = entry("q4", artifact_type=MODELPACK, org__example__quantization="q4", size="small")
Q8 = entry("q8", artifact_type=MODELPACK, org__example__quantization="q8", size="large")
ATTESTATION = entry("att", "unknown/unknown", vnd__docker__reference__type="attestation-manifest")
SIGNATURE = entry("sig", artifact_type="application/vnd.dev.sigstore.bundle.v0.3+json")
AMD = entry("amd", "linux/amd64")
ARM = entry("arm", "linux/arm64/v8")


@pytest.mark.parametrize(
    "selector",
    [
        "quantization=q8",
        "org.example.quantization=q8",
        "q8",
        "large",
        "size=large, quantization=q8",
        str(Digest.of(b"q8")),
        f"{MODELPACK},large",
    ],
)
def test_a_selector_names_one(selector: str) -> None:
    assert picked(index(Q4, Q8, SIGNATURE), selector) == Digest.of(b"q8")


@pytest.mark.parametrize("selector", ["quant=q8", "ization=q8", "q", "size=q8", "large,q4", ""])
def test_a_selector_that_names_none_or_several_lists_the_candidates(selector: str) -> None:
    message = undecided(index(Q4, Q8, SIGNATURE, ATTESTATION), selector)
    assert f"{Digest.of(b'q4')} ({MODELPACK} org.example.quantization=q4 size=small)" in message
    assert str(Digest.of(b"q8")) in message
    assert str(Digest.of(b"sig")) not in message
    assert str(Digest.of(b"att")) not in message


def test_the_platform_decides_where_every_candidate_has_one() -> None:
    assert picked(index(AMD, ARM, ATTESTATION)) == Digest.of(b"amd")
    assert picked(index(AMD, ARM, ATTESTATION), platform="linux/arm64") == Digest.of(b"arm")
    assert "2 could be meant" in undecided(index(AMD, ARM), platform="linux/s390x")
    assert "2 could be meant" in undecided(index(AMD, Q4))


def test_a_selector_may_leave_the_choice_to_the_platform() -> None:
    both = [entry(f"{q}-{arch}", f"linux/{arch}", q=q) for q in ("q4", "q8") for arch in ("amd64", "arm64")]
    assert picked(index(*both), "q=q8") == Digest.of(b"q8-amd64")
    assert "4 could be meant" in undecided(index(*both), platform="linux/s390x")
    assert "2 of them fit variant 'linux/amd64'" in undecided(index(*both), "linux/amd64")


def test_the_only_candidate_needs_no_word() -> None:
    assert picked(index(ARM, ATTESTATION, SIGNATURE)) == Digest.of(b"arm")
    assert picked(index(Q4, Q4)) == Digest.of(b"q4")


def test_an_index_of_signatures_is_refused_by_name_and_an_empty_one_too() -> None:
    assert "this reference is a signature" in undecided(index(SIGNATURE))
    assert "an attestation" in undecided(index(ATTESTATION))
    assert "index of no models" in undecided(index())
    with pytest.raises(UnsupportedModelError, match="an SBOM"):
        parse(index(Q4, artifactType="application/spdx+json"))


def test_half_a_platform_is_none() -> None:
    empty = {**AMD, "platform": {"os": "", "architecture": ""}}
    assert picked(index(empty)) == Digest.of(b"amd")
    for odd in ({}, {"os": "linux"}, {"os": 1, "architecture": "amd64"}, {"os": "a b", "architecture": "\n"}):
        parsed = parse(index({**AMD, "platform": odd}))
        assert isinstance(parsed, Index)
        assert parsed.entries[0].platform == ""


def test_a_manifest_has_no_variants() -> None:
    single = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": Q4, "layers": []}
    sent = SimpleNamespace(data=json.dumps(single).encode(), media_type=OCI_MANIFEST)
    with pytest.raises(UnsupportedModelError, match="leave out 'variant'"):
        chosen(sent, "q8", lambda digest: pytest.fail(f"asked for {digest}"))


def test_platforms_as_uname_says_them() -> None:
    assert platform_of("Linux", "x86_64") == "linux/amd64"
    assert platform_of("Linux", "aarch64") == "linux/arm64"
    assert platform_of("Linux", "riscv64") == "linux/riscv64"


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
_entries = st.sampled_from([Q4, Q8, AMD, ARM, ATTESTATION, SIGNATURE]) | st.fixed_dictionaries(
    {"mediaType": st.just(OCI_MANIFEST), "digest": st.just(str(Digest.of(b"x"))), "size": st.just(1)},
    optional={
        "platform": _json | st.fixed_dictionaries({"os": _json, "architecture": _json}),
        "artifactType": _json,
        "annotations": st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2) | _json,
    },
)


def outcome(data: bytes, selector: str) -> Digest | ContentError:
    try:
        return picked(data, selector)
    except ContentError as exc:
        return exc


@given(st.lists(_entries, max_size=4), st.text(max_size=12) | st.sampled_from(["q4", "size=small", ",", "="]))
def test_any_index_gives_one_of_its_entries_or_our_error(entries: list[dict[str, Any]], selector: str) -> None:
    for media_type in (OCI_INDEX, DOCKER_LIST):
        found = outcome(json.dumps({"mediaType": media_type, "manifests": entries}).encode(), selector)
        if isinstance(found, ContentError):
            assert str(found).isprintable()
        else:
            assert str(found) in {entry["digest"] for entry in entries}
