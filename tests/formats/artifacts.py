"""Artifacts as their producers write them, one for each format and each habit of a producer that matters to a reader.

Made here because the producers do not install everywhere: modctl, RamaLama, AIKit, KitOps, Docker Model Runner, Ollama and
BuildKit. What does install is used itself, in `test_producers.py`. Contents are a few KiB of bytes that differ from file
to file, so that a wrong offset shows.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import platform
import sys
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

OCI = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
EMPTY = "application/vnd.oci.empty.v1+json"
TITLE = "org.opencontainers.image.title"
FILEPATH = "org.cncf.model.filepath"
METADATA = "org.cncf.model.file.metadata+json"
TAR = "application/vnd.oci.image.layer.v1.tar"
IMAGE_CONFIG = "application/vnd.oci.image.config.v1+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
CNCF = "application/vnd.cncf.model."
CNAI = "application/vnd.cnai.model."
AI = "application/vnd.docker.ai."
KIT = "application/vnd.kitops.modelkit."
OLLAMA = "application/vnd.ollama.image."

Contents = Mapping[str, "bytes | str | None"]
"""Path → bytes of a file, target of a symlink (text), None for a directory."""


def body(name: str, size: int = 5000) -> bytes:
    """`size` bytes that no other name has."""
    block = hashlib.sha512(name.encode()).digest()
    return (block * (size // len(block) + 1))[:size]


@dataclass
class Artifact:
    """A manifest, the blobs it needs, and what a mount of it shows. `attributes` are those of the volume."""

    manifest: dict[str, Any]
    blobs: dict[str, bytes]
    shows: Contents
    attributes: dict[str, str] = field(default_factory=dict)
    children: list[Artifact] = field(default_factory=list)

    @property
    def media_type(self) -> str:
        """What a registry calls the manifest."""
        return str(self.manifest["mediaType"])

    @property
    def data(self) -> bytes:
        """The manifest's bytes."""
        return json.dumps(self.manifest, indent=1).encode()

    @property
    def digest(self) -> str:
        """The manifest's digest."""
        return digest_of(self.data)


def digest_of(data: bytes) -> str:
    """sha256, as descriptors write it."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@dataclass(frozen=True)
class Layer:
    """A blob and its descriptor."""

    media_type: str
    data: bytes
    annotations: Mapping[str, str] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)

    def descriptor(self) -> dict[str, Any]:
        """As it stands in a manifest."""
        described = {"mediaType": self.media_type, "digest": digest_of(self.data), "size": len(self.data)}
        return {**described, **({"annotations": dict(self.annotations)} if self.annotations else {}), **self.more}


def artifact(
    config_type: str,
    layers: Sequence[Layer],
    shows: Contents,
    *,
    config: Any = None,
    artifact_type: str = "",
    media_type: str = OCI,
    annotations: Mapping[str, str] | None = None,
    attributes: dict[str, str] | None = None,
) -> Artifact:
    """A manifest over these layers; an absent config is `{}`."""
    config_data = json.dumps({} if config is None else config).encode()
    manifest: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": media_type,
        "config": Layer(config_type, config_data).descriptor(),
        "layers": [layer.descriptor() for layer in layers],
    }
    if artifact_type:
        manifest["artifactType"] = artifact_type
    if annotations:
        manifest["annotations"] = dict(annotations)
    blobs = {digest_of(data): data for data in [config_data, *(layer.data for layer in layers)]}
    return Artifact(manifest, blobs, shows, attributes or {})


def tar(contents: Contents, *, edit: Callable[[tarfile.TarInfo], None] | None = None, pax: bool = False) -> bytes:
    """A tar of these, in this order. A text is a symlink; `edit` may change a header."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT) as archive:
        for path, content in contents.items():
            info = tarfile.TarInfo(path)
            info.mode = 0o644
            if content is None:
                info.type, info.mode = tarfile.DIRTYPE, 0o755
            elif isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
            else:
                info.size = len(content)
            if edit is not None:
                edit(info)
            archive.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return out.getvalue()


def packed(data: bytes, packing: str) -> bytes:
    """`data` as `tar`, `tar+gzip` or `tar+zstd` has it."""
    match packing:
        case "tar+gzip":
            return gzip.compress(data, mtime=0)
        case "tar+zstd":
            return zstd.compress(data)
        case _:
            return data


def raw(media_type: str, path: str, **annotations: str) -> Layer:
    """One file, with the file path annotation and others by keyword."""
    return Layer(media_type, body(path), {FILEPATH: path, **annotations})


