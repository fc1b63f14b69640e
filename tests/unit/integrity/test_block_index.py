"""The block index: what is written is read back, and nothing else is."""

from __future__ import annotations

import hashlib
import io
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi.errors import UnsupportedModelError
from csi.integrity import index
from csi.integrity.index import BlobHashes
from csi.oci.descriptor import Descriptor
from csi.oci.digest import Digest
from csi.oci.formats.detect import plan_of
from csi.oci.manifest import parse_manifest
from csi.oci.modelpack import INDEX_PATH, ModelDescription, SourceFile, index_layer_of, pack
from csi.stream.blocks import BLOCK_BYTES
from csi.wire import index_pb2


def blob(content: bytes) -> BlobHashes:
    return index.hash_file(io.BytesIO(content))


SMALL = blob(b"hello")
EMPTY = blob(b"")
LARGE = blob(random.Random(1).randbytes(BLOCK_BYTES + 5))
BLOBS = (SMALL, EMPTY, LARGE)


def layers_of(*blobs: BlobHashes) -> list[Descriptor]:
    return [Descriptor("application/vnd.cncf.model.weight.v1.raw", item.digest, item.size_bytes) for item in blobs]


def test_golden_bytes() -> None:
    """Models that were pushed carry these bytes: a change needs another version, and a reader of both."""
    data = index.dump([SMALL, EMPTY])
    assert data.hex() == (
        "080112740a477368613235363a3263663234646261356662306133306532366538336232616335623965323965316231363165356331"
        "66613734323565373330343333363239333862393832341005188080800220012a20ea8f163db38682925e4491c5e58d4bb3506ef8c1"
        "4eb78a86e908c5624a67200f12500a477368613235363a65336230633434323938666331633134396166626634633839393666623932"
        "34323761653431653436343962393334636134393539393162373835326238353518808080022001"
    )
    assert hashlib.sha256(index.dump(BLOBS)).hexdigest() == (
        "99091e775235cb0e8c03b5f95cca0bcbad85d4fbe1fa2533c7ff9a346141f75b"
    )


@given(st.permutations(BLOBS), st.lists(st.sampled_from(BLOBS)))
def test_the_order_and_repetition_of_blobs_do_not_matter(ordered: list[BlobHashes], again: list[BlobHashes]) -> None:
    assert index.dump([*ordered, *again]) == index.dump(BLOBS)


def test_what_is_written_is_read_back() -> None:
    found = index.load(index.dump(BLOBS), layers_of(*BLOBS), "index")
    assert dict(found) == {item.digest: item for item in BLOBS}


def test_a_block_is_right_only_whole_and_unchanged_and_in_its_place() -> None:
    content = random.Random(1).randbytes(BLOCK_BYTES + 5)
    first, second = content[:BLOCK_BYTES], content[BLOCK_BYTES:]
    assert LARGE.is_right(0, first)
    assert LARGE.is_right(1, second)
    assert LARGE.digest == Digest.of(content)
    assert not LARGE.is_right(0, second)
    assert not LARGE.is_right(1, second[:-1])
    assert not LARGE.is_right(2, b"")
    for position in (0, 1, BLOCK_BYTES // 2, BLOCK_BYTES - 1):
        damaged = bytearray(first)
        damaged[position] ^= 1
        assert not LARGE.is_right(0, damaged)


def changed(**fields: object) -> bytes:
    """An index of `SMALL` with other fields."""
    parsed = index_pb2.BlockIndex.FromString(index.dump([SMALL]))
    for name, value in fields.items():
        setattr(parsed if name == "version" else parsed.blobs[0], name, value)
    return parsed.SerializeToString()


REFUSED = {
    "another version": (changed(version=2), "of version 2"),
    "no version": (changed(version=0), "of version 0"),
    "another size": (changed(size_bytes=6), "6 bytes here, 5 in the manifest"),
    "another block size": (changed(block_bytes=1024), "blocks of 1024 bytes"),
    "another algorithm": (changed(algorithm=0), "hash 0"),
    "too few hashes": (changed(hashes=b""), "0 bytes of hashes for 1 blocks"),
    "too many hashes": (changed(hashes=bytes(64)), "64 bytes of hashes for 1 blocks"),
    "half a hash": (changed(hashes=bytes(31)), "31 bytes of hashes"),
    "no digest": (changed(digest="sha256:12"), "64 lower-case hex digits"),
    "a blob of another model": (changed(digest=str(LARGE.digest)), "no layer of the model"),
    "the same blob twice": (index.dump([SMALL]) + index.dump([SMALL])[2:], "twice"),
    "no blob": (index.dump([]), "no hashes of"),
    "no protobuf": (b"\xff\xff\xff", "not a block index"),
    "nothing": (b"", "of version 0"),
}


@pytest.mark.parametrize(("data", "problem"), REFUSED.values(), ids=REFUSED)
def test_anything_inconsistent_is_refused(data: bytes, problem: str) -> None:
    with pytest.raises(UnsupportedModelError, match=problem):
        index.load(data, layers_of(SMALL), "index")


def test_too_large_an_index_is_refused_unread() -> None:
    with pytest.raises(UnsupportedModelError, match="the limit is"):
        index.load(bytes(index.MAX_INDEX_BYTES + 1), [], "index")


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_or_consistent(data: bytes) -> None:
    try:
        found = index.load(data, layers_of(SMALL), "index")
    except UnsupportedModelError:
        return
    assert set(found) == {SMALL.digest}


@given(st.integers(0, len(index.dump(BLOBS)) - 1), st.integers(1, 255))
def test_a_flipped_byte_is_refused_or_makes_other_hashes(position: int, flip: int) -> None:
    data = bytearray(index.dump(BLOBS))
    data[position] ^= flip
    try:
        found = index.load(bytes(data), layers_of(*BLOBS), "index")
    except UnsupportedModelError:
        return
    assert {(item.digest, item.size_bytes) for item in found.values()} == {(b.digest, b.size_bytes) for b in BLOBS}


def test_a_packed_model_carries_its_index_as_a_layer_that_is_no_file() -> None:
    sources = [SourceFile("a.safetensors", SMALL.digest, SMALL.size_bytes), SourceFile("e", EMPTY.digest, 0)]
    data = index.dump([SMALL, EMPTY])
    manifest = parse_manifest(pack(sources, ModelDescription(), data).manifest)
    layer = index_layer_of(manifest)
    assert layer is not None
    assert (layer.digest, layer.size_bytes) == (Digest.of(data), len(data))
    assert layer.media_type == "application/vnd.cncf.model.doc.v1.raw"
    assert [file.path for file in plan_of(manifest).layers] == ["e", "a.safetensors"]
    assert set(index.load(data, index.file_layers(manifest.layers, layer), INDEX_PATH)) == {SMALL.digest, EMPTY.digest}
    assert index_layer_of(parse_manifest(pack(sources, ModelDescription()).manifest)) is None
