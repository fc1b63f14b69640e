"""Docker Model Runner's own artifacts. Version 0.1 has no file names: the runner makes them up, and so do we, alike.

Source: docker/model-runner pkg/distribution: types/config.go, internal/bundle/unpack.go.
"""

from __future__ import annotations

from csi.oci.descriptor import Descriptor
from csi.oci.formats import layer_names
from csi.oci.formats.made_up_names import MadeUpNames
from csi.oci.formats.plan import LayerPlan, ModelFormat, ModelPlan, Packing
from csi.oci.manifest import Manifest

_PREFIX = "application/vnd.docker.ai."
_CONFIG_V01 = f"{_PREFIX}model.config.v0.1+json"
_ARCHIVES = (f"{_PREFIX}vllm.config.tar", f"{_PREFIX}dir.tar")
# media type → name, and the name of each where there are several
_NAMES = {
    f"{_PREFIX}gguf.v3": ("model.gguf", "model-{number:05}-of-{count:05}.gguf"),
    f"{_PREFIX}safetensors": ("model.safetensors", "model-{number:05}-of-{count:05}.safetensors"),
    f"{_PREFIX}dduf": ("model.dduf", "model-{number:05}-of-{count:05}.dduf"),
    f"{_PREFIX}mmproj": ("model.mmproj", "model-{number}.mmproj"),
    f"{_PREFIX}chat.template.jinja": ("template.jinja", "template-{number}.jinja"),
    f"{_PREFIX}license": ("LICENSE", "LICENSE-{number}"),
}


def matches(manifest: Manifest) -> bool:
    """By config or any layer: the artifact type is not reliable here."""
    types = [manifest.config.media_type, *(layer.media_type for layer in manifest.layers)]
    return any(media_type.lower().startswith(_PREFIX) for media_type in types)


def plan(manifest: Manifest) -> ModelPlan:
    """Version 0.1 always gets made-up names, as in the runner; later versions where a layer has none.

    Raises: UnsupportedModelError for a name that is not a relative path.
    """
    has_names = manifest.config.media_type.lower() != _CONFIG_V01
    names = MadeUpNames(_NAMES, [layer for layer in manifest.layers if not (has_names and layer_names.name_of(layer))])
    layers: list[LayerPlan] = []
    warnings: list[str] = []
    for position, layer in enumerate(manifest.layers):
        planned = _layer(layer, f"layers[{position}]", names)
        if planned is None:
            warnings.append(f"layers[{position}]: left out; it has no name ({layer.media_type})")
        else:
            layers.append(planned)
    return ModelPlan(format=ModelFormat.DOCKER_AI, layers=tuple(layers), warnings=tuple(warnings))


def _layer(layer: Descriptor, what: str, names: MadeUpNames) -> LayerPlan | None:
    if layer.media_type.lower() in _ARCHIVES:
        return LayerPlan(descriptor=layer, packing=Packing.TAR)
    name = names.of(layer) or layer_names.name_of(layer)
    return layer_names.file_layer(layer, name, what) if name else None
