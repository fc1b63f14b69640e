"""Which format a manifest follows, what its layers become, and what is refused and why."""

from __future__ import annotations

import json
from typing import Any

import pytest

from csi.errors import UnsupportedModelError
from csi.oci.descriptor import Descriptor
from csi.oci.digest import Digest
from csi.oci.formats import kitops
from csi.oci.formats.detect import needs_config, plan_of
from csi.oci.formats.plan import ModelFormat, ModelPlan, Packing
from csi.oci.manifest import DOCKER_MANIFEST, OCI_MANIFEST, Manifest

EMPTY = "application/vnd.oci.empty.v1+json"
TAR = "application/vnd.oci.image.layer.v1.tar"
GZIP = f"{TAR}+gzip"
IMAGE_CONFIG = "application/vnd.oci.image.config.v1+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
AI = "application/vnd.docker.ai."
KIT = "application/vnd.kitops.modelkit."
OLLAMA = "application/vnd.ollama.image."
_NAMES = {
    "title": "org.opencontainers.image.title",
    "filepath": "org.cncf.model.filepath",
    "unpack": "io.deis.oras.content.unpack",
}


def layer(media_type: str, content: str = "", **annotations: str) -> Descriptor:
    """Different layers have different contents unless told otherwise."""
    data = (content or media_type + repr(annotations)).encode()
    return Descriptor(
        media_type, Digest.of(data), len(data), {_NAMES[key]: value for key, value in annotations.items()}
    )


def manifest(
    config_type: str, *layers: Descriptor, artifact_type: str = "", media_type: str = OCI_MANIFEST
) -> Manifest:
    return Manifest(media_type, artifact_type, Descriptor(config_type, Digest.of(b"{}"), 2), layers)


def plan(found: Manifest, config: Any = None) -> ModelPlan:
    assert needs_config(found) == (config is not None)
    return plan_of(found, None if config is None else json.dumps(config).encode())


def paths(found: ModelPlan) -> list[str]:
    return [planned.path for planned in found.layers]


def refusal(found: Manifest, config: Any = None) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        plan_of(found, None if config is None else json.dumps(config).encode())
    return str(caught.value)


# --- images -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config_type", [IMAGE_CONFIG, DOCKER_CONFIG])
def test_an_image_is_an_overlay_of_archives(config_type: str) -> None:
    types = {
        TAR: Packing.TAR,
        GZIP: Packing.TAR_GZIP,
        f"{TAR}+zstd": Packing.TAR_ZSTD,
        "application/vnd.docker.image.rootfs.diff.tar.gzip": Packing.TAR_GZIP,
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip": Packing.TAR_GZIP,
    }
    found = plan(manifest(config_type, *map(layer, types), artifact_type=config_type))
    assert (found.format, found.is_overlay) == (ModelFormat.IMAGE, True)
    assert [planned.packing for planned in found.layers] == list(types.values())
    assert found.archives == (0, 1, 2, 3, 4)


def test_only_the_config_tells_an_image_from_named_layers_of_image_types() -> None:
    named = manifest(IMAGE_CONFIG, layer(TAR, title="model.gguf"))
    assert plan(named, {"rootfs": {"type": "layers", "diff_ids": ["sha256:0"]}}).format is ModelFormat.IMAGE
    configs: list[dict[str, Any]] = [{}, {"rootfs": {"diff_ids": []}}, {"rootfs": 1}]
    for config in configs:
        found = plan(named, config)
        assert (found.format, paths(found)) == (ModelFormat.ORAS, ["model.gguf"])


def test_an_artifact_type_makes_an_image_none() -> None:
    found = plan(manifest(IMAGE_CONFIG, layer(TAR, title="a"), artifact_type="application/x"))
    assert found.format is ModelFormat.ORAS


# --- ORAS -------------------------------------------------------------------------------------------------------


def test_files_directories_and_undecided_layers() -> None:
    found = plan(
        manifest(
            EMPTY,
            layer(TAR, title="model.safetensors"),
            layer(GZIP, title="tokenizer", unpack="true"),
            layer("application/x", title="sub/deep/", unpack="true"),
            layer(GZIP, title="maybe"),
            layer(GZIP, title=".", unpack="true"),
            layer("application/octet-stream", title="./a/b"),
            layer(EMPTY),
            artifact_type="application/vnd.unknown.artifact.v1",
        )
    )
    assert found.format is ModelFormat.ORAS
    assert [(p.packing, p.path, p.member_root, p.maybe_file) for p in found.layers] == [
        (Packing.RAW, "model.safetensors", "", False),
        (Packing.TAR_GZIP, "", "tokenizer", False),
        (Packing.TAR_GZIP, "", "sub/deep", False),
        (Packing.TAR_GZIP, "maybe", "maybe", True),
        (Packing.TAR_GZIP, "", "", False),
        (Packing.RAW, "a/b", "", False),
    ]
    assert found.warnings == (f"layers[6]: left out; it has no name ({EMPTY})",)


