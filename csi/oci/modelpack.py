"""CNCF ModelPack: which file each raw layer is, and how a model is packed so that it streams well.

Source: model-spec docs/spec.md and docs/annotations.md. Read tolerantly (names changed from `cnai` to `cncf`, fields
from snake to camel case, producers add layer types of their own); written in today's form, one raw layer per file,
with constant metadata, so that equal files make an equal digest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from csi.errors import InvalidVolumeError, UnsupportedModelError
from csi.oci.descriptor import Descriptor
from csi.oci.digest import Digest
from csi.oci.manifest import MAX_LAYERS, MAX_MANIFEST_BYTES, OCI_MANIFEST, Manifest
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
INDEX_PATH = f"{_HIDDEN_DIRECTORY}/index.v1.pb"
"""The file path of the layer that is the model's block index."""
_MAX_METADATA_BYTES = 64 * 1024
_MAX_SHOWN_TYPES = 8
_MTIME_LIMIT_S = 2**40  # beyond the year 36000 a producer is joking


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
    return any(media_type.lower().startswith(_PREFIXES) for media_type in types)


def files_of(manifest: Manifest) -> tuple[ModelFile, ...]:
    """The files of a model with raw layers, in layer order. Layers below `.modelmount/` are ours and no files.

    The name of a layer's file is its annotation `org.cncf.model.filepath`, else `org.cnai.model.filepath`, else the
    name in its file metadata, else `org.opencontainers.image.title`. The last part of a layer's media type decides
    the packing; whatever does not begin with `tar` is the file as it is.

    Raises: UnsupportedModelError for another kind of artifact, a tar packing, an unnamed layer, a name that is not a
    plain relative path, two different files of one name, or a name that is a file and a directory.
    """
    if not is_modelpack(manifest):
        seen = ", ".join(dict.fromkeys(layer.media_type for layer in manifest.layers[:_MAX_SHOWN_TYPES])) or "none"
        raise UnsupportedModelError(
            f"not a model: artifactType {manifest.artifact_type or 'none'}, config {manifest.config.media_type}, "
            f"layers {seen}; expected a CNCF ModelPack artifact (artifactType {ARTIFACT_TYPE}), "
            "such as 'modelmount push' makes",
            media_type=manifest.artifact_type or manifest.config.media_type,
        )
    files: dict[str, ModelFile] = {}
    for position, layer in enumerate(manifest.layers):
        file = _file_of(layer, f"layers[{position}]")
        if file is None:
            continue
        held = files.setdefault(file.path, file)
        if held.blob.digest != file.blob.digest:
            raise UnsupportedModelError(
                f"layers[{position}]: {file.path!r} is named twice, with different contents; pack the model again",
                path=file.path,
            )
    if not files:
        raise UnsupportedModelError("the model has no files")
    _refuse_file_directory_conflicts(files)
    return tuple(files.values())


def index_layer_of(manifest: Manifest) -> Descriptor | None:
    """The layer that is the model's block index, if it has one.

    Raises: UnsupportedModelError when it has two.
    """
    found = {layer.digest: layer for layer in manifest.layers if layer.annotations.get(FILEPATH) == INDEX_PATH}
    if len(found) > 1:
        raise UnsupportedModelError(
            f"the model has {len(found)} layers {INDEX_PATH}, expected one; push the model again", path=INDEX_PATH
        )
    return next(iter(found.values()), None)


def _refuse_file_directory_conflicts(paths: Iterable[str]) -> None:
    files = set(paths)
    for path in files:
        parent = path.rpartition("/")[0]
        while parent:
            if parent in files:
                raise UnsupportedModelError(
                    f"{parent!r} is a file and also the directory of {path!r}; pack the model again", path=parent
                )
            parent = parent.rpartition("/")[0]


def _file_of(layer: Descriptor, what: str) -> ModelFile | None:
    """None for a layer that is not a file of the tree."""
    media_type = layer.media_type.lower()
    prefix = next((prefix for prefix in _PREFIXES if media_type.startswith(prefix)), None)
    if prefix is None:
        raise UnsupportedModelError(
            f"{what}: media type {layer.media_type} is not a ModelPack layer ({_PREFIXES[0]}…); push the model again "
            "with 'modelmount push'",
            media_type=layer.media_type,
        )
    category, packing = _split_type(media_type.removeprefix(prefix))
    if packing.startswith("tar"):
        raise UnsupportedModelError(
            f"{what}: media type {layer.media_type} packs files into a tar archive, which this version does not "
            "mount; push the model again with raw layers ('modelmount push')",
            media_type=layer.media_type,
        )
    metadata = _metadata(layer)
    named = [layer.annotations.get(key) for key in _FILEPATHS]
    name = next((name for name in (*named, metadata.get("name"), layer.annotations.get(TITLE)) if name), None)
    if not isinstance(name, str):
        raise UnsupportedModelError(
            f"{what}: the layer has no file name (annotation {FILEPATH}); pack the model again",
            media_type=layer.media_type,
        )
    path = check_member_path(name, what)
    if path.split("/")[0] == _HIDDEN_DIRECTORY:
        return None
    return ModelFile(
        path=path,
        blob=layer,
        category=category,
        mtime_s=_mtime_s(metadata.get("mtime")),
        executable=_is_executable(metadata.get("mode")),
    )


