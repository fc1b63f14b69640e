"""Attributes that pod authors write, and the key of the mount that serves them."""

from __future__ import annotations

import pytest

from csi.errors import InvalidVolumeError
from csi.oci.digest import Digest
from csi.oci.reference import Reference
from csi.oci.view import View
from csi.volume import Verify, mount_key, parse_attributes

DIGEST = Digest.of(b"x")


@pytest.mark.parametrize("key", ["reference", "model.csi.modelpack.org/reference", "modelRef", "image"])
def test_other_drivers_names_of_the_reference_are_accepted(key: str) -> None:
    assert str(parse_attributes({key: "oci://r.io/a/b:1"}).reference) == "r.io/a/b:1"


def test_what_kubernetes_adds_is_ignored() -> None:
    parsed = parse_attributes(
        {"reference": "r.io/a:1", "csi.storage.k8s.io/pod.name": "p", "storage.kubernetes.io/x": "y"}
    )
    assert parsed.reference.tag == "1"


@pytest.mark.parametrize(
    ("attributes", "field"),
    [
        ({}, "reference"),
        ({"reference": "r.io/a:1", "Reference": "x"}, "Reference"),
        ({"reference": "r.io/a:1", "image": "r.io/b:1"}, "image"),
        ({"reference": "r.io/a:1", "verify": "WHOLE"}, "verify"),
        ({"reference": "r.io/a:1", "prefetch": ""}, "prefetch"),
        ({"reference": "r.io/a:1", "verify": "whole", "prefetch": "ondemand"}, "prefetch"),
        ({"reference": "r.io/a:1", "cacheDir": "/etc"}, "cacheDir"),
    ],
)
def test_a_bad_attribute_is_named(attributes: dict[str, str], field: str) -> None:
    with pytest.raises(InvalidVolumeError) as caught:
        parse_attributes(attributes)
    assert caught.value.fields["field"] == field


def test_equal_promises_share_a_mount_and_others_do_not() -> None:
    here, elsewhere = Reference.parse("r.io/a:1"), Reference.parse("evil.io/a:1")
    key = mount_key(here, DIGEST, Verify.WHOLE)
    assert key.mount_id == mount_key(Reference.parse("r.io/a:other"), DIGEST, Verify.WHOLE).mount_id
    assert key.mount_id != mount_key(elsewhere, DIGEST, Verify.WHOLE).mount_id
    assert key.mount_id != mount_key(here, Digest.of(b"y"), Verify.WHOLE).mount_id
    assert len(key.mount_id) == 32


def test_ondemand_implies_chunk_and_nothing_is_decided_without_a_word() -> None:
    assert parse_attributes({"reference": "r.io/a:1"}).verify is None
    assert parse_attributes({"reference": "r.io/a:1", "prefetch": "ondemand"}).verify is Verify.CHUNK


def test_only_verified_blocks_are_shared_between_registries() -> None:
    here, elsewhere = Reference.parse("r.io/a:1"), Reference.parse("mirror.io/a:1")
    assert mount_key(here, DIGEST, Verify.CHUNK) == mount_key(elsewhere, DIGEST, Verify.CHUNK)
    assert mount_key(here, DIGEST, Verify.EAGER) != mount_key(elsewhere, DIGEST, Verify.EAGER)
    layouts = [Reference.parse(f"oci-layout:/{name}:v1") for name in ("a", "b")]
    assert mount_key(layouts[0], DIGEST, Verify.CHUNK) != mount_key(layouts[1], DIGEST, Verify.CHUNK)


def test_the_mount_id_of_a_key_never_changes() -> None:
    """It names cache areas on disk: another value would orphan every cache."""
    key = mount_key(Reference.parse("r.io/a:1"), Digest("sha256", "0" * 64), Verify.WHOLE)
    assert key.mount_id == "7977187f8d588420c51affb2abb392cb"


def test_what_is_shown_is_part_of_the_key() -> None:
    """Two views of one model are two trees, so they may not share inode numbers and a page cache."""
    here = Reference.parse("r.io/a:1")
    views = [
        {},
        {"variant": "q=q4"},
        {"subPath": "models"},
        {"subPath": "models/"},
        {"files": "*.json"},
        {"files": " *.json ,./b"},
        {"files": "*.json,b"},
    ]
    ids = [mount_key(here, DIGEST, Verify.WHOLE, View.parse(view)).mount_id for view in views]
    assert ids[0] == mount_key(here, DIGEST, Verify.WHOLE).mount_id
    assert ids[2] == ids[3]
    assert ids[5] == ids[6]
    assert len(set(ids)) == 5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("subPath", "/models"),
        ("subPath", "../x"),
        ("subPath", "a/../b"),
        ("subPath", "a\nb"),
        ("files", "/x"),
        ("files", "a,,b"),
        ("variant", "x" * 600),
        ("variant", "\x1b[2J"),
    ],
)
def test_a_view_that_cannot_be_is_refused_by_key(key: str, value: str) -> None:
    with pytest.raises(InvalidVolumeError) as caught:
        parse_attributes({"reference": "r.io/a:1", key: value})
    assert caught.value.fields["field"] == key


def test_the_texts_of_a_view_are_the_view() -> None:
    texts = {"variant": "q=q4,linux/amd64", "subPath": "models/a", "files": "*.json,onnx/**"}
    assert View.parse(texts).texts == texts
    assert View.parse({}).texts == {}
    assert not View.parse({"files": "", "subPath": ""})
