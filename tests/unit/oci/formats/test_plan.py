"""A layer that only its bytes can tell to be a directory or a file."""

from __future__ import annotations

import pytest

from csi.oci.descriptor import Descriptor
from csi.oci.digest import Digest
from csi.oci.formats.plan import LayerPlan, Packing

LAYER = LayerPlan(
    descriptor=Descriptor("application/vnd.oci.image.layer.v1.tar+gzip", Digest.of(b"x"), 1),
    packing=Packing.TAR_GZIP,
    path="tokenizer",
    member_root="tokenizer",
    maybe_file=True,
)


@pytest.mark.parametrize("first", ["tokenizer", "tokenizer/", "./tokenizer/vocab.json", "tokenizer/a/b"])
def test_members_below_its_title_make_it_a_directory(first: str) -> None:
    settled = LAYER.settle(first)
    assert (settled.packing, settled.path, settled.member_root) == (Packing.TAR_GZIP, "", "tokenizer")
    assert not settled.maybe_file


@pytest.mark.parametrize("first", [None, "", "other", "tokenizers/vocab.json", "/tokenizer"])
def test_anything_else_is_a_file(first: str | None) -> None:
    settled = LAYER.settle(first)
    assert (settled.packing, settled.path, settled.member_root) == (Packing.RAW, "tokenizer", "")
    assert not settled.maybe_file


def test_a_settled_layer_stays_as_it_is() -> None:
    settled = LAYER.settle("tokenizer/a")
    assert settled.settle(None) is settled