def files(*paths: str) -> dict[str, bytes | str | None]:
    """These paths with the contents that `raw` gives them, and their directories."""
    shown: dict[str, bytes | str | None] = {}
    for path in paths:
        parts = path.split("/")[:-1]
        shown.update({"/".join(parts[: depth + 1]): None for depth in range(len(parts))})
        shown[path] = body(path)
    return shown


# --- CNCF ModelPack ---------------------------------------------------------------------------------------------


def metadata(path: str, typeflag: int) -> str:
    """File metadata; producers disagree about the type flag of a file: 0 or 48."""
    described = {"name": path, "mode": 0o644, "uid": 0, "gid": 0, "size": 5000, "mtime": "2025-03-01T12:00:00Z"}
    return json.dumps({**described, "typeflag": typeflag})


def modctl() -> Artifact:
    """Raw layers, config files first; the Modelfile as an annotation, a time in the config."""
    layers = [
        raw(f"{CNCF}{kind}.v1.raw", path, **{METADATA: metadata(path, 0)})
        for kind, path in [
            ("weight.config", "config.json"),
            ("weight", "model-00001-of-00002.safetensors"),
            ("weight", "model-00002-of-00002.safetensors"),
            ("code", "src/run.py"),
            ("doc", "README.md"),
        ]
    ]
    return artifact(
        f"{CNCF}config.v1+json",
        layers,
        files(*(layer.annotations[FILEPATH] for layer in layers)),
        config={"descriptor": {"createdAt": "2025-03-01T12:00:00Z"}, "modelfs": {"type": "layers", "diffIds": []}},
        artifact_type=f"{CNCF}manifest.v1+json",
        annotations={"org.cncf.modctl.modelfile": "NAME x\nCONFIG config.json\n"},
    )


def modctl_before_raw() -> Artifact:
    """Until v0.1.1 every file was a tar of its own."""
    paths = ("config.json", "sub/model.safetensors")
    layers = [
        Layer(f"{CNCF}weight.v1.tar", tar({path: body(path)}), {FILEPATH: path, METADATA: metadata(path, 0)})
        for path in paths
    ]
    return artifact(f"{CNCF}config.v1+json", layers, files(*paths), artifact_type=f"{CNCF}manifest.v1+json")


def cnai() -> Artifact:
    """The names before v0.0.7 of the spec; snake case in the config."""
    return artifact(
        f"{CNAI}config.v1+json",
        [
            Layer(f"{CNAI}weight.v1.raw", body("model.bin"), {"org.cnai.model.filepath": "model.bin"}),
            Layer(
                f"{CNAI}weight.config.v1.raw",
                body("tokenizer.json"),
                {"org.cnai.model.file.metadata": metadata("tokenizer.json", 0)},
            ),
            Layer(f"{CNAI}doc.v1.tar", tar({"docs/README.md": body("docs/README.md")})),
        ],
        files("model.bin", "tokenizer.json", "docs/README.md"),
        config={"modelfs": {"type": "layers", "diff_ids": []}},
        artifact_type=f"{CNAI}manifest.v1+json",
    )


def all_twenty_types() -> Artifact:
    """Five categories in four packings."""
    layers, paths = [], []
    for category in ("weight", "weight.config", "doc", "code", "dataset"):
        for packing in ("raw", "tar", "tar+gzip", "tar+zstd"):
            path = f"{category}/{packing.replace('+', '-')}/file.bin"
            paths.append(path)
            media_type = f"{CNCF}{category}.v1.{packing}"
            if packing == "raw":
                layers.append(raw(media_type, path))
            else:
                layers.append(Layer(media_type, packed(tar(files(path)), packing), {FILEPATH: path}))
    return artifact(f"{CNCF}config.v1+json", layers, files(*paths), artifact_type=f"{CNCF}manifest.v1+json")


def docker_as_cncf() -> Artifact:
    """Types of Docker's own after `weight.v1.`, and nothing but the layers to tell the format by."""
    return artifact(
        EMPTY,
        [raw(f"{CNCF}weight.v1.gguf", "model.gguf"), raw(f"{CNCF}weight.v1.safetensors", "a.safetensors")],
        files("model.gguf", "a.safetensors"),
    )


