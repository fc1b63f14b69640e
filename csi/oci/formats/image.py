"""Ordinary container images that carry a model ("model cars"): a file system in layers, the later layer wins.

Source: OCI image-spec layer.md, config.md; Docker's image manifest, schema 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from csi.oci.formats import layer_names
from csi.oci.formats.plan import LayerPlan, ModelFormat, ModelPlan, Packing
from csi.oci.manifest import Manifest

CONFIG_TYPES = ("application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json")
_OCI = "application/vnd.oci.image.layer."
_DOCKER = "application/vnd.docker.image.rootfs."
LAYER_TYPES = {
    f"{_OCI}v1.tar": Packing.TAR,
    f"{_OCI}v1.tar+gzip": Packing.TAR_GZIP,
    f"{_OCI}v1.tar+zstd": Packing.TAR_ZSTD,
    f"{_OCI}nondistributable.v1.tar": Packing.TAR,
    f"{_OCI}nondistributable.v1.tar+gzip": Packing.TAR_GZIP,
    f"{_OCI}nondistributable.v1.tar+zstd": Packing.TAR_ZSTD,
    f"{_DOCKER}diff.tar": Packing.TAR,
    f"{_DOCKER}diff.tar.gzip": Packing.TAR_GZIP,
    f"{_DOCKER}diff.tar.zstd": Packing.TAR_ZSTD,
    f"{_DOCKER}foreign.diff.tar": Packing.TAR,
    f"{_DOCKER}foreign.diff.tar.gzip": Packing.TAR_GZIP,
}


def may_match(manifest: Manifest) -> bool:
    """Config and layers are those of an image, and no artifact type says otherwise."""
    config_type = manifest.config.media_type.lower()
    return (
        config_type in CONFIG_TYPES
        and manifest.artifact_type.lower() in ("", config_type)
        and bool(manifest.layers)
        and all(layer.media_type.lower() in LAYER_TYPES for layer in manifest.layers)
    )


def needs_config(manifest: Manifest) -> bool:
    """Named layers of image types may be an artifact's files as well: then the config decides."""
    return any(layer_names.name_of(layer) for layer in manifest.layers)


def is_image_config(config: Mapping[str, Any]) -> bool:
    """Whether it lists the layers of a file system. An artifact that only borrows the type does not."""
    rootfs = config.get("rootfs")
    diff_ids = rootfs.get("diff_ids", rootfs.get("diffIds")) if isinstance(rootfs, dict) else None
    return isinstance(diff_ids, list) and bool(diff_ids)


def plan(manifest: Manifest) -> ModelPlan:
    """Every layer an archive, later ones above earlier ones."""
    layers = tuple(
        LayerPlan(descriptor=layer, packing=LAYER_TYPES[layer.media_type.lower()]) for layer in manifest.layers
    )
    return ModelPlan(format=ModelFormat.IMAGE, layers=layers, is_overlay=True)
