"""What a reference names: asked of its registry, or read from a manifest that is on this node already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from csi.cache.format import SHARED_FROM_BYTES
from csi.control import wire
from csi.errors import ControlError, DigestMismatchError, SizeMismatchError, UnsupportedModelError
from csi.fetcher.answers import Answers, read_and_close
from csi.fetcher.index_source import has_index
from csi.fetcher.mount_sources import MountSources
from csi.fetcher.parents import parent_of
from csi.fetcher.possession import prove_possession
from csi.integrity.index import BlockIndex
from csi.oci.digest import Digest
from csi.oci.formats import index as variants
from csi.oci.manifest import MAX_MANIFEST_BYTES, Manifest, parse_manifest
from csi.oci.reference import Reference
from csi.stream.ports import ManifestBytes, ModelSource

if TYPE_CHECKING:
    from csi.fetcher.signed_indexes import SignedIndexes

_MAX_REASON = 1000
_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class _Found:
    """What a manifest is or leads to. `chosen` is None where it was not looked at, or where the worker says what is wrong
    with it.
    """

    chosen: Manifest | None = None
    indexed: bool = False
    index_ignored: str = ""
    parent: str | None = None


class Resolver:
    """Remembers what it found until the mount starts: the model's manifest, and those of its parents."""

    def __init__(self, answers: Answers, sources: MountSources, signed_indexes: SignedIndexes | None) -> None:
        self._answers, self._sources, self._signed_indexes = answers, sources, signed_indexes
        self._root: ManifestBytes | None = None
        self._manifests: dict[str, list[Manifest]] = {}
        """By origin."""

    def resolve(self, request: wire.Message, fds: list[int], index: BlockIndex | None) -> None:
        """Also the access check: the answer shows that these credentials may read that manifest, now, and with `prove`
        that the registry has the model's blobs and not only its manifest.
        """
        with self._answers.failures_of(request):
            reference = Reference.parse(wire.field(request, "reference", str))
            source = self._sources.open(reference, request, request.get("credentials"), fds)
            try:
                timeout_s = float(request.get("registry_timeout_s", _TIMEOUT_S))
                manifest = source.fetch_manifest(reference.tag, reference.digest, timeout_s)
                if request.get("prove"):
                    if index is None:
                        raise ControlError("fetcher: nothing to prove without a block index; try again")
                    prove_possession(source, index)
                # Later ones are access checks, or the manifest that an index led to.
                first = not self._sources.origins.own
                found = self._look(source, manifest, str(request.get("variant", ""))) if first else _Found()
            finally:
                source.close()
            self._say(request, manifest, reference.origin, found)

    def use_known(self, request: wire.Message, manifest_fd: int) -> None:
        """Raises: DigestMismatchError for bytes that are not what their digest names."""
        data = read_and_close(manifest_fd, MAX_MANIFEST_BYTES, "manifest")
        digest = Digest.parse(wire.field(request, "digest", str))
        if Digest.of(data, digest.algorithm) != digest:
            raise DigestMismatchError(f"kept manifest {digest.short()}: has other bytes", subject=str(digest))
        manifest = ManifestBytes(data, wire.field(request, "media_type", str), digest)
        indexed = wire.field(request, "indexed", bool)
        try:
            chosen = parse_manifest(data, manifest.media_type)
            # That there is a signed index was found out when the manifest was kept; whether it still counts shows at `start`.
            found = _Found(chosen, has_index(chosen) or (self._signed_indexes is not None and indexed))
        except (UnsupportedModelError, SizeMismatchError):  # an index, or what the worker says what is wrong with
            found = _Found(None, indexed)
        self._say(request, manifest, wire.field(request, "origin", str), found)

    def take(self) -> tuple[ManifestBytes | None, dict[str, list[Manifest]]]:
        """What was found: the bytes of the first manifest, and by origin every manifest of a model. Forgotten then."""
        taken, self._root, self._manifests = (self._root, self._manifests), None, {}
        return taken

    def _look(self, source: ModelSource, root: ManifestBytes, variant: str) -> _Found:
        """Raises: what the registry answers about a manifest that an index leads to, a parent, or a signed index."""
        try:
            sent, chosen = variants.chosen(
                root, variant, lambda digest: source.fetch_manifest(None, digest, _TIMEOUT_S)
            )
        except (UnsupportedModelError, SizeMismatchError):
            return _Found()
        parent = parent_of(chosen, source)
        if has_index(chosen) or self._signed_indexes is None:
            return _Found(chosen, has_index(chosen), parent=parent)
        search = self._signed_indexes.find(source, sent.digest)
        return _Found(chosen, search.endorsed is not None, search.ignored, parent)

    def _say(self, request: wire.Message, manifest: ManifestBytes, origin: str, found: _Found) -> None:
        if not self._sources.origins.own:
            self._root = self._root or manifest
        if found.chosen is not None:
            self._manifests.setdefault(origin, []).append(found.chosen)
        self._answers.ok_with(
            request,
            "manifest",
            manifest.data,
            digest=str(manifest.digest),
            media_type=manifest.media_type,
            indexed=found.indexed,
            index_ignored=found.index_ignored[:_MAX_REASON],
            parent=found.parent,
        )


def is_shareable(size_bytes: int) -> bool:
    """Whether a blob is worth the store's work."""
    return size_bytes >= SHARED_FROM_BYTES


def shareable(manifests: Sequence[Manifest]) -> list[tuple[str, int]]:
    """Digest and size of every such layer. None after a restart: they are shared by then."""
    layers = (layer for manifest in manifests for layer in manifest.layers)
    return [(str(layer.digest), layer.size_bytes) for layer in layers if is_shareable(layer.size_bytes)]
