"""Generic artifacts: layers with a title, as `oras push` and libraries like it write them.

Media types say nothing here: a plain file is `…image.layer.v1.tar` by default and no tar. A directory is tar+gzip with an
`unpack` annotation, its members below its title. oras-py writes directories without that annotation, so a titled
tar+gzip is a directory if its first member lies below the title, and a file otherwise.

Source: oras-go content/file; oras-py's provider.
"""

from __future__ import annotations

from csi.errors import UnsupportedModelError
from csi.oci.descriptor import Descriptor
from csi.oci.formats import layer_names
from csi.oci.formats.plan import LayerPlan, ModelFormat, ModelPlan, Packing
from csi.oci.manifest import Manifest
from csi.oci.paths import check_member_path

UNPACK = "io.deis.oras.content.unpack"


def matches(manifest: Manifest) -> bool:
    """Any layer that has a name."""
    return any(layer_names.name_of(layer) for layer in manifest.layers)


def plan(manifest: Manifest) -> ModelPlan:
    """Layers without a name are left out, as every ORAS client does.

    Raises: UnsupportedModelError for a name that is not a relative path.
    """
    layers: list[LayerPlan] = []
    warnings: list[str] = []
    for position, layer in enumerate(manifest.layers):
        name = layer_names.name_of(layer)
        if name is None:
            warnings.append(f"layers[{position}]: left out; it has no name ({layer.media_type})")
            continue
        planned = _layer(layer, name, f"layers[{position}]")
        if not layer_names.is_hidden(planned.path):
            layers.append(planned)
    return ModelPlan(format=ModelFormat.ORAS, layers=tuple(layers), warnings=tuple(warnings))


def _layer(layer: Descriptor, name: str, what: str) -> LayerPlan:
    media_type = layer.media_type.lower()
    if layer.annotations.get(UNPACK) == "true":
        return LayerPlan(descriptor=layer, packing=Packing.TAR_GZIP, member_root=_directory(name, what))
    if not media_type.endswith(("tar+gzip", "tar.gzip")):
        return layer_names.file_layer(layer, name, what)
    file = layer_names.file_layer(layer, name, what)
    return LayerPlan(
        descriptor=layer,
        packing=Packing.TAR_GZIP,
        path=file.path,
        mtime_s=file.mtime_s,
        executable=file.executable,
        member_root=file.path,
        maybe_file=True,
    )


def _directory(name: str, what: str) -> str:
    """`oras push … .` has the title `.`, and members without a directory in front."""
    stripped = name.rstrip("/")
    if stripped in (".", "") and not name.startswith("/"):
        return ""
    try:
        return check_member_path(stripped, what)
    except UnsupportedModelError as exc:
        raise UnsupportedModelError(f"{exc} (the title of a packed directory)", path=name[:200]) from exc
