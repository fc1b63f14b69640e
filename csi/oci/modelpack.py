"""How a model is packed as a CNCF ModelPack so that it streams well: one raw layer per file, small files first, constant
metadata, so that equal files make an equal digest. Reading is `csi.oci.formats.modelpack`.

Source: model-spec docs/spec.md and docs/annotations.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from csi.errors import InvalidVolumeError, UnsupportedModelError
from csi.oci.descriptor import Descriptor
from csi.oci.digest import Digest
from csi.oci.formats.layer_names import FILEPATH, HIDDEN_DIRECTORY, METADATA, TITLE
from csi.oci.formats.modelpack import PREFIXES
from csi.oci.manifest import MAX_LAYERS, MAX_MANIFEST_BYTES, OCI_MANIFEST, Manifest
from csi.oci.paths import check_member_path

ARTIFACT_TYPE = "application/vnd.cncf.model.manifest.v1+json"
CONFIG_TYPE = "application/vnd.cncf.model.config.v1+json"
INDEX_PATH = f"{HIDDEN_DIRECTORY}/index.v1.pb"
"""The file path of the layer that is the model's block index."""


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
        if path.split("/")[0] == HIDDEN_DIRECTORY:
            raise UnsupportedModelError(f"file {path!r}: {HIDDEN_DIRECTORY}/ is reserved; leave it out", path=path)
        paths.add(path)
    _refuse_file_directory_conflicts(paths)


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
        media_type=f"{PREFIXES[0]}{category}.v1.raw",
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