def _split_type(rest: str) -> tuple[str, str]:
    """`weight.config.v1.tar+gzip` → `weight.config`, `tar+gzip`; a category we do not know is `other`."""
    for category in _CATEGORIES:
        head = f"{category}.v1."
        if rest.startswith(head):
            return category, rest[len(head) :]
    return "other", rest.rpartition(".")[2]


def _metadata(layer: Descriptor) -> Mapping[str, Any]:
    """Optional information: what cannot be read is as good as absent."""
    for key in _METADATAS:
        text = layer.annotations.get(key)
        if text is not None and len(text) <= _MAX_METADATA_BYTES:
            try:
                value = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict):
                return value
    return {}


def _is_executable(mode: object) -> bool:
    return isinstance(mode, int) and not isinstance(mode, bool) and 0 < mode < 2**32 and bool(mode & 0o111)


def _mtime_s(value: object) -> int:
    """Seconds of an RFC 3339 time; 0 for what is none, or lies before 1970. A time without a zone is UTC."""
    if not isinstance(value, str) or len(value) > 64:
        return 0
    try:
        time = datetime.fromisoformat(value)
        seconds = int(time.replace(tzinfo=time.tzinfo or UTC).timestamp())
    except (ValueError, OverflowError):
        return 0
    return seconds if 0 <= seconds < _MTIME_LIMIT_S else 0


