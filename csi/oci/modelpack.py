"""CNCF ModelPack: which file each raw layer is, and how a model is packed so that it streams well.

Source: model-spec docs/spec.md and docs/annotations.md. Read tolerantly (names changed from `cnai` to `cncf`, fields
from snake to camel case); written in today's form, one raw layer per file, with constant metadata, so that equal
files make an equal digest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from csi.errors import UnsupportedModelError
from csi.oci.descriptor import Descriptor
from csi.oci.digest import Digest
from csi.oci.manifest import OCI_MANIFEST, Manifest
from csi.oci.paths import check_member_path

ARTIFACT_TYPE = "application/vnd.cncf.model.manifest.v1+json"
CONFIG_TYPE = "application/vnd.cncf.model.config.v1+json"
FILEPATH = "org.cncf.model.filepath"
METADATA = "org.cncf.model.file.metadata+json"
TITLE = "org.opencontainers.image.title"

_PREFIXES = ("application/vnd.cncf.model.", "application/vnd.cnai.model.")
_FILEPATHS = (FILEPATH, "org.cnai.model.filepath")
_METADATAS = (METADATA, "org.cnai.model.file.metadata+json", "org.cnai.model.file.metadata")
_CATEGORIES = ("weight.config", "weight", "doc", "code", "dataset")
_HIDDEN_DIRECTORY = ".modelmount"


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One file of a model: the whole of `blob`. `mtime_s` is 0 where the packer gave none."""

    path: str
    blob: Descriptor
    category: str
    mtime_s: int = 0
    executable: bool = False


def is_modelpack(manifest: Manifest) -> bool:
    """By artifact type, config type or any layer: producers do not agree which of them they set."""
    types = [manifest.artifact_type, manifest.config.media_type, *(layer.media_type for layer in manifest.layers)]
    return any(media_type.startswith(_PREFIXES) for media_type in types)


def files_of(manifest: Manifest) -> tuple[ModelFile, ...]:
    """The files of a model with raw layers, in layer order.

    Raises: UnsupportedModelError for another kind of artifact, a tar packing, an unnamed weight, or two different
    files of one name.
    """
    if not is_modelpack(manifest):
        seen = ", ".join(dict.fromkeys(layer.media_type for layer in manifest.layers[:8])) or "no layers"
        raise UnsupportedModelError(
            f"not a model: artifactType {manifest.artifact_type or 'none'!r}, config {manifest.config.media_type!r}, "
            f"layers {seen}; expected a CNCF ModelPack artifact, such as 'modelmount push' makes",
            media_type=manifest.config.media_type,
        )
    files: dict[str, ModelFile] = {}
    for position, layer in enumerate(manifest.layers):
        file = _file_of(layer, f"layers[{position}]")
        if file is None:
            continue
        held = files.get(file.path)
        if held is not None and held.blob.digest != file.blob.digest:
            raise UnsupportedModelError(
                f"layers[{position}]: {file.path!r} is named twice, with different contents; pack the model again",
                path=file.path,
            )
        files.setdefault(file.path, file)
    if not files:
        raise UnsupportedModelError("the model has no files")
    return tuple(files.values())


def _file_of(layer: Descriptor, what: str) -> ModelFile | None:
    """None for a layer that is not a file of the tree."""
    prefix = next((prefix for prefix in _PREFIXES if layer.media_type.startswith(prefix)), None)
    if prefix is None:
        raise UnsupportedModelError(
            f"{what}: media type {layer.media_type!r} is not a ModelPack layer", media_type=layer.media_type
        )
    category, packing = _split_type(layer.media_type.removeprefix(prefix))
    if packing.startswith("tar"):
        raise UnsupportedModelError(
            f"{what}: media type {layer.media_type!r} packs files into a tar archive, which this version does not "
            "mount; push the model again with raw layers ('modelmount push')",
            media_type=layer.media_type,
        )
    metadata = _metadata(layer)
    name = next((layer.annotations[key] for key in _FILEPATHS if key in layer.annotations), None)
    if name is None:
        name = metadata.get("name") if isinstance(metadata.get("name"), str) else layer.annotations.get(TITLE)
    if not name:
        raise UnsupportedModelError(
            f"{what}: the layer has no file name (annotation {FILEPATH}); pack the model again",
            media_type=layer.media_type,
        )
    path = check_member_path(name, what)
    if path.split("/")[0] == _HIDDEN_DIRECTORY:
        return None
    mode = metadata.get("mode")
    return ModelFile(
        path=path,
        blob=layer,
        category=category,
        mtime_s=_mtime(metadata.get("mtime")),
        executable=isinstance(mode, int) and bool(mode & 0o111),
    )


def _split_type(rest: str) -> tuple[str, str]:
    """`weight.config.v1.tar+gzip` → `weight.config`, `tar+gzip`; an unknown category stays what it is."""
    for category in _CATEGORIES:
        head = f"{category}.v1."
        if rest.startswith(head):
            return category, rest[len(head) :]
    return "other", rest.rpartition(".")[2]