def ramalama() -> Artifact:
    """Type flag 48, a layer type of its own, title and file path."""
    return artifact(
        f"{CNCF}config.v1+json",
        [
            raw(f"{CNCF}weight.v1.raw", "model.gguf", **{TITLE: "model.gguf", METADATA: metadata("model.gguf", 48)}),
            Layer(f"{CNCF}layer.v1.tar", tar(files("chat_template.jinja"))),
            Layer(f"{CNCF}layer.v1.tar+gzip", packed(tar(files("extra/config.json")), "tar+gzip")),
        ],
        files("model.gguf", "chat_template.jinja", "extra/config.json"),
    )


def aikit() -> Artifact:
    """Everything but weights in one archive per category, annotated with the category's name; the config is `{}`."""
    return artifact(
        f"{CNCF}config.v1+json",
        [
            raw(f"{CNCF}weight.v1.raw", "model.safetensors", **{TITLE: "model.safetensors"}),
            Layer(
                f"{CNCF}weight.config.v1.tar",
                tar(files("config.json", "tokenizer/vocab.json")),
                {FILEPATH: "weight.config", TITLE: "weight.config"},
            ),
            Layer(f"{CNCF}doc.v1.tar+zstd", packed(tar(files("README.md")), "tar+zstd"), {FILEPATH: "doc"}),
        ],
        files("model.safetensors", "config.json", "tokenizer/vocab.json", "README.md"),
        artifact_type=f"{CNCF}manifest.v1+json",
    )


# --- KitOps -----------------------------------------------------------------------------------------------------


def kit() -> Artifact:
    """Names in the archives, digests in the Kitfile, no artifact type; a bundle as it is, and a prompt."""
    model = Layer(f"{KIT}model.v1.tar", tar({"./model": None, "./model/a.gguf": body("model/a.gguf")}))
    code = Layer(f"{KIT}code.v1.tar+gzip", packed(tar(files("src/run.py")), "tar+gzip"))
    docs = Layer(f"{KIT}docs.v1.tar+zstd", packed(tar(files("README.md")), "tar+zstd"))
    bundle = raw(f"{KIT}mcpb.v1.raw", "server.mcpb")
    prompt = Layer(f"{KIT}code.v1.tar", tar(files("prompts/a.md")))
    kitfile = {
        "manifestVersion": "1.0.0",
        "model": {"name": "m", "path": "./model", "digest": digest_of(model.data)},
        "code": [{"path": "src", "digest": digest_of(code.data)}],
        "docs": [{"path": "README.md", "digest": digest_of(docs.data)}],
        "prompts": [{"path": "prompts/a.md", "digest": digest_of(prompt.data)}],
        "mcpServers": [{"path": "./server.mcpb", "digest": digest_of(bundle.data)}],
    }
    return artifact(
        f"{KIT}config.v1+json",
        [model, code, docs, bundle, prompt],
        files("model/a.gguf", "src/run.py", "README.md", "server.mcpb", "prompts/a.md"),
        config=kitfile,
        annotations={"ml.kitops.modelkit.cli-version": "1.7.0"},
    )


def old_kit() -> Artifact:
    """Before v0.5: archives begin at the directory of the path in the Kitfile."""
    return artifact(
        f"{KIT}config.v1+json",
        [
            Layer(f"{KIT}model.v1.tar", tar({"a.gguf": body("weights/a.gguf")})),
            Layer(f"{KIT}dataset.v1.tar", tar({"train": None, "train/1.csv": body("data/train/1.csv")})),
        ],
        files("weights/a.gguf", "data/train/1.csv"),
        config={"model": {"path": "./weights/a.gguf"}, "datasets": [{"path": "data/train"}]},
    )


# --- Docker Model Runner, Ollama --------------------------------------------------------------------------------


def docker_v01() -> Artifact:
    """No names at all: the runner makes them up."""
    return artifact(
        f"{AI}model.config.v0.1+json",
        [
            Layer(f"{AI}gguf.v3", body("model.gguf")),
            Layer(f"{AI}license", body("LICENSE")),
            Layer(f"{AI}chat.template.jinja", body("template.jinja")),
            Layer(f"{AI}mmproj", body("model.mmproj")),
        ],
        files("model.gguf", "LICENSE", "template.jinja", "model.mmproj"),
        config={"config": {"format": "gguf"}, "rootfs": {"type": "rootfs", "diff_ids": ["sha256:0"]}},
    )


def docker_v01_shards() -> Artifact:
    """Several weights, and the archives that are to be expanded."""
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    return artifact(
        f"{AI}model.config.v0.1+json",
        [
            *(Layer(f"{AI}safetensors", body(name)) for name in names),
            Layer(f"{AI}vllm.config.tar", tar(files("config.json"))),
            Layer(f"{AI}dir.tar", tar(files("text_encoder/config.json"))),
        ],
        files(*names, "config.json", "text_encoder/config.json"),
    )


