"""Manifests and indexes: bytes in, values out, with every limit and every refusal that does not depend on a model format.

A manifest that two programs could read as two different things is refused, not interpreted: whoever checked the
signature, the scan or the policy must have seen the layers that are mounted. `urls` and inline `data` of descriptors
are ignored: blobs come from the registry the model came from.

Source: OCI image-spec manifest.md and image-index.md; limits after the advisories on ambiguous manifests.
"""

from __future__ import annotations

import re
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
_MAX_LISTED = 8

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
"""Of the config that an artifact has which needs none."""
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"

# What a source says that does not know better.
_NEUTRAL_TYPES = ("", "application/json", "application/octet-stream")
_ATTESTS = "vnd.docker.reference.type"
_PLATFORM_WORD = re.compile(r"[A-Za-z0-9._-]{1,40}")
_MEDIA_TYPE = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]{0,253}[\x21-\x7e])?")

# Things that hang on a model and are never one, by the media types that give them away.
_ATTACHMENTS = {
    "application/vnd.dev.cosign.simplesigning.v1+json": "a signature",
    "application/vnd.dev.cosign.artifact.sig.v1+json": "a signature",
    "application/vnd.dev.cosign.artifact.sbom.v1+json": "an SBOM",
    "application/vnd.dev.sigstore.bundle": "a signature or attestation",
    "application/vnd.cncf.notary.signature": "a signature",
    "application/vnd.in-toto": "an attestation",
    "application/vnd.dsse.envelope.v1+json": "an attestation",
    "application/spdx+json": "an SBOM",
    "text/spdx": "an SBOM",
    "application/vnd.cyclonedx": "an SBOM",
    "application/sarif+json": "a scan report",
    "application/vnd.modelmount.block-index": "a block index",
}

