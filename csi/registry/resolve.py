"""What a reference stands for right now: its digest and how many bytes it has. Blocking.

The manifest's own sizes are all that is read of a model here; no blob is opened.
"""

from __future__ import annotations

from dataclasses import dataclass

from csi.oci.digest import Digest
from csi.oci.formats import index
from csi.oci.reference import Reference
from csi.registry.sources import SourceSettings, open_source


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """`size_bytes`: the layers as the registry stores them; compressed ones are larger when mounted."""

    digest: Digest
    size_bytes: int


def resolve_model(reference: Reference, settings: SourceSettings, timeout_s: float, variant: str = "") -> ResolvedModel:
    """One manifest, fetched once and hashed; with an index that one, and the size of the manifest it leads to with
    `variant` (see `csi.oci.formats.index.pick`) on a machine like this.

    Raises: ModelNotFoundError, RegistryAuthError, RegistryUnavailableError, RegistryError, ContentError;
    UnsupportedModelError for an index that leaves open which of its manifests is the model.
    """
    source = open_source(reference, settings)
    try:
        found = source.fetch_manifest(reference.tag, reference.digest, timeout_s)
        _, manifest = index.chosen(found, variant, lambda digest: source.fetch_manifest(None, digest, timeout_s))
    finally:
        source.close()
    return ResolvedModel(found.digest, sum(layer.size_bytes for layer in manifest.layers))