@pytest.mark.parametrize("title", ["/abs", "../up", "a/../../b", "/"])
def test_directory_titles_are_checked_too(title: str) -> None:
    assert "title of a packed directory" in refusal(manifest(EMPTY, layer(GZIP, title=title, unpack="true")))


# --- Docker Model Runner ----------------------------------------------------------------------------------------


def test_names_of_version_0_1_are_those_the_runner_makes_up() -> None:
    found = plan(
        manifest(
            f"{AI}model.config.v0.1+json",
            layer(f"{AI}gguf.v3", filepath="ignored/by/the/runner.gguf"),
            layer(f"{AI}license", "1"),
            layer(f"{AI}license", "2"),
            layer(f"{AI}license", "1"),
            layer(f"{AI}mmproj"),
            layer(f"{AI}chat.template.jinja"),
            layer(f"{AI}vllm.config.tar"),
            layer(f"{AI}dir.tar"),
            layer(f"{AI}novelty"),
        )
    )
    assert found.format is ModelFormat.DOCKER_AI
    names = ["model.gguf", "LICENSE-1", "LICENSE-2", "LICENSE-1", "model.mmproj", "template.jinja", "", ""]
    assert paths(found) == names
    assert found.archives == (6, 7)
    assert found.warnings == (f"layers[8]: left out; it has no name ({AI}novelty)",)


def test_shards_of_version_0_1_are_numbered() -> None:
    shards = [layer(f"{AI}safetensors", str(number)) for number in range(3)]
    assert paths(plan(manifest(f"{AI}model.config.v0.1+json", *shards))) == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
    ]


def test_version_0_2_has_names_and_makes_up_the_missing() -> None:
    found = plan(
        manifest(
            f"{AI}model.config.v0.2+json",
            layer(f"{AI}safetensors", filepath="sub/a.safetensors"),
            layer(f"{AI}safetensors", "unnamed"),
            layer(f"{AI}model.file", filepath="tokenizer.json"),
            layer(f"{AI}dduf"),
        )
    )
    assert paths(found) == ["sub/a.safetensors", "model.safetensors", "tokenizer.json", "model.dduf"]


# --- Ollama -----------------------------------------------------------------------------------------------------


def test_an_ollama_model_looks_like_an_image_and_is_files() -> None:
    kinds = ["model", "projector", "template", "params", "license", "system", "adapter", "messages", "embed"]
    layers = [layer(OLLAMA + kind) for kind in kinds]
    found = plan(manifest(DOCKER_CONFIG, *layers, media_type=DOCKER_MANIFEST))
    assert found.format is ModelFormat.OLLAMA
    assert paths(found) == [
        "model.gguf",
        "mmproj.gguf",
        "template",
        "params.json",
        "LICENSE",
        "system",
        "adapter.gguf",
        "messages.json",
    ]
    assert "embed" in found.warnings[0]


@pytest.mark.parametrize("kind", ["tensor", "json"])
def test_a_model_stored_by_tensor_is_refused_with_the_reason(kind: str) -> None:
    message = refusal(manifest(DOCKER_CONFIG, layer(OLLAMA + "license"), layer(OLLAMA + kind)))
    assert message.startswith("layers[1]: this Ollama model is stored tensor by tensor")
    assert "GGUF variant" in message


# --- KitOps -----------------------------------------------------------------------------------------------------

KIT_CONFIG = f"{KIT}config.v1+json"


def test_a_kit_of_today() -> None:
    kitfile = {
        "manifestVersion": "1.0.0",
        "model": {"path": "./model.gguf", "digest": "sha256:1", "parts": [{"path": "x", "digest": "sha256:2"}]},
        "datasets": [{"path": "far", "remotePath": "s3://bucket/key"}],
    }
    found = plan(
        manifest(
            KIT_CONFIG,
            layer(f"{KIT}model.v1.tar"),
            layer(f"{KIT}modelpart.v1.tar+zstd"),
            layer(f"{KIT}code.v1.tar+gzip"),
            layer(f"{KIT}mcpb.v1.raw", filepath="./server.mcpb"),
            layer(f"{KIT}prompts.v1.raw", filepath="prompts//a.md"),
            layer("application/x"),
        ),
        kitfile,
    )
    assert (found.format, found.parent) == (ModelFormat.KITOPS, None)
    assert [(p.category, p.packing, p.path, p.base) for p in found.layers] == [
        ("model", Packing.TAR, "", ""),
        ("modelpart", Packing.TAR_ZSTD, "", ""),
        ("code", Packing.TAR_GZIP, "", ""),
        ("mcpb", Packing.RAW, "server.mcpb", ""),
        ("prompts", Packing.RAW, "prompts/a.md", ""),
    ]
    assert found.warnings == (
        "dataset 'far': left out; it lies outside the kit, at a remote path",
        "layers[5]: left out; media type application/x is no ModelKit layer",
    )


