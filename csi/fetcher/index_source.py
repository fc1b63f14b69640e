"""Where a mount's block index comes from: the mount's cache area if it was there before, else the registry.

Either way the chain is the same: the manifest's bytes hash to the digest that was asked for, the index layer's bytes
hash to what the manifest says. So both files in the area may be anything; what does not hash is fetched again. An index that
is no layer of the model hangs on a signature instead (see `csi.fetcher.signed_indexes`).
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from csi.errors import DigestMismatchError, SizeMismatchError, UnsupportedModelError
from csi.integrity import index
from csi.integrity.index import MAX_INDEX_BYTES, BlockIndex
from csi.oci.digest import Digest
from csi.oci.manifest import MAX_MANIFEST_BYTES, parse_manifest
from csi.oci.modelpack import INDEX_PATH, index_layer_of
from csi.stream.ports import ModelSource

if TYPE_CHECKING:
    from csi.fetcher.signed_indexes import SignedIndexes

_MANIFEST_FILE, _INDEX_FILE = "manifest", "index"
_TIMEOUT_S = 20.0
_TRIES = 2  # what was damaged on the way is right the next time


def has_index(manifest: bytes) -> bool:
    """Whether the model has a block index as a layer. False for what is no manifest: others say why."""
    try:
        return index_layer_of(parse_manifest(manifest)) is not None
    except (UnsupportedModelError, SizeMismatchError):
        return False


def load_index(
    area_fd: int,
    source: ModelSource,
    digest: Digest,
    manifest: bytes | None,
    signed: SignedIndexes | None = None,
) -> tuple[BlockIndex, str]:
    """The index of the model `digest`, and where it is from: `layer`, or `signed by` a key. `manifest` are its bytes where
    the caller has them, already hashed.

    Raises: UnsupportedModelError when it has no index or one that does not fit it, DigestMismatchError when the source
    sends another one, and what the source raises.
    """
    if manifest is None:
        manifest = _stored(area_fd, _MANIFEST_FILE, digest, MAX_MANIFEST_BYTES)
    if manifest is None:
        manifest = source.fetch_manifest(None, digest, _TIMEOUT_S).data
    parsed = parse_manifest(manifest)
    layer, endorsed = index_layer_of(parsed), None
    if layer is None and signed is not None:
        endorsed = signed.kept(area_fd, digest) or signed.find(source, digest).endorsed
        layer = endorsed.index if endorsed is not None else None
    if layer is None:
        raise UnsupportedModelError(
            f"model {digest.short()}: has no block index, which 'verify: chunk' and 'prefetch: ondemand' need; push it "
            "again with 'modelmount push', or leave both out"
        )
    if layer.size_bytes > MAX_INDEX_BYTES:
        raise UnsupportedModelError(
            f"model {digest.short()}: its block index has {layer.size_bytes} bytes, the limit is {MAX_INDEX_BYTES}"
        )
    data = _stored(area_fd, _INDEX_FILE, layer.digest, layer.size_bytes)
    if data is None:
        data = _fetched(source, layer.digest, layer.size_bytes)
    name = f"layer {INDEX_PATH}" if endorsed is None else f"signed block index {layer.digest.short()}"
    found = index.load(data, index.file_layers(parsed.layers, layer), f"{name} of model {digest.short()}")
    _store(area_fd, _MANIFEST_FILE, manifest)
    _store(area_fd, _INDEX_FILE, data)
    if endorsed is None or signed is None:
        return found, "layer"
    signed.keep(area_fd, endorsed)
    return found, f"signed by {endorsed.key_id}"


def _fetched(source: ModelSource, digest: Digest, size_bytes: int) -> bytes:
    data = bytearray(size_bytes)
    for _ in range(_TRIES):
        if size_bytes:
            reader = source.open_range(digest, size_bytes, 0, size_bytes)
            try:
                reader.readinto(memoryview(data))
            finally:
                reader.close()
        actual = Digest.of(memoryview(data), digest.algorithm)
        if actual == digest:
            return bytes(data)
    raise DigestMismatchError(
        f"block index {digest.short()} from {source.origin}: the {size_bytes} bytes received hash to {actual.short()}; "
        "check the registry's storage, or push the model again",
        expected=str(digest),
        actual=str(actual),
        subject=str(digest),
    )


def _stored(area_fd: int, name: str, digest: Digest, limit_bytes: int) -> bytes | None:
    """The file's content if it is what `digest` names."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=area_fd)
    except OSError:
        return None
    with open(fd, "rb") as file:
        content = file.read(limit_bytes + 1)
    return content if Digest.of(content, digest.algorithm) == digest else None


def _store(area_fd: int, name: str, content: bytes) -> None:
    """A cache that cannot be written costs a fetch at the next start, nothing else."""
    with contextlib.suppress(OSError):
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640, dir_fd=area_fd)
        with open(fd, "wb") as file:
            file.write(content)
