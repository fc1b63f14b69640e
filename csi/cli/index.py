"""`modelmount index build`: a signed block index for a model that others pushed."""

from __future__ import annotations

import argparse
import json
import mmap
import sys
import time
from typing import Any

from csi.cli.found_model import FoundModel, add_source_flags, open_finder
from csi.cli.sizes import size_text
from csi.errors import InvalidVolumeError, RegistryUnavailableError, UnsupportedModelError
from csi.integrity import index, signed_index
from csi.integrity.index import BlobHashes
from csi.integrity.signed_index import PrivateKey
from csi.oci.descriptor import Descriptor
from csi.oci.digest import Digest, wrong_bytes
from csi.oci.modelpack import index_layer_of
from csi.registry.pushing import Referrer
from csi.stream import blocks
from csi.stream.ports import ModelSource

_TRIES = 6  # in a row, without a block in between
_FIRST_DELAY_S, _MAX_DELAY_S = 0.5, 10.0


def add_parser(subparsers: Any) -> None:
    """Register the verb."""
    parser = subparsers.add_parser("index", help="block indexes of models that others pushed")
    verbs = parser.add_subparsers(dest="index_verb", metavar="VERB", required=True)
    build = verbs.add_parser(
        "build",
        help="read a model once, attach its block index, signed",
        description="Read every byte of a model once, check it, and attach the BLAKE3 hash of every 4 MiB as a referrer of the "
        "model, signed. Nodes that accept the key (--index-key) then mount the model with 'verify: chunk'. Models that "
        "'modelmount push' made carry an index already.",
        epilog="A key: openssl genpkey -algorithm ed25519 -out index.key; nodes get openssl pkey -in index.key -pubout.",
    )
    add_source_flags(build)
    build.add_argument("--variant", default="", help="which manifest of an index: a digest, a platform, or annotations")
    build.add_argument(
        "--key", required=True, metavar="FILE", help="private key to sign with: PEM, Ed25519 or ECDSA P-256 or P-384"
    )
    build.add_argument("--output", choices=["text", "json"], default="text", help="what stdout gets (default: text)")
    build.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Read, check, sign, attach; progress on stderr, the outcome on stdout. Returns 0.

    Raises: InvalidVolumeError for wrong usage, any other ModelMountError for what failed.
    """
    key = _key(args.key)  # before hours of reading
    with open_finder(args) as finder:
        found = finder.find(args.variant)
        model, layers = _checked(found)
        hashed = {layer.digest: layer for layer in layers}
        blobs = [_hash(finder.source, layer) for layer in hashed.values()]
        data = index.dump(blobs)
        manifest, stored = signed_index.make(model, data, key)
        referrer = Referrer(manifest, Digest.of(manifest), signed_index.ARTIFACT_TYPE, stored)

        from csi.registry.upload import ModelUploader  # only now: oras and its libraries are slow to import

        uploader = ModelUploader(found.reference, plain_http=args.plain_http, credentials=finder.credentials)
        try:
            uploader.attach(referrer, model.digest)
        finally:
            uploader.close()
    outcome = {
        "model": f"{found.reference.origin}@{model.digest}",
        "index": f"{found.reference.origin}@{referrer.digest}",
        "index_bytes": len(data),
        "key_id": signed_index.key_id(key.public_key()),
        "read_bytes": sum(blob.size_bytes for blob in blobs),
    }
    print(outcome["index"] if args.output == "text" else json.dumps(outcome, sort_keys=True))
    return 0


def _key(path: str) -> PrivateKey:
    try:
        with open(path, "rb") as file:
            return signed_index.private_key(file.read(), None)
    except OSError as exc:
        raise InvalidVolumeError(f"--key {path}: {exc.strerror}", field="key") from exc


def _checked(found: FoundModel) -> tuple[Descriptor, tuple[Descriptor, ...]]:
    """The model's manifest as a descriptor, and its layers. Raises: what makes an index impossible or needless."""
    if found.undecided is not None:
        raise found.undecided
    assert found.manifest is not None
    assert found.manifest_bytes is not None
    if found.reference.is_layout:
        raise InvalidVolumeError("a layout directory has no referrers: push its model again", field="reference")
    if index_layer_of(found.manifest) is not None:
        raise UnsupportedModelError(f"{found.reference}: carries a block index already; there is nothing to do")
    data = found.manifest_bytes
    return Descriptor(found.manifest.media_type, data.digest, len(data.data)), found.manifest.layers


def _hash(source: ModelSource, layer: Descriptor) -> BlobHashes:
    """One pass over a blob, gone on with where the connection broke. Raises: DigestMismatchError, RegistryError."""
    hasher, hashes, offset, failures = layer.digest.hasher(), bytearray(), 0, 0
    buffer = memoryview(mmap.mmap(-1, blocks.BLOCK_BYTES))  # aligned: copies into it cost a fraction
    while offset < layer.size_bytes:
        try:
            reader = source.open_range(layer.digest, layer.size_bytes, offset, layer.size_bytes - offset)
            try:
                while offset < layer.size_bytes:
                    block = buffer[: blocks.block_length(layer.size_bytes, offset // blocks.BLOCK_BYTES)]
                    reader.readinto(block)
                    hasher.update(block)
                    hashes += index.hash_of(block)
                    offset, failures = offset + len(block), 0
            finally:
                reader.close()
        except RegistryUnavailableError as exc:
            failures += 1
            if failures == _TRIES:
                raise
            print(f"{exc}; trying again", file=sys.stderr)
            time.sleep(min(_MAX_DELAY_S, _FIRST_DELAY_S * 2**failures))
    actual = Digest(layer.digest.algorithm, hasher.hexdigest())
    if actual != layer.digest:
        what = f"blob {layer.digest.short()} from {source.origin}"
        raise wrong_bytes(what, layer.digest, actual, layer.size_bytes, "nothing was attached")
    print(f"{size_text(layer.size_bytes):>10}  {layer.digest.short()}", file=sys.stderr)
    return BlobHashes(layer.digest, layer.size_bytes, bytes(hashes))