def _metadata(layer: Descriptor) -> Mapping[str, Any]:
    """Optional information: what cannot be read is as good as absent."""
    for key in _METADATAS:
        text = layer.annotations.get(key)
        if text is not None and len(text) < 64 * 1024:
            try:
                value = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict):
                return value
    return {}


def _mtime(value: object) -> int:
    if not isinstance(value, str):
        return 0
    try:
        seconds = int(datetime.fromisoformat(value.replace("Z", "+00:00")).timestamp())
    except (ValueError, OverflowError, OSError):
        return 0
    return seconds if 0 <= seconds < 2**40 else 0


# --- packing ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file to pack, already hashed. `path` is relative, with `/`."""

    path: str
    digest: Digest
    size_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelDescription:
    """What the config says about the model. All optional."""

    name: str | None = None
    version: str | None = None
    annotations: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PackedModel:
    """The bytes of a model's config and manifest, and the descriptors they hang on."""

    config: bytes
    manifest: bytes
    config_descriptor: Descriptor
    layers: tuple[Descriptor, ...]
    files: tuple[SourceFile, ...]

    @property
    def digest(self) -> Digest:
        """What the model is pinned by."""
        return Digest.of(self.manifest)


_WEIGHT_SUFFIXES = (
    ".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".h5", ".keras", ".npz", ".npy", ".msgpack",
    ".tflite", ".pb", ".engine", ".dduf", ".onnx_data", ".pdparams", ".mlmodel",
)  # fmt: skip
_DOC_SUFFIXES = (".md", ".rst", ".pdf", ".txt", ".png", ".jpg", ".svg")
_DOC_NAMES = ("license", "notice", "readme", "use_policy")
_CODE_SUFFIXES = (".py", ".ipynb", ".sh", ".cc", ".cpp", ".cu", ".rs", ".js", ".ts")
_CONFIG_TEXTS = ("vocab.txt", "merges.txt")
_LARGE_BYTES = 128 * 1024 * 1024


def classify(path: str, size_bytes: int) -> str:
    """The ModelPack category of a file: by its name; an unknown one above 128 MiB is a weight, else a config."""
    name = path.rpartition("/")[2].lower()
    if name.endswith(_WEIGHT_SUFFIXES):
        return "weight"
    if name.endswith(_CODE_SUFFIXES):
        return "code"
    if name not in _CONFIG_TEXTS and (name.endswith(_DOC_SUFFIXES) or name.startswith(_DOC_NAMES)):
        return "doc"
    return "weight" if size_bytes > _LARGE_BYTES else "weight.config"


def pack(files: Sequence[SourceFile], description: ModelDescription) -> PackedModel:
    """A deterministic model: small files before weights, each group in path order, one raw layer per file.

    Raises: UnsupportedModelError for no files, too many, or a name that could not be mounted.
    """
    if not files:
        raise UnsupportedModelError("there are no files to pack")
    categories = {file.path: classify(file.path, file.size_bytes) for file in files}
    ordered = tuple(sorted(files, key=lambda file: (categories[file.path] == "weight", file.path)))
    layers = tuple(_layer(file, categories[file.path]) for file in ordered)
    descriptor: dict[str, Any] = {}
    if description.name:
        descriptor["name"] = description.name
    if description.version:
        descriptor["version"] = description.version
    config = _canonical(
        {
            "descriptor": descriptor,
            "config": {},
            "modelfs": {"type": "layers", "diffIds": [str(layer.digest) for layer in layers]},
        }
    )
    config_descriptor = Descriptor(CONFIG_TYPE, Digest.of(config), len(config))
    manifest: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": ARTIFACT_TYPE,
        "config": _to_json(config_descriptor),
        "layers": [_to_json(layer) for layer in layers],
    }
    if description.annotations:
        manifest["annotations"] = dict(description.annotations)
    return PackedModel(config, _canonical(manifest), config_descriptor, layers, ordered)


def _layer(file: SourceFile, category: str) -> Descriptor:
    path = check_member_path(file.path, "file")
    metadata = {
        "name": path,
        "mode": 0o644,
        "uid": 0,
        "gid": 0,
        "size": file.size_bytes,
        "mtime": "1970-01-01T00:00:00Z",
        "typeflag": 0,
    }
    return Descriptor(
        media_type=f"application/vnd.cncf.model.{category}.v1.raw",
        digest=file.digest,
        size_bytes=file.size_bytes,
        annotations={FILEPATH: path, TITLE: path, METADATA: _canonical(metadata).decode()},
    )


def _to_json(descriptor: Descriptor) -> dict[str, Any]:
    value: dict[str, Any] = {
        "mediaType": descriptor.media_type,
        "digest": str(descriptor.digest),
        "size": descriptor.size_bytes,
    }
    if descriptor.annotations:
        value["annotations"] = dict(descriptor.annotations)
    return value


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
