"""Models of the Ollama registry: a Docker manifest whose layers have types of their own, and no names.

GGUF models are mounted. A model stored tensor by tensor (MLX) is refused: no loader reads such a tree.

Source: ollama manifest/, server/images.go; x/create for the tensor layers.
"""

from __future__ import annotations

from csi.errors import UnsupportedModelError
from csi.oci.formats import layer_names
from csi.oci.formats.made_up_names import MadeUpNames
from csi.oci.formats.plan import LayerPlan, ModelFormat, ModelPlan
from csi.oci.manifest import Manifest

_PREFIX = "application/vnd.ollama.image."
_PER_TENSOR = (f"{_PREFIX}tensor", f"{_PREFIX}json")
_NAMES = {
    f"{_PREFIX}model": ("model.gguf", "model-{number:05}-of-{count:05}.gguf"),
    f"{_PREFIX}projector": ("mmproj.gguf", "mmproj-{number}.gguf"),
    f"{_PREFIX}adapter": ("adapter.gguf", "adapter-{number}.gguf"),
    f"{_PREFIX}draft": ("draft.gguf", "draft-{number}.gguf"),
    f"{_PREFIX}template": ("template", "template-{number}"),
    f"{_PREFIX}prompt": ("prompt", "prompt-{number}"),
    f"{_PREFIX}system": ("system", "system-{number}"),
    f"{_PREFIX}params": ("params.json", "params-{number}.json"),
    f"{_PREFIX}messages": ("messages.json", "messages-{number}.json"),
    f"{_PREFIX}license": ("LICENSE", "LICENSE-{number}"),
}


def matches(manifest: Manifest) -> bool:
    """By any layer: manifest and config look like a container image's."""
    return any(layer.media_type.lower().startswith(_PREFIX) for layer in manifest.layers)


def plan(manifest: Manifest) -> ModelPlan:
    """Raises: UnsupportedModelError for a model that is stored tensor by tensor."""
    names = MadeUpNames(_NAMES, manifest.layers)
    layers: list[LayerPlan] = []
    warnings: list[str] = []
    for position, layer in enumerate(manifest.layers):
        what = f"layers[{position}]"
        if layer.media_type.lower() in _PER_TENSOR:
            raise UnsupportedModelError(
                f"{what}: this Ollama model is stored tensor by tensor ({layer.media_type}), which no loader reads as "
                "files; use its GGUF variant, or push the original files with 'modelmount push'",
                media_type=layer.media_type,
            )
        if name := names.of(layer):
            layers.append(layer_names.file_layer(layer, name, what))
        else:
            warnings.append(f"{what}: left out; it has no name ({layer.media_type})")
    return ModelPlan(format=ModelFormat.OLLAMA, layers=tuple(layers), warnings=tuple(warnings))