# --- packing ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file to pack, already hashed. `path` is relative, with `/`.

    There is no modification time here on purpose: a checkout or a copy changes it, and the model's digest would
    change with it.
    """

    path: str
    digest: Digest
    size_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelDescription:
    """What the config says about the model, by the spec's own names; and the manifest's annotations. All optional."""

    name: str | None = None
    version: str | None = None
    family: str | None = None
    title: str | None = None
    description: str | None = None
    vendor: str | None = None
    source_url: str | None = None
    revision: str | None = None
    licenses: tuple[str, ...] = ()
    annotations: Mapping[str, str] = field(default_factory=dict)

    def to_config(self) -> dict[str, Any]:
        """The `descriptor` object of a ModelPack config, without what is not known."""
        known = {
            "name": self.name,
            "version": self.version,
            "family": self.family,
            "title": self.title,
            "description": self.description,
            "vendor": self.vendor,
            "sourceURL": self.source_url,
            "revision": self.revision,
            "licenses": list(self.licenses),
        }
        return {key: value for key, value in known.items() if value}


@dataclass(frozen=True, slots=True)
class PackedModel:
    """The bytes of a model's config, block index and manifest, and the descriptors they hang on. `files[i]` is
    `layers[i]`; the index is one more layer, after them.
    """

    config: bytes
    manifest: bytes
    config_descriptor: Descriptor
    layers: tuple[Descriptor, ...]
    files: tuple[SourceFile, ...]
    index: bytes = b""
    index_layer: Descriptor | None = None

    @property
    def digest(self) -> Digest:
        """What the model is pinned by."""
        return Digest.of(self.manifest)


_WEIGHT_SUFFIXES = (
    ".safetensors", ".gguf", ".ggml", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".onnx_data", ".onnx.data", ".h5",
    ".keras", ".npz", ".npy", ".msgpack", ".tflite", ".pb", ".engine", ".plan", ".dduf", ".pdparams", ".mlmodel",
    ".nemo", ".pkl", ".joblib",
)  # fmt: skip
_DOC_SUFFIXES = (".md", ".rst", ".pdf", ".txt", ".html", ".png", ".jpg", ".jpeg", ".svg")
_DOC_NAMES = ("license", "licence", "notice", "readme", "use_policy", "copying")
_CODE_SUFFIXES = (".py", ".ipynb", ".sh", ".c", ".cc", ".cpp", ".cu", ".h", ".rs", ".go", ".js", ".ts")
_CONFIG_TEXTS = ("vocab.txt", "merges.txt")
_LARGE_BYTES = 128 * 1024 * 1024


def classify(path: str, size_bytes: int) -> str:
    """The ModelPack category of a file, by its name, case ignored; the first that fits:

        weight          the suffixes that frameworks save parameters under
        code            source files
        weight.config   vocab.txt and merges.txt: texts, but a tokenizer needs them
        doc             texts, pictures, and licence or readme files of any suffix or none
        weight          anything else above 128 MiB
        weight.config   anything else: configs, tokenizers, indexes, templates

    Source: the categories of model-spec; the 128 MiB rule is modctl's, so that both sort an unknown file alike.
    """
    name = path.rpartition("/")[2].lower()
    if name.endswith(_WEIGHT_SUFFIXES):
        return "weight"
    if name.endswith(_CODE_SUFFIXES):
        return "code"
    if name not in _CONFIG_TEXTS and (name.endswith(_DOC_SUFFIXES) or name.partition(".")[0] in _DOC_NAMES):
        return "doc"
    return "weight" if size_bytes > _LARGE_BYTES else "weight.config"


def pack(files: Sequence[SourceFile], description: ModelDescription, index: bytes = b"") -> PackedModel:
    """A deterministic model: small files before weights, each group in path order, one raw layer per file, and the
    block index (see `csi.integrity`) as the last one, unless there is none.

    Raises: UnsupportedModelError for no files, too many, or a name that could not be mounted; InvalidVolumeError for
    a description that is not text.
    """
    if not files:
        raise UnsupportedModelError("there are no files to pack")
    if len(files) + bool(index) > MAX_LAYERS:
        raise UnsupportedModelError(f"{len(files)} files to pack, the limit is {MAX_LAYERS - bool(index)}")
    _refuse_unmountable_names(files)
    categories = {file.path: classify(file.path, file.size_bytes) for file in files}
    ordered = tuple(sorted(files, key=lambda file: (categories[file.path] == "weight", file.path)))
    layers = tuple(_layer(file, categories[file.path]) for file in ordered)
    index_layer = _layer(SourceFile(INDEX_PATH, Digest.of(index), len(index)), "doc") if index else None
    all_layers = [*layers, index_layer] if index_layer else layers
    config = _canonical(
        {
            "descriptor": description.to_config(),
            "config": {},
            "modelfs": {"type": "layers", "diffIds": [str(layer.digest) for layer in all_layers]},
        }
    )
    config_descriptor = Descriptor(CONFIG_TYPE, Digest.of(config), len(config))
    document: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": ARTIFACT_TYPE,
        "config": _to_json(config_descriptor),
        "layers": [_to_json(layer) for layer in all_layers],
    }
    if description.annotations:
        document["annotations"] = dict(description.annotations)
    manifest = _canonical(document)
    if len(manifest) > MAX_MANIFEST_BYTES:
        raise UnsupportedModelError(
            f"the manifest of {len(files)} files would have {len(manifest)} bytes, and registries accept "
            f"{MAX_MANIFEST_BYTES}; push fewer files (shards of 2 to 5 GB serve best) or shorter names"
        )
    return PackedModel(config, manifest, config_descriptor, layers, ordered, index, index_layer)


def _refuse_unmountable_names(files: Sequence[SourceFile]) -> None:
    paths = set()
    for file in files:
        path = check_member_path(file.path, "file")
        if path != file.path or path in paths:
            raise UnsupportedModelError(f"file {path!r} is there twice, or begins with './'", path=path)
        if path.split("/")[0] == _HIDDEN_DIRECTORY:
            raise UnsupportedModelError(f"file {path!r}: {_HIDDEN_DIRECTORY}/ is reserved; leave it out", path=path)
        paths.add(path)
    _refuse_file_directory_conflicts(paths)


def _layer(file: SourceFile, category: str) -> Descriptor:
    metadata = {
        "name": file.path,
        "mode": 0o644,
        "uid": 0,
        "gid": 0,
        "size": file.size_bytes,
        "mtime": "1970-01-01T00:00:00Z",
        "typeflag": 0,
    }
    return Descriptor(
        media_type=f"{_PREFIXES[0]}{category}.v1.raw",
        digest=file.digest,
        size_bytes=file.size_bytes,
        annotations={FILEPATH: file.path, TITLE: file.path, METADATA: _canonical(metadata).decode()},
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
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as exc:
        raise InvalidVolumeError(
            f"a name, version or annotation has bytes that are not UTF-8: {exc.object[:80]!r}", field="annotation"
        ) from exc
