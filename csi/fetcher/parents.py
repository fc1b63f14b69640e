"""Which other model a model builds on, found out before there is a mount: the parent is part of what is mounted, so it has
to be known, and pinned, as early as the model itself.

The worker reads the same files again, and decides what they mean for the tree.
"""

from __future__ import annotations

from csi.errors import UnsupportedModelError
from csi.fetcher.blobs import read_whole
from csi.oci.formats import kitops
from csi.oci.formats.detect import MAX_CONFIG_BYTES, needs_config, plan_of
from csi.oci.manifest import Manifest
from csi.stream.ports import ModelSource


def parent_of(manifest: Manifest, source: ModelSource) -> str | None:
    """The reference of the kit that this one builds on. None also for what cannot be mounted: the worker says why.

    Raises: what the source raises while the Kitfile is read, DigestMismatchError.
    """
    if not kitops.matches(manifest) or manifest.config.size_bytes > MAX_CONFIG_BYTES:
        return None
    config = None
    if needs_config(manifest):
        config = read_whole(source, manifest.config.digest, manifest.config.size_bytes, "Kitfile")
    try:
        return plan_of(manifest, config).parent
    except UnsupportedModelError:
        return None