def test_an_old_kit_unpacks_beside_the_paths_of_its_kitfile() -> None:
    kitfile = {
        "model": {"path": "./models/a.gguf", "parts": [{"path": "parts/p"}]},
        "code": [{"path": "src/one"}, {"path": "two"}, {"path": "."}],
        "docs": "nonsense",
    }
    layers = ("model", "modelpart", "code", "code", "code", "code", "docs")
    found = plan(
        manifest(KIT_CONFIG, *(layer(f"{KIT}{kind}.v1.tar", f"{n}") for n, kind in enumerate(layers))), kitfile
    )
    assert [planned.base for planned in found.layers] == ["models", "parts", "src", "", "", "", ""]
    evil = {"model": {"path": "../../etc/x"}}
    assert "its path in the Kitfile" in refusal(manifest(KIT_CONFIG, layer(f"{KIT}model.v1.tar")), evil)


def test_a_kit_on_a_kit_names_its_parent() -> None:
    kit = manifest(KIT_CONFIG, layer(f"{KIT}code.v1.tar"))
    assert plan(kit, {"model": {"path": "r.io/base/kit:1"}}).parent == "r.io/base/kit:1"
    assert plan(manifest(KIT_CONFIG), {"model": {"path": f"r.io/b@{Digest.of(b'x')}"}}).parent is not None
    assert plan(kit, {"model": {"path": "./weights"}}).parent is None
    assert plan(kit, {"model": None}).parent is None
    own_model = manifest(KIT_CONFIG, layer(f"{KIT}model.v1.tar"))
    assert plan(own_model, {"model": {"path": "odd:name"}}).parent is None
    assert "no whole reference" in refusal(kit, {"model": {"path": "base:1"}})


def test_a_parent_gives_its_model_layers_and_its_own_parent() -> None:
    kit = plan(manifest(KIT_CONFIG, layer(f"{KIT}code.v1.tar", "kit")), {"model": {"path": "r.io/base:1"}})
    base = plan(
        manifest(KIT_CONFIG, layer(f"{KIT}modelpart.v1.tar"), layer(f"{KIT}docs.v1.tar")),
        {"model": {"path": "r.io/root:2", "parts": []}},
    )
    root = plan(manifest(EMPTY, layer("application/vnd.cncf.model.weight.v1.raw", filepath="w")))
    once = kitops.with_parent(kit, base, "r.io/base")
    assert [(p.category, p.origin) for p in once.layers] == [("modelpart", "r.io/base"), ("code", "")]
    whole = kitops.with_parent(once, root, "r.io/root")
    assert [p.origin for p in whole.layers] == ["r.io/root", "r.io/base", ""]
    assert whole.parent is None
    car = plan(manifest(IMAGE_CONFIG, layer(TAR)))
    with pytest.raises(UnsupportedModelError, match="of format image"):
        kitops.with_parent(kit, car, "r.io/car")


def test_chains_of_kits_are_short_and_have_an_end() -> None:
    kitops.check_chain([f"r.io/k{number}:1" for number in range(11)])
    with pytest.raises(UnsupportedModelError, match="more than 10"):
        kitops.check_chain([f"r.io/k{number}:1" for number in range(12)])
    with pytest.raises(UnsupportedModelError, match=r"in a circle: r\.io/a:1 → r\.io/b:1 → r\.io/a:1"):
        kitops.check_chain(["r.io/a:1", "r.io/b:1", "r.io/a:1"])


# --- refusals ---------------------------------------------------------------------------------------------------


def test_something_else_is_refused_with_what_was_seen() -> None:
    helm = manifest("application/vnd.cncf.helm.config.v1+json", *[layer("application/x")] * 3, layer("application/y"))
    message = refusal(helm)
    assert "artifactType none" in message
    assert "config application/vnd.cncf.helm.config.v1+json" in message
    assert "layers application/x, application/y;" in message
    assert "layers none" in refusal(manifest(EMPTY))


def test_cog_weights_are_refused_with_the_reason() -> None:
    for artifact_type, config_type in [
        ("application/vnd.cog.weight.v1", EMPTY),
        ("", "application/vnd.cog.weight.config.v1+json"),
    ]:
        found = manifest(config_type, layer(TAR, title="x"), artifact_type=artifact_type)
        with pytest.raises(UnsupportedModelError, match="set of Cog weights"):
            needs_config(found)


def test_a_model_without_any_file_is_refused_with_what_was_left_out() -> None:
    found = manifest(f"{AI}model.config.v0.2+json", layer(f"{AI}novelty"))
    assert refusal(found).startswith("the model has no files; layers[0]: left out")


@pytest.mark.parametrize("config", [b"[]", b"{", b'{"a":1,"a":2}', b"\xff"])
def test_a_config_that_is_not_one_object_is_refused(config: bytes) -> None:
    with pytest.raises(UnsupportedModelError, match="config"):
        plan_of(manifest(KIT_CONFIG, layer(f"{KIT}model.v1.tar")), config)