# Go's JSON decoder takes 'Layers' for 'layers'. Such a key means one thing there and nothing here.
_DOCUMENT_KEYS = (
    "schemaVersion",
    "mediaType",
    "artifactType",
    "config",
    "layers",
    "manifests",
    "annotations",
    "subject",
)
_DESCRIPTOR_KEYS = ("mediaType", "digest", "size", "annotations", "urls", "data", "artifactType", "platform")


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One manifest an index lists. `platform` is `os/architecture[/variant]`, empty where there is none."""

    descriptor: Descriptor
    artifact_type: str = ""
    platform: str = ""

    @property
    def attachment(self) -> str | None:
        """What it is instead of a model: `a signature`, `an attestation`."""
        if _ATTESTS in self.descriptor.annotations:
            return "an attestation"
        return attachment(self.artifact_type) or attachment(self.descriptor.media_type)

    def shown(self) -> str:
        """For people: `sha256:… linux/amd64 (artifact type, annotations)`."""
        more = [self.artifact_type] if self.artifact_type else []
        pairs = list(self.descriptor.annotations.items())[:3]
        more += [f"{_shown(key, 60)}={_shown(text, 40)}" for key, text in pairs]
        words = [str(self.descriptor.digest), self.platform, f"({' '.join(more)})" if more else ""]
        return " ".join(word for word in words if word)


@dataclass(frozen=True, slots=True)
class Index:
    """An image index or manifest list: several manifests under one reference."""

    media_type: str
    artifact_type: str
    entries: tuple[IndexEntry, ...]
    annotations: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Manifest:
    """One image manifest (never an index). `artifact_type` is empty where the manifest has none."""

    media_type: str
    artifact_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: Mapping[str, str] = field(default_factory=dict)
    subject: Descriptor | None = None


def parse_manifest(data: bytes, content_type: str | None = None) -> Manifest:
    """`parse` for those who cannot do with an index. Raises: as `parse`, UnsupportedModelError for an index."""
    parsed = parse(data, content_type)
    if isinstance(parsed, Index):
        candidates = "; ".join(entry.shown() for entry in parsed.entries[:_MAX_LISTED])
        raise UnsupportedModelError(
            f"this reference is an index of {len(parsed.entries)} manifests; name one of them by digest: "
            f"{candidates or 'it is empty'}{'; …' if len(parsed.entries) > _MAX_LISTED else ''}",
            media_type=parsed.media_type,
        )
    return parsed


def parse(data: bytes, content_type: str | None = None) -> Manifest | Index:
    """`content_type` is what the source called the bytes; it must agree with the manifest's own word.

    Raises: SizeMismatchError (over 4 MiB), UnsupportedModelError naming the field: not JSON, a signature or SBOM, an
    ambiguous or malformed manifest.
    """
    parsed = parse_referrer(data, content_type)
    if isinstance(parsed, Index):
        if what := attachment(parsed.artifact_type):
            raise attachment_refused(what, parsed.artifact_type)
    else:
        _refuse_attachments(parsed)
    return parsed


def parse_referrer(data: bytes, content_type: str | None = None) -> Manifest | Index:
    """`parse` for those who want what hangs on a model, or a list of it."""
    document = loads_strict(data, "manifest", MAX_MANIFEST_BYTES)
    _refuse_lookalikes(document, _DOCUMENT_KEYS, "")
    if "manifests" in document and ("layers" in document or "config" in document):
        raise UnsupportedModelError("manifest: has both 'manifests' and 'layers'; it could be read as two things")
    media_type = _media_type_of(document, content_type)
    if media_type.lower() in (OCI_INDEX, DOCKER_LIST):
        return _index(document, media_type)
    if media_type.lower() not in (OCI_MANIFEST, DOCKER_MANIFEST) or "config" not in document:
        raise UnsupportedModelError(
            f"manifest: media type {media_type!r} with {_listed(document)}; expected an image manifest ({OCI_MANIFEST}) "
            "with 'config' and 'layers'",
            media_type=media_type,
        )
    if document.get("schemaVersion", 2) != 2:
        raise UnsupportedModelError(f"manifest: schemaVersion is {str(document['schemaVersion'])[:40]!r}, expected 2")
    layers = document.get("layers")
    if not isinstance(layers, list):
        raise UnsupportedModelError("manifest: layers is missing or not a list")
    if len(layers) > MAX_LAYERS:
        raise UnsupportedModelError(f"manifest: {len(layers)} layers, the limit is {MAX_LAYERS}")
    manifest = Manifest(
        media_type=media_type,
        artifact_type=_media_type(document, "artifactType", "artifactType") if document.get("artifactType") else "",
        config=_descriptor(document["config"], "config"),
        layers=tuple(_descriptor(layer, f"layers[{position}]") for position, layer in enumerate(layers)),
        annotations=_annotations(document, "annotations"),
        subject=_descriptor(document["subject"], "subject") if document.get("subject") is not None else None,
    )
    if manifest.config.size_bytes + sum(layer.size_bytes for layer in manifest.layers) > _MAX_TOTAL_BYTES:
        raise UnsupportedModelError("manifest: the sizes of its layers add up to more than 2^63-1 bytes")
    return manifest


def _media_type_of(document: Mapping[str, Any], content_type: str | None) -> str:
    declared = _media_type(document, "mediaType", "mediaType") if document.get("mediaType") else ""
    told = (content_type or "").partition(";")[0].strip().lower()
    if told in _NEUTRAL_TYPES:
        told = ""
    if declared and told not in ("", declared.lower()):
        raise UnsupportedModelError(
            f"manifest: calls itself {declared!r}, the registry calls it {told[:255]!r}", media_type=declared
        )
    found = declared or told or (OCI_INDEX if "manifests" in document else OCI_MANIFEST)
    if (found.lower() in (OCI_INDEX, DOCKER_LIST)) != ("manifests" in document):
        raise UnsupportedModelError(
            f"manifest: media type {found[:255]!r} with {_listed(document)}; it could be read as two things",
            media_type=found[:255],
        )
    return found


def _refuse_attachments(manifest: Manifest) -> None:
    """By artifact and config type, or by layers if all of them are such: a model may carry its SBOM beside its weights."""
    for media_type in (manifest.artifact_type, manifest.config.media_type):
        if what := attachment(media_type):
            raise attachment_refused(what, media_type)
    found = [attachment(layer.media_type) for layer in manifest.layers]
    if found and found[0] and all(found):
        raise attachment_refused(found[0], manifest.layers[0].media_type)


def attachment(media_type: str) -> str | None:
    """What hangs on a model and is none: `a signature`. None for anything else."""
    return next((what for prefix, what in _ATTACHMENTS.items() if media_type.lower().startswith(prefix)), None)


def attachment_refused(what: str, media_type: str) -> UnsupportedModelError:
    """The refusal of a reference to such a thing."""
    return UnsupportedModelError(
        f"this reference is {what}, not a model ({media_type}); name the model it belongs to", media_type=media_type
    )


def _index(document: Mapping[str, Any], media_type: str) -> Index:
    children = document["manifests"]
    if not isinstance(children, list):
        raise UnsupportedModelError("manifest: manifests is not a list", media_type=media_type)
    if len(children) > MAX_LAYERS:
        raise UnsupportedModelError(f"manifest: an index of {len(children)} manifests, the limit is {MAX_LAYERS}")
    return Index(
        media_type=media_type,
        artifact_type=_media_type(document, "artifactType", "artifactType") if document.get("artifactType") else "",
        entries=tuple(_entry(child, f"manifests[{position}]") for position, child in enumerate(children)),
        annotations=_annotations(document, "annotations"),
    )


def _entry(value: Any, path: str) -> IndexEntry:
    descriptor = _descriptor(value, path)
    artifact_type = _media_type(value, "artifactType", f"{path}.artifactType") if value.get("artifactType") else ""
    return IndexEntry(descriptor, artifact_type, _platform(value.get("platform"), f"{path}.platform"))


def _platform(value: Any, path: str) -> str:
    """Some tools write empty platforms, or half ones: as good as none."""
    if value is None:
        return ""
    if not isinstance(value, dict):
        raise UnsupportedModelError(f"manifest: {path} is not an object")
    words = [value.get("os"), value.get("architecture"), *([value["variant"]] if value.get("variant") else [])]
    if not all(isinstance(word, str) and _PLATFORM_WORD.fullmatch(word) for word in words):
        return ""
    return "/".join(str(word) for word in words)


def _descriptor(value: Any, path: str) -> Descriptor:
    if not isinstance(value, dict):
        raise UnsupportedModelError(f"manifest: {path} is not a descriptor object")
    _refuse_lookalikes(value, _DESCRIPTOR_KEYS, f"{path}.")
    size = value.get("size")
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise UnsupportedModelError(f"manifest: {path}.size must be a number of bytes, got {_got(value, 'size')}")
    try:
        digest = Digest.parse(_text(value, "digest", f"{path}.digest"))
    except InvalidVolumeError as exc:
        raise UnsupportedModelError(f"manifest: {path}.digest: {exc}") from exc
    return Descriptor(
        media_type=_media_type(value, "mediaType", f"{path}.mediaType"),
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
        raise UnsupportedModelError(f"manifest: {path} must be a text, got {_got(value, key)}")
    return found


def _media_type(value: Mapping[str, Any], key: str, path: str) -> str:
    """Printable ASCII, so that it can stand in messages and logs as it is."""
    found = _text(value, key, path)
    if not _MEDIA_TYPE.fullmatch(found):
        raise UnsupportedModelError(f"manifest: {path} must be a media type, got {_got(value, key)}")
    return found


def _refuse_lookalikes(value: Mapping[str, Any], known: tuple[str, ...], path: str) -> None:
    for key in value:
        if key in known:
            continue
        twin = next((name for name in known if name.casefold() == key.casefold()), None)
        if twin is not None:
            raise UnsupportedModelError(
                f"manifest: {path}{_shown(key, 40)} is {twin!r} to some programs and unknown to others; write it exactly so"
            )


def _got(value: Mapping[str, Any], key: str) -> str:
    return repr(str(value[key])[:40]) if key in value else "nothing"


def _listed(document: Mapping[str, Any]) -> str:
    return "keys " + (", ".join(_shown(key, 40) for key in list(document)[:_MAX_LISTED]) or "none")


def _shown(value: object, limit: int) -> str:
    """A stranger's text for a message: short, and nothing a terminal or a log would obey."""
    return "".join(c if c.isprintable() else "?" for c in str(value)[:limit])