def docker_v02() -> Artifact:
    """One layer a file, with its path."""
    return artifact(
        f"{AI}model.config.v0.2+json",
        [raw(f"{AI}safetensors", "unet/a.safetensors"), raw(f"{AI}model.file", "tokenizer.json")],
        files("unet/a.safetensors", "tokenizer.json"),
    )


def ollama() -> Artifact:
    """A Docker manifest; nothing but layer types to go by, and a field `from` that is none of the spec's."""
    names = {"model": "model.gguf", "template": "template", "params": "params.json", "license": "LICENSE"}
    return artifact(
        DOCKER_CONFIG,
        [Layer(OLLAMA + kind, body(name), more={"from": "/root/.ollama/x"}) for kind, name in names.items()],
        files(*names.values()),
        config={"model_format": "gguf", "rootfs": {"type": "layers", "diff_ids": ["sha256:0"]}},
        media_type=DOCKER,
    )


# --- ORAS -------------------------------------------------------------------------------------------------------


def oras_generic() -> Artifact:
    """Files typed as archives they are not, a directory with the unpack annotation, a layer without a name."""
    folder = {
        "tokenizer": None,
        **files("tokenizer/vocab.json", "tokenizer/deep/merges.txt"),
        "tokenizer/v": "vocab.json",
    }
    archive = tar(folder)
    return artifact(
        EMPTY,
        [
            Layer(TAR, body("model.safetensors"), {TITLE: "model.safetensors"}),
            Layer(
                f"{TAR}+gzip",
                packed(archive, "tar+gzip"),
                {
                    TITLE: "tokenizer",
                    "io.deis.oras.content.unpack": "true",
                    "io.deis.oras.content.digest": digest_of(archive),
                },
            ),
            Layer("application/octet-stream", body("sub/readme.txt"), {TITLE: "sub/readme.txt"}),
            Layer(EMPTY, b"{}"),
        ],
        {**files("model.safetensors", "sub/readme.txt"), **folder},
        artifact_type="application/vnd.unknown.artifact.v1",
    )


def oras_undecided() -> Artifact:
    """Titled tar+gzip layers without that annotation: a directory as oras-py packs it, and files that happen to be one."""
    folder = {"model": None, **files("model/config.json")}
    archive_file = packed(tar(files("elsewhere/x")), "tar+gzip")
    return artifact(
        "application/vnd.unknown.config.v1+json",
        [
            Layer(f"{TAR}+gzip", packed(tar(folder), "tar+gzip"), {TITLE: "model"}),
            Layer(f"{TAR}+gzip", archive_file, {TITLE: "data.tar.gz"}),
            Layer(f"{TAR}+gzip", body("plain"), {TITLE: "plain"}),
        ],
        {**folder, "data.tar.gz": archive_file, **files("plain")},
    )


# --- images -----------------------------------------------------------------------------------------------------


def image(layers: Iterable[Layer], shows: Contents, *, docker: bool = False, **more: Any) -> Artifact:
    """An image with a config as builders write it."""
    found = list(layers)
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [digest_of(layer.data) for layer in found]},
    }
    config_type, media_type = (DOCKER_CONFIG, DOCKER) if docker else (IMAGE_CONFIG, OCI)
    return artifact(config_type, found, shows, config=config, media_type=media_type, **more)


BASE = {"bin": None, "bin/busybox": body("bin/busybox"), "bin/sh": "busybox", "etc/passwd": body("etc/passwd")}


def model_car() -> Artifact:
    """A base, and layers of a model above it; one replaced, one removed, one hidden by an opaque directory."""
    model = {"models": None, "models/a.bin": body("old"), "models/gone.bin": body("gone"), "models/tmp/x": body("x")}
    upper = {
        "models/a.bin": body("models/a.bin"),
        "models/.wh.gone.bin": b"",
        "models/tmp/.wh..wh..opq": b"",
        "models/tmp/y": body("models/tmp/y"),
    }
    return image(
        [
            Layer(f"{TAR}+gzip", packed(tar(BASE), "tar+gzip")),
            Layer(TAR, tar(model)),
            Layer(f"{TAR}+zstd", packed(tar(upper), "tar+zstd")),
        ],
        {**BASE, "etc": None, **files("models/a.bin", "models/tmp/y")},
    )


