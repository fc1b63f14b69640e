"""`parse_manifest`: limits, ambiguities, and things that are no model."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi.errors import ContentError, SizeMismatchError, UnsupportedModelError
from csi.oci import manifest as oci
from csi.oci.digest import Digest
from csi.oci.manifest import parse_manifest

_DIGEST = "sha256:" + "ab" * 32
_CONFIG = {"mediaType": "application/vnd.cncf.model.config.v1+json", "digest": _DIGEST, "size": 2}
_LAYER = {"mediaType": "application/vnd.cncf.model.weight.v1.raw", "digest": _DIGEST, "size": 10}


def document(**changes: Any) -> dict[str, Any]:
    """A plain manifest with `changes`; a change to `...` removes the key."""
    whole = {"schemaVersion": 2, "mediaType": oci.OCI_MANIFEST, "config": _CONFIG, "layers": [_LAYER], **changes}
    return {key: value for key, value in whole.items() if value is not ...}


def encoded(**changes: Any) -> bytes:
    return json.dumps(document(**changes)).encode()


def refusal(data: bytes, content_type: str | None = None) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        parse_manifest(data, content_type)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 4000
    return str(caught.value)


def outcome(data: bytes, content_type: str | None) -> oci.Manifest | ContentError:
    try:
        return parse_manifest(data, content_type)
    except ContentError as error:
        return error


def test_every_field_is_read() -> None:
    layer = {**_LAYER, "annotations": {"a": "b"}, "urls": ["http://169.254.169.254/"], "data": "AAAA"}
    parsed = parse_manifest(
        encoded(artifactType="application/x", layers=[layer, _LAYER], annotations={"k": "v"}, subject=_CONFIG),
        "application/vnd.oci.image.manifest.v1+json; charset=utf-8",
    )
    assert parsed.media_type == oci.OCI_MANIFEST
    assert parsed.artifact_type == "application/x"
    assert parsed.config.media_type == _CONFIG["mediaType"]
    assert [found.annotations for found in parsed.layers] == [{"a": "b"}, {}]
    assert parsed.layers[0].digest == Digest.parse(_DIGEST)
    assert parsed.layers[0].size_bytes == 10
    assert parsed.annotations == {"k": "v"}
    assert parsed.subject is not None
    assert parsed.subject.digest == Digest.parse(_DIGEST)


def test_absent_and_empty_optional_fields_are_the_same() -> None:
    for changes in ({}, {"artifactType": "", "annotations": None, "subject": None, "mediaType": ""}):
        parsed = parse_manifest(encoded(**changes))
        assert (parsed.artifact_type, parsed.annotations, parsed.subject) == ("", {}, None)
        assert parsed.media_type == oci.OCI_MANIFEST


@pytest.mark.parametrize(
    ("declared", "told", "found"),
    [
        (..., None, oci.OCI_MANIFEST),
        (..., "", oci.OCI_MANIFEST),
        (..., "application/json", oci.OCI_MANIFEST),
        (..., "application/octet-stream", oci.OCI_MANIFEST),
        (..., oci.DOCKER_MANIFEST, oci.DOCKER_MANIFEST),
        (oci.OCI_MANIFEST, oci.OCI_MANIFEST.upper(), oci.OCI_MANIFEST),
        (oci.DOCKER_MANIFEST, "application/json; charset=utf-8", oci.DOCKER_MANIFEST),
    ],
)
def test_the_media_type_comes_from_the_manifest_else_from_the_source(declared: Any, told: Any, found: str) -> None:
    assert parse_manifest(encoded(mediaType=declared), told).media_type == found


@pytest.mark.parametrize(
    ("changes", "told", "problem"),
    [
        ({}, oci.DOCKER_MANIFEST, "calls itself 'application/vnd.oci.image.manifest.v1+json', the registry calls it"),
        ({}, "text/html", "the registry calls it 'text/html'"),
        ({"mediaType": ...}, oci.OCI_INDEX, "could be read as two things"),
        ({"mediaType": oci.OCI_INDEX}, None, "could be read as two things"),
        ({"layers": ..., "config": ..., "manifests": []}, None, "could be read as two things"),
        ({"manifests": []}, None, "has both 'manifests' and 'layers'"),
        ({"manifests": [], "layers": ...}, None, "has both 'manifests' and 'layers'"),
        (
            {"mediaType": "application/vnd.docker.distribution.manifest.v1+prettyjws"},
            None,
            "expected an image manifest",
        ),
        ({"mediaType": "application/vnd.oci.artifact.manifest.v1+json"}, None, "expected an image manifest"),
        ({"config": ...}, None, "keys schemaVersion, mediaType, layers; expected an image manifest"),
        ({"layers": ...}, None, "layers is missing or not a list"),
        ({"layers": {}}, None, "layers is missing or not a list"),
        ({"schemaVersion": 1}, None, "schemaVersion is '1', expected 2"),
        ({"Layers": []}, None, "Layers is 'layers' to some programs"),
        ({"layerſ": []}, None, "layerſ is 'layers' to some programs"),
        ({"mediaType": 7}, None, "mediaType must be a text, got '7'"),
        ({"artifactType": ["a"]}, None, "artifactType must be a text"),
        ({"artifactType": "a\nb"}, None, "artifactType must be a media type"),
        ({"annotations": []}, None, "annotations must map names to texts"),
        ({"annotations": {"a": 1}}, None, "annotations must map names to texts"),
        ({"config": []}, None, "config is not a descriptor object"),
        ({"config": {**_CONFIG, "digest": "sha256:x"}}, None, "config.digest: digest 'sha256:x'"),
        ({"subject": {**_CONFIG, "size": -1}}, None, "subject.size must be a number of bytes, got '-1'"),
    ],
)
def test_ambiguous_or_malformed_manifests_are_refused_by_field(
    changes: dict[str, Any], told: str | None, problem: str
) -> None:
    assert problem in refusal(encoded(**changes), told)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"size": ...}, "layers[2].size must be a number of bytes, got nothing"),
        ({"size": True}, "layers[2].size must be a number of bytes, got 'True'"),
        ({"size": 1.0}, "layers[2].size"),
        ({"size": "1"}, "layers[2].size"),
        ({"size": -1}, "layers[2].size"),
        ({"digest": ...}, "layers[2].digest must be a text, got nothing"),
        ({"digest": _DIGEST.upper()}, "layers[2].digest: "),
        ({"digest": _DIGEST + "0"}, "layers[2].digest: "),
        ({"digest": "md5:" + "0" * 32}, "layers[2].digest: "),
        ({"mediaType": None}, "layers[2].mediaType must be a text, got 'None'"),
        ({"mediaType": ""}, "layers[2].mediaType must be a text"),
        ({"mediaType": "a/\x1b[2J"}, "layers[2].mediaType must be a media type"),
        ({"mediaType": "a/" + "b" * 254}, "layers[2].mediaType must be a media type"),
        ({"annotations": {"a": None}}, "layers[2].annotations must map names to texts"),
        ({"Digest": _DIGEST}, "layers[2].Digest is 'digest' to some programs"),
    ],
)
def test_a_bad_layer_is_named_by_position_and_field(changes: dict[str, Any], problem: str) -> None:
    layer = {key: value for key, value in {**_LAYER, **changes}.items() if value is not ...}
    assert problem in refusal(encoded(layers=[_LAYER, _LAYER, layer]))


def test_limits() -> None:
    assert len(parse_manifest(encoded(layers=[_LAYER] * oci.MAX_LAYERS)).layers) == oci.MAX_LAYERS
    assert "10001 layers, the limit is 10000" in refusal(encoded(layers=[_LAYER] * (oci.MAX_LAYERS + 1)))
    huge = {**_LAYER, "size": 2**62}
    assert "add up to more than" in refusal(encoded(layers=[huge, huge]))
    with pytest.raises(SizeMismatchError):
        parse_manifest(encoded() + b" " * oci.MAX_MANIFEST_BYTES)
    padded = encoded()
    assert parse_manifest(padded + b" " * (oci.MAX_MANIFEST_BYTES - len(padded)))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"layers": [{**_LAYER, "mediaType": "application/vnd.dev.cosign.simplesigning.v1+json"}]}, "a signature"),
        ({"artifactType": "application/vnd.dev.sigstore.bundle.v0.3+json"}, "a signature or attestation"),
        ({"artifactType": "application/vnd.cncf.notary.signature"}, "a signature"),
        ({"config": {**_CONFIG, "mediaType": "application/vnd.cncf.notary.signature"}}, "a signature"),
        ({"artifactType": "application/vnd.in-toto+json"}, "an attestation"),
        ({"layers": [{**_LAYER, "mediaType": "application/vnd.in-toto+json"}] * 2}, "an attestation"),
        ({"layers": [{**_LAYER, "mediaType": "application/vnd.dsse.envelope.v1+json"}]}, "an attestation"),
        ({"artifactType": "application/spdx+json"}, "an SBOM"),
        ({"layers": [{**_LAYER, "mediaType": "text/spdx+xml"}]}, "an SBOM"),
        ({"artifactType": "application/vnd.CycloneDX+json"}, "an SBOM"),
    ],
)
def test_attachments_are_refused_by_name(changes: dict[str, Any], what: str) -> None:
    assert f"this reference is {what}, not a model" in refusal(encoded(**changes))


def test_a_model_that_carries_an_sbom_beside_its_weights_is_not_an_sbom() -> None:
    sbom = {**_LAYER, "mediaType": "application/spdx+json"}
    assert len(parse_manifest(encoded(layers=[_LAYER, sbom])).layers) == 2
    assert len(parse_manifest(encoded(layers=[sbom, _LAYER])).layers) == 2


def test_an_index_lists_at_most_eight_candidates() -> None:
    children = [
        {
            "mediaType": oci.OCI_MANIFEST,
            "digest": f"sha256:{n:064x}",
            "size": 2,
            "platform": {"os": "linux", "architecture": "amd64"},
            "artifactType": "application/vnd.cncf.model.manifest.v1+json",
            "annotations": {"quantization": f"q{n}\x1b[2J", "b": "c", "d": "e", "left": "out"},
        }
        for n in range(10)
    ]
    index = {"schemaVersion": 2, "mediaType": oci.OCI_INDEX, "manifests": children}
    for changed, told in ((index, None), ({**index, "mediaType": ""}, oci.DOCKER_LIST), ({"manifests": children}, "")):
        message = refusal(json.dumps(changed).encode(), told)
        assert "an index of 10 manifests; name one of them by digest: sha256:000" in message
        assert f"sha256:{7:064x} linux/amd64 (application/vnd.cncf.model.manifest.v1+json quantization=q7" in message
        assert f"{8:064x}" not in message
        assert "left" not in message


@pytest.mark.parametrize("manifests", [[], {}, [1, None, []], [{"platform": 1, "annotations": 2, "digest": [3]}]])
def test_odd_indexes_are_refused_too(manifests: Any) -> None:
    refusal(json.dumps({"mediaType": oci.OCI_INDEX, "manifests": manifests}).encode())


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
_descriptors = st.fixed_dictionaries(
    {},
    optional={
        "mediaType": st.sampled_from(["application/vnd.cncf.model.weight.v1.raw", "", "a\n"]) | _json,
        "digest": st.sampled_from([_DIGEST, "sha512:" + "0" * 128, "sha256:"]) | _json,
        "size": st.integers(-2, 2**64) | _json,
        "annotations": st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2) | _json,
    },
)
_documents = st.fixed_dictionaries(
    {},
    optional={
        "schemaVersion": st.just(2) | _json,
        "mediaType": st.sampled_from([oci.OCI_MANIFEST, oci.OCI_INDEX, oci.DOCKER_LIST, ""]) | _json,
        "artifactType": st.text(max_size=10) | _json,
        "config": st.just(_CONFIG) | _descriptors | _json,
        "layers": st.lists(st.just(_LAYER) | _descriptors | _json, max_size=3) | _json,
        "manifests": st.lists(_descriptors | _json, max_size=3) | _json,
        "subject": _descriptors | _json,
        "annotations": st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2) | _json,
    },
)


@given(_documents, st.none() | st.sampled_from([oci.OCI_MANIFEST, oci.OCI_INDEX, "; charset"]) | st.text(max_size=30))
def test_any_document_gives_a_manifest_or_our_error(value: dict[str, Any], content_type: str | None) -> None:
    parsed = outcome(json.dumps(value).encode(), content_type)
    if isinstance(parsed, ContentError):
        assert str(parsed).isprintable()
        return
    assert parsed.media_type.lower() in (oci.OCI_MANIFEST, oci.DOCKER_MANIFEST)
    assert all(layer.size_bytes >= 0 for layer in parsed.layers)


@given(st.binary(max_size=300))
def test_any_bytes_give_a_manifest_or_our_error(data: bytes) -> None:
    with pytest.raises(ContentError):
        parse_manifest(data)
