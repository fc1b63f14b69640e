"""A block index that somebody attached: what is signed is the pair of a model and an index, by a key that is accepted."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st

from csi.errors import InvalidVolumeError, ModelMountError, UnsupportedModelError
from csi.integrity import signed_index
from csi.integrity.signed_index import PrivateKey
from csi.oci.descriptor import Descriptor
from csi.oci.digest import Digest
from csi.oci.manifest import OCI_MANIFEST, Manifest, parse, parse_referrer

MODEL = Descriptor(OCI_MANIFEST, Digest.of(b"a model"), 7)
INDEX = b"an index"
KEYS: dict[str, PrivateKey] = {
    "ed25519": ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(32))),
    "p256": ec.derive_private_key(7, ec.SECP256R1()),
    "p384": ec.derive_private_key(7, ec.SECP384R1()),
}
ED = KEYS["ed25519"]


def parts(key: PrivateKey = ED) -> tuple[bytes, bytes]:
    """Manifest and envelope."""
    manifest, blobs = signed_index.make(MODEL, INDEX, key)
    return manifest, blobs[2][1]


@pytest.mark.parametrize("name", KEYS)
def test_what_is_made_is_accepted_with_its_key_and_no_other(name: str) -> None:
    key = KEYS[name]
    manifest, envelope = parts(key)
    referrer = parse_referrer(manifest)
    assert isinstance(referrer, Manifest)
    index, signature = signed_index.layers_of(referrer, MODEL.digest)
    assert (index.digest, index.size_bytes) == (Digest.of(INDEX), len(INDEX))
    assert signature.digest == Digest.of(envelope)
    own = signed_index.key_id(key.public_key())
    others = [other.public_key() for other in KEYS.values() if other is not key]
    assert signed_index.verify(envelope, MODEL.digest, index.digest, [*others, key.public_key()]) == own
    with pytest.raises(UnsupportedModelError, match="signed by no key that this node accepts"):
        signed_index.verify(envelope, MODEL.digest, index.digest, others)
    with pytest.raises(UnsupportedModelError, match="signed by no key"):
        signed_index.verify(envelope, MODEL.digest, index.digest, [])


def test_golden_bytes() -> None:
    """Nodes of other versions read these: a change needs another media type. Ed25519 signs the same way each time."""
    manifest, envelope = parts()
    assert Digest.of(manifest).hex == "b82afa21d8e74e743bc5b7bff426fcc40b60e03f59329aae5c78ed600081d7bf"
    assert Digest.of(envelope).hex == "c6a9137ac5a1a87ab86e99575d8c3bb2260338ca1364dd0120aec6a039cc7340"


def test_a_signature_of_another_model_or_index_does_not_count() -> None:
    _, envelope = parts()
    keys = [ED.public_key()]
    for model, index in ((Digest.of(b"other"), Digest.of(INDEX)), (MODEL.digest, Digest.of(b"other"))):
        with pytest.raises(UnsupportedModelError, match="another model or another index"):
            signed_index.verify(envelope, model, index, keys)


def changed(**fields: Any) -> bytes:
    return json.dumps(json.loads(parts()[1]) | fields).encode()


REFUSED = {
    "other payload type": changed(payloadType="application/json"),
    "no signatures": changed(signatures=[]),
    "signatures no list": changed(signatures={}),
    "other payload": changed(payload=base64.b64encode(b"{}").decode()),
    "payload no base64": changed(payload="?"),
    "no payload": changed(payload=None),
    "no envelope": b"[]",
    "nothing": b"",
}


@pytest.mark.parametrize("envelope", REFUSED.values(), ids=REFUSED)
def test_anything_else_is_refused(envelope: bytes) -> None:
    with pytest.raises(UnsupportedModelError):
        signed_index.verify(envelope, MODEL.digest, Digest.of(INDEX), [ED.public_key()])


@given(st.data())
def test_no_flipped_byte_of_an_envelope_makes_another_thing_signed(data: st.DataObject) -> None:
    envelope = bytearray(parts()[1])
    envelope[data.draw(st.integers(0, len(envelope) - 1))] ^= data.draw(st.integers(1, 255))
    other = Digest.of(b"other")
    for model, index in ((other, Digest.of(INDEX)), (MODEL.digest, other)):
        with pytest.raises(ModelMountError):
            signed_index.verify(bytes(envelope), model, index, [ED.public_key()])


def test_a_referrer_of_another_model_or_with_other_layers_is_refused() -> None:
    document = json.loads(parts()[0])
    with pytest.raises(UnsupportedModelError, match="subject"):
        signed_index.layers_of(_parsed(document), Digest.of(b"other"))
    layers: list[Any]
    for layers in ([], document["layers"][:1], document["layers"][::-1]):
        with pytest.raises(UnsupportedModelError, match="layers"):
            signed_index.layers_of(_parsed(document | {"layers": layers}), MODEL.digest)


def _parsed(document: dict[str, Any]) -> Manifest:
    parsed = parse_referrer(json.dumps(document).encode())
    assert isinstance(parsed, Manifest)
    return parsed


def test_it_is_no_model() -> None:
    with pytest.raises(UnsupportedModelError, match="a block index, not a model"):
        parse(parts()[0])


def test_keys_are_read_from_pem_and_other_kinds_are_refused() -> None:
    for key in KEYS.values():
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        assert signed_index.key_id(signed_index.public_key(public)) == signed_index.key_id(
            signed_index.private_key(private, None).public_key()
        )
        with pytest.raises(InvalidVolumeError):
            signed_index.public_key(private)
        with pytest.raises(InvalidVolumeError):
            signed_index.private_key(public, None)
    rsa_key = rsa.generate_private_key(65537, 2048)
    pem = rsa_key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with pytest.raises(InvalidVolumeError, match="expected Ed25519"):
        signed_index.private_key(pem, None)
