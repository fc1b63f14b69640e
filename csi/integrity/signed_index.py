"""A block index of a model that others pushed: a referrer of the model, with a signature that says whose word it is.

The referrer is an image manifest with the model as its subject and two layers: the index, as `csi.integrity.index` writes
it, and a DSSE envelope around an in-toto statement that names the model's digest and the index's. Whoever can write to a
repository can attach a referrer; so an index counts only if a key that this node accepts has signed that it belongs to
that very model.

Ed25519, and ECDSA on P-256 (SHA-256) and P-384 (SHA-384): what `openssl genpkey` and cosign make. The key decides about the
algorithm, the envelope does not.

Source: DSSE protocol v1.0.2 (the pre-authentication encoding), in-toto attestation Statement v1, OCI image-spec 1.1.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from csi.errors import InvalidVolumeError, UnsupportedModelError
from csi.oci.descriptor import Descriptor
from csi.oci.digest import Digest
from csi.oci.manifest import EMPTY_TYPE, OCI_MANIFEST, Manifest
from csi.oci.strict_json import loads_strict

ARTIFACT_TYPE = "application/vnd.modelmount.block-index.v1"
INDEX_TYPE = "application/vnd.modelmount.block-index.v1+protobuf"
ENVELOPE_TYPE = "application/vnd.dsse.envelope.v1+json"
MAX_ENVELOPE_BYTES = 64 * 1024
_EMPTY = b"{}"
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
_PREDICATE_TYPE = "https://modelmount.dev/block-index/v1"
_MAX_SIGNATURES = 8
_CURVES: dict[str, hashes.HashAlgorithm] = {"secp256r1": hashes.SHA256(), "secp384r1": hashes.SHA384()}

PublicKey = ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey
PrivateKey = ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey


def private_key(pem: bytes, password: bytes | None) -> PrivateKey:
    """Raises: InvalidVolumeError for anything but a PEM private key of a kind we sign with."""
    try:
        key = serialization.load_pem_private_key(pem, password)
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise InvalidVolumeError(f"signing key: {exc}", field="key") from None
    if isinstance(key, ed25519.Ed25519PrivateKey) or (
        isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in _CURVES
    ):
        return key
    raise InvalidVolumeError("signing key: expected Ed25519, or ECDSA on P-256 or P-384", field="key")


def public_key(pem: bytes) -> PublicKey:
    """Raises: InvalidVolumeError for anything but a PEM public key of a kind we accept."""
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise InvalidVolumeError(f"index key: not a PEM public key: {exc}", field="index-key") from None
    if isinstance(key, ed25519.Ed25519PublicKey) or (
        isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _CURVES
    ):
        return key
    raise InvalidVolumeError("index key: expected Ed25519, or ECDSA on P-256 or P-384", field="index-key")


def key_id(key: PublicKey) -> str:
    """sha256 of the key in DER, hexadecimal: what people compare."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def make(model: Descriptor, index: bytes, key: PrivateKey) -> tuple[bytes, tuple[tuple[Digest, bytes], ...]]:
    """The referrer of a model that carries its index, signed: its manifest, and the blobs that it names by digest."""
    envelope = _envelope(_statement(model.digest, Digest.of(index)), key)
    layers = [(INDEX_TYPE, index), (ENVELOPE_TYPE, envelope)]
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": ARTIFACT_TYPE,
        "config": _described(EMPTY_TYPE, _EMPTY),
        "layers": [_described(media_type, data) for media_type, data in layers],
        "subject": {"mediaType": model.media_type, "digest": str(model.digest), "size": model.size_bytes},
    }
    data = json.dumps(manifest, separators=(",", ":"), sort_keys=True).encode()
    return data, tuple((Digest.of(blob), blob) for blob in (_EMPTY, index, envelope))


def layers_of(referrer: Manifest, model: Digest) -> tuple[Descriptor, Descriptor]:
    """Index and envelope. Raises: UnsupportedModelError for another manifest than `make` writes."""
    if referrer.subject is None or referrer.subject.digest != model:
        raise UnsupportedModelError("its subject is another model")
    if [layer.media_type for layer in referrer.layers] != [INDEX_TYPE, ENVELOPE_TYPE]:
        raise UnsupportedModelError("its layers are not a block index and its signature")
    index, envelope = referrer.layers
    if envelope.size_bytes > MAX_ENVELOPE_BYTES:
        raise UnsupportedModelError(f"its signature has {envelope.size_bytes} bytes, the limit is {MAX_ENVELOPE_BYTES}")
    return index, envelope


def verify(envelope: bytes, model: Digest, index: Digest, keys: Sequence[PublicKey]) -> str:
    """Whether one of `keys` says that `index` belongs to `model`; the id of that key.

    Raises: UnsupportedModelError that says what is wrong with it.
    """
    document = loads_strict(envelope, "signature", MAX_ENVELOPE_BYTES)
    signatures = document.get("signatures")
    if document.get("payloadType") != _PAYLOAD_TYPE or not isinstance(signatures, list):
        raise UnsupportedModelError("its signature is not an envelope around an in-toto statement")
    payload = _decoded(document.get("payload"))
    signer = _signer(payload, signatures[:_MAX_SIGNATURES], keys)
    if signer is None:
        named = ", ".join(str(one.get("keyid", ""))[:16] for one in signatures[:3] if isinstance(one, dict))
        raise UnsupportedModelError(f"it is signed by no key that this node accepts (its key: {named or 'not named'})")
    if loads_strict(payload, "statement", MAX_ENVELOPE_BYTES) != json.loads(_statement(model, index)):
        raise UnsupportedModelError("what is signed there is about another model or another index")
    return signer


def _signer(payload: bytes, signatures: Sequence[Any], keys: Sequence[PublicKey]) -> str | None:
    message = _encoded_for_signing(payload)
    for one in signatures:
        signature = _decoded(one.get("sig")) if isinstance(one, dict) else b""
        for key in keys:
            try:
                if isinstance(key, ed25519.Ed25519PublicKey):
                    key.verify(signature, message)
                else:
                    key.verify(signature, message, ec.ECDSA(_CURVES[key.curve.name]))
            except InvalidSignature:
                continue
            return key_id(key)
    return None


def _statement(model: Digest, index: Digest) -> bytes:
    statement = {
        "_type": _STATEMENT_TYPE,
        "subject": [{"name": "model", "digest": {model.algorithm: model.hex}}],
        "predicateType": _PREDICATE_TYPE,
        "predicate": {"index": {"digest": {index.algorithm: index.hex}}},
    }
    return json.dumps(statement, separators=(",", ":"), sort_keys=True).encode()


def _envelope(payload: bytes, key: PrivateKey) -> bytes:
    message = _encoded_for_signing(payload)
    if isinstance(key, ed25519.Ed25519PrivateKey):
        signature = key.sign(message)
    else:
        signature = key.sign(message, ec.ECDSA(_CURVES[key.curve.name]))
    envelope = {
        "payloadType": _PAYLOAD_TYPE,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"keyid": key_id(key.public_key()), "sig": base64.b64encode(signature).decode()}],
    }
    return json.dumps(envelope, separators=(",", ":"), sort_keys=True).encode()


def _encoded_for_signing(payload: bytes) -> bytes:
    kind = _PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def _decoded(text: object) -> bytes:
    try:
        return base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except (binascii.Error, ValueError):
        return b""


def _described(media_type: str, data: bytes) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": str(Digest.of(data)), "size": len(data)}
