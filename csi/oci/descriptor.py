"""Descriptors: what a manifest says about a blob. Source: OCI image-spec, descriptor.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from csi.oci.digest import Digest


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A blob by media type, digest and size in bytes."""

    media_type: str
    digest: Digest
    size_bytes: int
    annotations: Mapping[str, str] = field(default_factory=dict)
