"""The last part of a layer's media type: how its files are packed."""

from __future__ import annotations

from csi.errors import UnsupportedModelError
from csi.oci.formats.plan import Packing

_SUFFIXES = {
    "tar": Packing.TAR,
    "tar+gzip": Packing.TAR_GZIP,
    "tar.gzip": Packing.TAR_GZIP,
    "tar+zstd": Packing.TAR_ZSTD,
    "tar.zstd": Packing.TAR_ZSTD,
}


def packing_of(suffix: str, media_type: str, what: str) -> Packing:
    """`tar+gzip` → TAR_GZIP; whatever does not begin with `tar` is the file as it is (`raw`, `gguf`, `safetensors`).

    Raises: UnsupportedModelError for a compression that is not mounted.
    """
    if packing := _SUFFIXES.get(suffix):
        return packing
    if suffix.startswith("tar") or (suffix.startswith("raw") and suffix != "raw"):
        raise UnsupportedModelError(
            f"{what}: media type {media_type} is compressed in a way that is not mounted; known are tar, tar+gzip, "
            "tar+zstd and uncompressed files; pack the model again",
            media_type=media_type,
        )
    return Packing.RAW
