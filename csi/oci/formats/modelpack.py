"""CNCF ModelPack, read tolerantly: names changed from `cnai` to `cncf`, producers add layer types of their own.

Five categories in four packings (`application/vnd.cncf.model.weight.config.v1.tar+gzip`), and besides: `…weight.v1.gguf`
and `…weight.v1.safetensors` (Docker), `…layer.v1.tar` (RamaLama). Archives are named by their headers only: some
packers annotate them with the category's name.

Source: model-spec docs/spec.md; what modctl, RamaLama, AIKit, KitOps and Docker write.
"""

from __future__ import annotations

from csi.oci.descriptor import Descriptor
from csi.oci.formats import layer_names
from csi.oci.formats.packings import packing_of
from csi.oci.formats.plan import LayerPlan, ModelFormat, ModelPlan, Packing
from csi.oci.manifest import Manifest

PREFIXES = ("application/vnd.cncf.model.", "application/vnd.cnai.model.")
_CATEGORIES = ("weight.config", "weight", "doc", "code", "dataset")


def matches(manifest: Manifest) -> bool:
    """By artifact type, config type or any layer: producers do not agree which of them they set."""
    types = [manifest.artifact_type, manifest.config.media_type, *(layer.media_type for layer in manifest.layers)]
    return any(media_type.lower().startswith(PREFIXES) for media_type in types)


def plan(manifest: Manifest) -> ModelPlan:
    """Raises: UnsupportedModelError for an unknown compression, an unnamed layer, a name that is not a relative path."""
    layers: list[LayerPlan] = []
    warnings: list[str] = []
    for position, layer in enumerate(manifest.layers):
        what = f"layers[{position}]"
        if warning := layer_names.contradiction(layer, what):
            warnings.append(warning)
        planned = _layer(layer, what)
        if planned is None:
            warnings.append(
                f"{what}: left out; media type {layer.media_type} is no ModelPack layer, and it has no name"
            )
        elif not layer_names.is_hidden(planned.path):
            layers.append(planned)
    return ModelPlan(format=ModelFormat.MODELPACK, layers=tuple(layers), warnings=tuple(warnings))


def _layer(layer: Descriptor, what: str) -> LayerPlan | None:
    media_type = layer.media_type.lower()
    name = layer_names.name_of(layer)
    prefix = next((prefix for prefix in PREFIXES if media_type.startswith(prefix)), None)
    if prefix is None:
        return layer_names.file_layer(layer, name, what) if name else None
    category, suffix = _split(media_type.removeprefix(prefix))
    packing = packing_of(suffix, layer.media_type, what)
    if packing is not Packing.RAW:
        return LayerPlan(descriptor=layer, packing=packing, category=category)
    if not name:
        raise layer_names.unnamed(layer, what)
    return layer_names.file_layer(layer, name, what, category)


def _split(rest: str) -> tuple[str, str]:
    """`weight.config.v1.tar+gzip` → `weight.config`, `tar+gzip`; a category we do not know is empty."""
    for category in _CATEGORIES:
        head = f"{category}.v1."
        if rest.startswith(head):
            return category, rest[len(head) :]
    return "", rest.rpartition(".")[2]
