"""Which format a manifest follows. Never by its artifact type alone: producers leave it out, or set another's.

Artifacts that are no model (signatures, SBOMs) were refused when the manifest was parsed.
"""

from __future__ import annotations

from csi.errors import UnsupportedModelError
from csi.oci.formats import docker_ai, image, kitops, modelpack, ollama, oras
from csi.oci.formats.plan import ModelFormat, ModelPlan
from csi.oci.manifest import Manifest
from csi.oci.strict_json import loads_strict

MAX_CONFIG_BYTES = 8 * 1024 * 1024
_MAX_SHOWN_TYPES = 8
_COG = "application/vnd.cog.weight"


def needs_config(manifest: Manifest) -> bool:
    """Whether `plan_of` wants the bytes of the config blob, at most MAX_CONFIG_BYTES.

    Raises: UnsupportedModelError for what is not mounted whatever its config says.
    """
    found = _format_of(manifest)
    return found is ModelFormat.KITOPS or (found is ModelFormat.IMAGE and image.needs_config(manifest))


def plan_of(manifest: Manifest, config: bytes | None = None) -> ModelPlan:
    """What the manifest gives to a tree. `config` is the config blob, where `needs_config` asks for it.

    Raises: UnsupportedModelError for a kind of artifact that is not mounted (listing what was seen), a layer that cannot
    be mounted, a config that is not the JSON it should be; SizeMismatchError for a config that is too large.
    """
    match _format_of(manifest):
        case ModelFormat.MODELPACK:
            plan = modelpack.plan(manifest)
        case ModelFormat.KITOPS:
            assert config is not None, "needs_config said so"
            plan = kitops.plan(manifest, loads_strict(config, "config", MAX_CONFIG_BYTES))
        case ModelFormat.DOCKER_AI:
            plan = docker_ai.plan(manifest)
        case ModelFormat.OLLAMA:
            plan = ollama.plan(manifest)
        case ModelFormat.IMAGE if _is_image(manifest, config):
            plan = image.plan(manifest)
        case _:
            plan = oras.plan(manifest)
    if not plan.layers and plan.parent is None:
        raise UnsupportedModelError("the model has no files" + "".join(f"; {warning}" for warning in plan.warnings[:3]))
    return plan


def _is_image(manifest: Manifest, config: bytes | None) -> bool:
    if not image.needs_config(manifest):
        return True
    assert config is not None, "needs_config said so"
    return image.is_image_config(loads_strict(config, "config", MAX_CONFIG_BYTES))


def _format_of(manifest: Manifest) -> ModelFormat:
    """IMAGE where it may be one: with named layers the config decides between that and ORAS."""
    if modelpack.matches(manifest):
        return ModelFormat.MODELPACK
    if kitops.matches(manifest):
        return ModelFormat.KITOPS
    if docker_ai.matches(manifest):
        return ModelFormat.DOCKER_AI
    if ollama.matches(manifest):
        return ModelFormat.OLLAMA
    if any(kind.lower().startswith(_COG) for kind in (manifest.artifact_type, manifest.config.media_type)):
        raise UnsupportedModelError(
            "this reference is a set of Cog weights, which only Cog's own images know where to put; mount the image that "
            "uses them, or push the files with 'modelmount push'",
            media_type=manifest.artifact_type or manifest.config.media_type,
        )
    if image.may_match(manifest):
        return ModelFormat.IMAGE
    if oras.matches(manifest):
        return ModelFormat.ORAS
    seen = ", ".join(dict.fromkeys(layer.media_type for layer in manifest.layers[:_MAX_SHOWN_TYPES])) or "none"
    raise UnsupportedModelError(
        f"not a model: artifactType {manifest.artifact_type or 'none'}, config {manifest.config.media_type}, layers "
        f"{seen}; expected a ModelPack, a ModelKit, a Docker AI or Ollama model, an image, or layers with a file name",
        media_type=manifest.artifact_type or manifest.config.media_type,
    )