def docker_car() -> Artifact:
    """Docker's media types, links as RamaLama and Hugging Face caches have them, mounted by its sub-path."""

    def hard_links(info: tarfile.TarInfo) -> None:
        if info.name == "models/again.gguf":
            info.type, info.linkname = tarfile.LNKTYPE, "models/blobs/1"

    model = {
        "models": None,
        "models/blobs/1": body("blobs/1"),
        "models/model.file": "/models/blobs/1",
        "models/hf/snapshots/main/model.gguf": "../../../blobs/1",
        "models/again.gguf": "",
        "models/run.sh": body("run.sh"),
    }
    return image(
        [
            Layer("application/vnd.docker.image.rootfs.diff.tar.gzip", packed(tar(BASE), "tar+gzip")),
            Layer("application/vnd.docker.image.rootfs.diff.tar", tar(model, edit=hard_links)),
        ],
        {
            "blobs": None,
            "blobs/1": body("blobs/1"),
            "model.file": "blobs/1",
            "hf": None,
            "hf/snapshots": None,
            "hf/snapshots/main": None,
            "hf/snapshots/main/model.gguf": "../../../blobs/1",
            "again.gguf": body("blobs/1"),
            "run.sh": body("run.sh"),
        },
        docker=True,
        attributes={"subPath": "models"},
    )


def oci_modelcar_like() -> Artifact:
    """One uncompressed archive a file, names too long for the plain header."""
    paths = [f"models/{'deep-directory/' * 12}weights-{number}.safetensors" for number in range(2)]
    return image([Layer(TAR, tar(files(path), pax=number == 0)) for number, path in enumerate(paths)], files(*paths))


# --- indexes ----------------------------------------------------------------------------------------------------


def index(
    entries: Sequence[tuple[Artifact, dict[str, Any]]], chosen: int, media_type: str, **attributes: str
) -> Artifact:
    """An index of artifacts; the attributes choose entry `chosen`."""
    manifests = [
        {"mediaType": entry.media_type, "digest": entry.digest, "size": len(entry.data), **more}
        for entry, more in entries
    ]
    return Artifact(
        {"schemaVersion": 2, "mediaType": media_type, "manifests": manifests},
        {},
        entries[chosen][0].shows,
        attributes,
        [entry for entry, _ in entries],
    )


def attestation() -> Artifact:
    """What BuildKit lists beside an image."""
    return artifact(
        IMAGE_CONFIG,
        [Layer("application/vnd.in-toto+json", b'{"_type":"https://in-toto.io/Statement/v1"}')],
        {},
        config={"architecture": "unknown", "os": "unknown", "rootfs": {"type": "layers", "diff_ids": ["sha256:0"]}},
    )


def multi_platform_car() -> Artifact:
    """An image for two platforms and its attestation; the node's platform decides."""
    both = {arch: {"platform": {"os": "linux", "architecture": arch}} for arch in ("amd64", "arm64")}
    other = {
        "platform": {"os": "unknown", "architecture": "unknown"},
        "annotations": {"vnd.docker.reference.type": "attestation-manifest"},
    }
    cars = {arch: image([Layer(TAR, tar(files(f"models/{arch}")))], files(f"models/{arch}")) for arch in both}
    here = ["amd64", "arm64"].index({"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()])
    entries = [(cars[arch], more) for arch, more in both.items()]
    return index([*entries, (attestation(), other)], here, DOCKER_LIST)


def quantizations() -> Artifact:
    """One model in two precisions; the volume names its own."""
    entries = [
        (
            artifact(f"{CNCF}config.v1+json", [raw(f"{CNCF}weight.v1.raw", f"{name}.gguf")], files(f"{name}.gguf")),
            {"artifactType": f"{CNCF}manifest.v1+json", "annotations": {"org.example.quantization": name}},
        )
        for name in ("q4", "q8")
    ]
    return index(entries, 1, OCI_INDEX, variant="quantization=q8")


ARTIFACTS: dict[str, Callable[[], Artifact]] = {
    make.__name__: make
    for make in (
        modctl,
        modctl_before_raw,
        cnai,
        all_twenty_types,
        docker_as_cncf,
        ramalama,
        aikit,
        kit,
        old_kit,
        docker_v01,
        docker_v01_shards,
        docker_v02,
        ollama,
        oras_generic,
        oras_undecided,
        model_car,
        docker_car,
        oci_modelcar_like,
        multi_platform_car,
        quantizations,
    )
}
"""All of them by name. Each call makes the same bytes."""
