"""Manifests: bytes in, values out, with every limit and every refusal that does not depend on a model format.

Source: OCI image-spec manifest.md and image-index.md; limits after the advisories on ambiguous manifests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from csi.errors import InvalidVolumeError, UnsupportedModelError
from csi.oci.descriptor import Descriptor
from csi.oci.digest import Digest
from csi.oci.strict_json import loads_strict

MAX_MANIFEST_BYTES = 4 * 1024 * 1024
MAX_LAYERS = 10_000
_MAX_TOTAL_BYTES = 2**63 - 1

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"

# Things that hang on a model and are never one, by the media types that give them away.
_ATTACHMENTS = {
    "application/vnd.dev.cosign.simplesigning.v1+json": "a signature",
    "application/vnd.dev.cosign.artifact.sig.v1+json": "a signature",
    "application/vnd.dev.sigstore.bundle.": "a signature or attestation",
    "application/vnd.cncf.notary.signature": "a signature",
    "application/vnd.in-toto+json": "an attestation",
    "application/vnd.dsse.envelope.v1+json": "an attestation",
    "application/spdx+json": "an SBOM",
    "text/spdx": "an SBOM",
    "application/vnd.cyclonedx": "an SBOM",
    "application/sarif+json": "a scan report",
}


@dataclass(frozen=True, slots=True)
class Manifest:
    """One image manifest (never an index)."""

    media_type: str
    artifact_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: Mapping[str, str] = field(default_factory=dict)
    subject: Descriptor | None = None


def parse_manifest(data: bytes, content_type: str | None = None) -> Manifest:
    """`content_type` is what the source called the bytes; it must agree with the manifest's own word.

    Raises: SizeMismatchError (over 4 MiB), UnsupportedModelError naming the field: not JSON, an index, a signature
    or SBOM, an ambiguous or malformed manifest.
    """
    document = loads_strict(data, "manifest", MAX_MANIFEST_BYTES)
    if "manifests" in document and ("layers" in document or "config" in document):
        raise UnsupportedModelError("manifest: has both 'manifests' and 'layers'; it could be read as two things")
    declared = _text(document, "mediaType", "mediaType") if "mediaType" in document else ""
    told = (content_type or "").partition(";")[0].strip().lower()
    if declared and told not in ("", "application/json", "application/octet-stream", declared.lower()):
        raise UnsupportedModelError(
            f"manifest: calls itself {declared!r}, the registry calls it {told!r}", media_type=declared
        )
    media_type = declared or told or OCI_MANIFEST
    if "manifests" in document or media_type in (OCI_INDEX, DOCKER_LIST):
        raise _index_refused(document)
    if "config" not in document or "layers" not in document:
        raise UnsupportedModelError(
            f"manifest ({media_type}): has no 'config' and 'layers', so it is not an OCI image manifest",
            media_type=media_type,
        )
    layers = document["layers"]
    if not isinstance(layers, list):
        raise UnsupportedModelError("manifest: layers is not a list")
    if len(layers) > MAX_LAYERS:
        raise UnsupportedModelError(f"manifest: {len(layers)} layers, the limit is {MAX_LAYERS}")
    manifest = Manifest(
        media_type=media_type,
        artifact_type=_text(document, "artifactType", "artifactType") if "artifactType" in document else "",
        config=_descriptor(document["config"], "config"),
        layers=tuple(_descriptor(layer, f"layers[{position}]") for position, layer in enumerate(layers)),
        annotations=_annotations(document, "annotations"),
        subject=_descriptor(document["subject"], "subject") if document.get("subject") is not None else None,
    )
    if sum(layer.size_bytes for layer in manifest.layers) > _MAX_TOTAL_BYTES:
        raise UnsupportedModelError("manifest: the sizes of its layers add up to more than 2^63-1 bytes")
    _refuse_attachments(manifest)
    return manifest


def _refuse_attachments(manifest: Manifest) -> None:
    types = [manifest.artifact_type, manifest.config.media_type, *(layer.media_type for layer in manifest.layers)]
    for media_type in types:
        for prefix, what in _ATTACHMENTS.items():
            if media_type.startswith(prefix):
                raise UnsupportedModelError(
                    f"this reference is {what} ({media_type}), not a model; name the model it belongs to",
                    media_type=media_type,
                )


def _index_refused(document: Mapping[str, Any]) -> UnsupportedModelError:
    candidates = []
    children = document.get("manifests")
    for child in children if isinstance(children, list) else []:
        if not isinstance(child, dict):
            continue
        platform = child.get("platform")
        described = [str(child.get("digest", "?"))[:80]]
        if isinstance(platform, dict):
            described.append("/".join(str(platform[key])[:20] for key in ("os", "architecture") if key in platform))
        if child.get("artifactType"):
            described.append(str(child["artifactType"])[:80])
        candidates.append(" ".join(described))
    listed = "; ".join(candidates[:8]) + ("; …" if len(candidates) > 8 else "")
    return UnsupportedModelError(
        f"this reference is an index of {len(candidates)} manifests; name one of them by digest: {listed or 'it is empty'}",
        media_type=OCI_INDEX,
    )


def _descriptor(value: Any, path: str) -> Descriptor:
    if not isinstance(value, dict):
        raise UnsupportedModelError(f"manifest: {path} is not a descriptor object")
    size = value.get("size")
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise UnsupportedModelError(f"manifest: {path}.size must be a number of bytes, got {str(size)[:40]!r}")
    try:
        digest = Digest.parse(_text(value, "digest", f"{path}.digest"))
    except InvalidVolumeError as exc:
        raise UnsupportedModelError(f"manifest: {path}.digest: {exc}") from exc
    return Descriptor(
        media_type=_text(value, "mediaType", f"{path}.mediaType"),
        digest=digest,
        size_bytes=size,
        annotations=_annotations(value, f"{path}.annotations"),
    )


def _annotations(value: Mapping[str, Any], path: str) -> Mapping[str, str]:
    found = value.get("annotations")
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise UnsupportedModelError(f"manifest: {path} must map names to texts")
    return found


def _text(value: Mapping[str, Any], key: str, path: str) -> str:
    found = value.get(key)
    if not isinstance(found, str) or not found:
        raise UnsupportedModelError(f"manifest: {path} must be a text, got {str(found)[:40]!r}")
    return found
