"""KitOps ModelKits. The config is the Kitfile as JSON; the names are in the archives, relative to the kit's root.

Kits from before kit v0.5 have no digests in their Kitfile, and archives whose names begin at the directory of the path the
Kitfile gives. A kit whose model path is a reference builds on another kit: that one's model layers complete it.

Source: kitops pkg/artifact/kitfile.go, pkg/lib/kitfile, pkg/lib/unpack.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from csi.errors import InvalidVolumeError, UnsupportedModelError
from csi.oci.descriptor import Descriptor
from csi.oci.formats import layer_names
from csi.oci.formats.packings import packing_of
from csi.oci.formats.plan import LayerPlan, ModelFormat, ModelPlan, Packing
from csi.oci.manifest import Manifest
from csi.oci.paths import check_member_path
from csi.oci.reference import Reference

MAX_CHAIN = 10
"""How many kits may build on each other; kit's own limit."""

_PREFIX = "application/vnd.kitops.modelkit."
_LISTS = {"code": "code", "dataset": "datasets", "docs": "docs"}
_PARENT_CATEGORIES = ("model", "modelpart", "weight", "weight.config")
_MAX_SHOWN = 200


def matches(manifest: Manifest) -> bool:
    """By config or artifact type; a layer of a kit counts too."""
    types = [manifest.config.media_type, manifest.artifact_type, *(layer.media_type for layer in manifest.layers)]
    return any(media_type.lower().startswith(_PREFIX) for media_type in types)


def plan(manifest: Manifest, kitfile: Mapping[str, Any]) -> ModelPlan:
    """Raises: UnsupportedModelError for a raw layer without a name, an unknown compression, or a parent that is not a
    whole reference.
    """
    entries = _Entries(kitfile)
    layers: list[LayerPlan] = []
    warnings = entries.warnings()
    for position, layer in enumerate(manifest.layers):
        what = f"layers[{position}]"
        if not layer.media_type.lower().startswith(_PREFIX):
            warnings.append(f"{what}: left out; media type {layer.media_type} is no ModelKit layer")
            continue
        planned = _layer(layer, what, entries)
        if not layer_names.is_hidden(planned.path):
            layers.append(planned)
    has_model = any(layer.category == "model" for layer in layers)
    return ModelPlan(
        format=ModelFormat.KITOPS,
        layers=tuple(layers),
        parent=None if has_model else _parent(entries.model_path),
        warnings=tuple(warnings),
    )


def with_parent(kit: ModelPlan, parent: ModelPlan, origin: str) -> ModelPlan:
    """`kit` completed by its parent's model layers, which come from `origin` (`registry/repository`; empty for the kit's own
    repository); the parent's own parent is the next to be found. A blob that both have comes from where the kit has it.

    Raises: UnsupportedModelError for a parent of another kind.
    """
    if parent.format not in (ModelFormat.KITOPS, ModelFormat.MODELPACK):
        raise UnsupportedModelError(
            f"the kit builds on {kit.parent!r}, which is a model of format {parent.format}; expected a ModelKit or a "
            "ModelPack"
        )
    places = {layer.descriptor.digest: layer.origin for layer in kit.layers}
    inherited = tuple(
        replace(layer, origin=places.get(layer.descriptor.digest, layer.origin or origin))
        for layer in parent.layers
        if layer.category in _PARENT_CATEGORIES
    )
    return replace(
        kit,
        layers=inherited + kit.layers,
        parent=parent.parent,
        warnings=kit.warnings + tuple(f"parent {kit.parent}: {warning}" for warning in parent.warnings),
    )


def check_chain(chain: Sequence[str]) -> None:
    """The references from the kit itself to the parent that is to be read next.

    Raises: UnsupportedModelError for a cycle, or more than MAX_CHAIN parents.
    """
    shown = " → ".join(text[:_MAX_SHOWN] for text in chain)
    if len(set(chain)) < len(chain):
        raise UnsupportedModelError(
            f"the kits build on each other in a circle: {shown}; one of them must be packed again"
        )
    if len(chain) > MAX_CHAIN + 1:
        raise UnsupportedModelError(f"more than {MAX_CHAIN} kits build on each other: {shown}")


class _Entries:
    """What the Kitfile lists. It is tolerant: a Kitfile only matters for kits of old versions, and for parents."""

    def __init__(self, kitfile: Mapping[str, Any]) -> None:
        model = kitfile.get("model")
        self._model: Mapping[str, Any] = model if isinstance(model, dict) else {}
        self._lists = {category: _objects(kitfile.get(key)) for category, key in _LISTS.items()}
        self._lists["modelpart"] = _objects(self._model.get("parts"))
        self._lists["model"] = [self._model]
        self._next = dict.fromkeys(self._lists, 0)
        self._has_digests = any(entry.get("digest") for entries in self._lists.values() for entry in entries)

    @property
    def model_path(self) -> str:
        return _text(self._model.get("path"))

    def warnings(self) -> list[str]:
        remote = [entry for entry in self._lists["dataset"] if entry.get("remotePath")]
        return [
            f"dataset {_text(entry.get('path'))[:_MAX_SHOWN]!r}: left out; it lies outside the kit, at a remote path"
            for entry in remote
        ]

    def base_of_next(self, category: str) -> str:
        """The directory that names of the next layer of this category begin at; empty but for old kits."""
        entries = self._lists.get(category, [])
        position = self._next.get(category, 0)
        self._next[category] = position + 1
        if self._has_digests or position >= len(entries):
            return ""
        return posixpath.dirname(posixpath.normpath(_text(entries[position].get("path")) or "."))


def _objects(value: object) -> list[Mapping[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _layer(layer: Descriptor, what: str, entries: _Entries) -> LayerPlan:
    category, _, suffix = layer.media_type.lower().removeprefix(_PREFIX).partition(".v1.")
    packing = packing_of(suffix, layer.media_type, what)
    if packing is not Packing.RAW:
        base = entries.base_of_next(category)
        return LayerPlan(
            descriptor=layer,
            packing=packing,
            category=category,
            base=check_member_path(base, f"{what}: its path in the Kitfile") if base else "",
        )
    name = layer_names.name_of(layer)
    if not name:
        raise layer_names.unnamed(layer, what)
    return layer_names.file_layer(layer, posixpath.normpath(name), what, category)


def _parent(path: str) -> str | None:
    if ":" not in path and "@" not in path:
        return None
    try:
        reference = Reference.parse(path)
        if reference.is_layout:
            raise InvalidVolumeError("it is a directory, not a repository of a registry", field="reference")
        return str(reference)
    except InvalidVolumeError as exc:
        raise UnsupportedModelError(
            f"the kit builds on another kit, {path[:_MAX_SHOWN]!r}, but that is no whole reference: {exc}; pack it again "
            "with registry/repository:tag as its model's path"
        ) from exc
