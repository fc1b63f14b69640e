"""Where a mount's block index comes from: the mount's cache area if it was there before, else the registry.

Either way the chain is the same: the manifest's bytes hash to the digest that was asked for, the index layer's bytes
hash to what the manifest says. So both files in the area may be anything; what does not hash is fetched again. An index that
is no layer of the model hangs on a signature instead (see `csi.fetcher.signed_indexes`).
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from csi.errors import SizeMismatchError, UnsupportedModelError
from csi.fetcher.blobs import read_whole
from csi.integrity import index
from csi.integrity.index import MAX_INDEX_BYTES, BlockIndex
from csi.oci.digest import Digest
from csi.oci.formats import index as variants
from csi.oci.manifest import MAX_MANIFEST_BYTES, Manifest
from csi.oci.modelpack import INDEX_PATH, index_layer_of
from csi.stream.ports import ManifestBytes, ModelSource

if TYPE_CHECKING:
    from csi.fetcher.signed_indexes import SignedIndexes

_INDEX_FILE = "index"
_TIMEOUT_S = 20.0


def has_index(manifest: Manifest) -> bool:
    """Whether the model has a block index as a layer. False for one that cannot be used: others say why."""
    try:
        return index_layer_of(manifest) is not None
    except (UnsupportedModelError, SizeMismatchError):
        return False


def load_index(
    area_fd: int,
    source: ModelSource,
    digest: Digest,
    root: ManifestBytes | None,
    signed: SignedIndexes | None = None,
    variant: str = "",
) -> tuple[BlockIndex, str]:
    """The index of the model `digest`, of that variant if it is an image index, and where it is from: `layer`, or `signed by` a
    key. `root` are the manifest's bytes where the caller has them, already hashed.

    Raises: UnsupportedModelError when it has no index or one that does not fit it, DigestMismatchError when the source
    sends another one, and what the source raises.
    """

    def fetch(wanted: Digest) -> ManifestBytes:
        return _kept_manifest(area_fd, wanted) or source.fetch_manifest(None, wanted, _TIMEOUT_S)

    root = root or fetch(digest)
    chosen, parsed = variants.chosen(root, variant, fetch)
    layer, endorsed = index_layer_of(parsed), None
    if layer is None and signed is not None:
        endorsed = signed.kept(area_fd, chosen.digest) or signed.find(source, chosen.digest).endorsed
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
        data = read_whole(source, layer.digest, layer.size_bytes, "block index")
    name = f"layer {INDEX_PATH}" if endorsed is None else f"signed block index {layer.digest.short()}"
    found = index.load(data, index.file_layers(parsed.layers, layer), f"{name} of model {digest.short()}")
    for manifest in {root.digest: root, chosen.digest: chosen}.values():
        _store(area_fd, _manifest_file(manifest.digest), manifest.data)
    _store(area_fd, _INDEX_FILE, data)
    if endorsed is None or signed is None:
        return found, "layer"
    signed.keep(area_fd, endorsed)
    return found, f"signed by {endorsed.key_id}"


def _manifest_file(digest: Digest) -> str:
    return f"manifest-{digest.hex[:16]}"


def _kept_manifest(area_fd: int, digest: Digest) -> ManifestBytes | None:
    data = _stored(area_fd, _manifest_file(digest), digest, MAX_MANIFEST_BYTES)
    return None if data is None else ManifestBytes(data, "", digest)


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
