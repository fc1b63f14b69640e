"""`pack`: the same files make the same digest, and what is packed can be mounted."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi.errors import InvalidVolumeError, UnsupportedModelError
from csi.oci.digest import Digest
from csi.oci.formats.detect import plan_of
from csi.oci.manifest import OCI_MANIFEST, parse_manifest
from csi.oci.modelpack import (
    ARTIFACT_TYPE,
    CONFIG_TYPE,
    ModelDescription,
    SourceFile,
    classify,
    pack,
)

_NOTHING = ModelDescription()


def source(path: str, content: bytes = b"x") -> SourceFile:
    return SourceFile(path, Digest.of(content), len(content))


_FILES = [
    source("model-00002-of-00002.safetensors", b"22"),
    source("model-00001-of-00002.safetensors", b"1"),
    source("model.safetensors.index.json", b"{}"),
    source("config.json", b"{ }"),
    source("README.md", b"#"),
    source("1_Pooling/config.json", b"{  }"),
    source("empty.txt", b""),
]


def test_golden_bytes() -> None:
    """These digests are in use as pins: a change that moves them makes every model look new. Have a good reason."""
    model = pack(_FILES, ModelDescription(name="m", version="1", annotations={"k": "vé"}))
    assert str(Digest.of(model.config)) == "sha256:78c3a8aaa8b10f861da33dcf6ec947d7468237cdcb54142b4bbd789b478b6635"
    assert str(model.digest) == "sha256:d501d688a7aa839ef26880e4ff9f17b846cd0a9c76ccc545dea6630c699db9e6"


def test_same_files_in_any_order_make_the_same_bytes() -> None:
    shuffled = list(_FILES)
    random.Random(7).shuffle(shuffled)
    assert pack(shuffled, _NOTHING) == pack(_FILES, _NOTHING)


def test_manifest_and_config_follow_the_spec() -> None:
    model = pack(_FILES, ModelDescription(name="m", version="1", family="f", licenses=("MIT",), annotations={"k": "v"}))
    document = json.loads(model.manifest)
    assert document["mediaType"] == OCI_MANIFEST
    assert document["artifactType"] == ARTIFACT_TYPE
    assert document["config"]["mediaType"] == CONFIG_TYPE
    assert document["config"]["digest"] == str(Digest.of(model.config))
    assert document["config"]["size"] == len(model.config)
    assert document["annotations"] == {"k": "v"}
    first = document["layers"][0]
    assert first["annotations"]["org.cncf.model.filepath"] == "1_Pooling/config.json"
    assert first["annotations"]["org.opencontainers.image.title"] == "1_Pooling/config.json"
    assert json.loads(first["annotations"]["org.cncf.model.file.metadata+json"]) == {
        "name": "1_Pooling/config.json",
        "mode": 420,
        "uid": 0,
        "gid": 0,
        "size": 4,
        "mtime": "1970-01-01T00:00:00Z",
        "typeflag": 0,
    }
    config = json.loads(model.config)
    assert config["descriptor"] == {"name": "m", "version": "1", "family": "f", "licenses": ["MIT"]}
    assert config["modelfs"] == {"type": "layers", "diffIds": [layer["digest"] for layer in document["layers"]]}
    for data in (model.manifest, model.config):
        assert data == json.dumps(json.loads(data), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def test_small_files_come_before_weights_each_in_path_order() -> None:
    assert [file.path for file in pack(_FILES, _NOTHING).files] == [
        "1_Pooling/config.json",
        "README.md",
        "config.json",
        "empty.txt",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


_segments = st.text(st.sampled_from("abcé .-_"), min_size=1, max_size=6).filter(lambda name: set(name) != {"."})


@given(
    st.dictionaries(
        st.lists(_segments, min_size=1, max_size=3).map("/".join), st.binary(max_size=3), min_size=1, max_size=8
    )
)
def test_what_is_packed_is_read_back(contents: dict[str, bytes]) -> None:
    files = [source(path, content) for path, content in contents.items()]
    if any(one.startswith(f"{other}/") for one in contents for other in contents):
        with pytest.raises(UnsupportedModelError, match="also the directory of"):
            pack(files, _NOTHING)
        return
    model = pack(files, _NOTHING)
    found = plan_of(parse_manifest(model.manifest, OCI_MANIFEST)).layers
    assert {file.path: (file.descriptor.digest, file.descriptor.size_bytes) for file in found} == {
        path: (Digest.of(content), len(content)) for path, content in contents.items()
    }
    assert all(file.mtime_s == 0 and not file.executable for file in found)


@pytest.mark.parametrize(
    ("path", "category"),
    [
        ("model.safetensors", "weight"),
        ("sub/MODEL.GGUF", "weight"),
        ("pytorch_model.bin", "weight"),
        ("model.onnx_data", "weight"),
        ("config.json", "weight.config"),
        ("pytorch_model.bin.index.json", "weight.config"),
        ("tokenizer.model", "weight.config"),
        ("vocab.txt", "weight.config"),
        ("merges.txt", "weight.config"),
        ("chat_template.jinja", "weight.config"),
        ("license_plates.json", "weight.config"),
        ("README.md", "doc"),
        ("LICENSE", "doc"),
        ("License.json", "doc"),
        ("USE_POLICY.md", "doc"),
        ("figure.png", "doc"),
        ("modeling_x.py", "code"),
        ("readme.py", "code"),
        ("noname", "weight.config"),
    ],
)
def test_categories_go_by_name(path: str, category: str) -> None:
    assert classify(path, 10) == category


def test_an_unknown_file_above_128_mib_is_a_weight() -> None:
    assert classify("blob", 128 * 1024 * 1024) == "weight.config"
    assert classify("blob", 128 * 1024 * 1024 + 1) == "weight"
    assert classify("README.md", 2**40) == "doc"


@pytest.mark.parametrize(
    ("paths", "problem"),
    [
        ([], "no files"),
        (["a", "a"], "is there twice"),
        (["./a"], "begins with './'"),
        (["a", "a/b"], "also the directory of"),
        (["../a"], "leads out of the model"),
        ([".modelmount/index.v1.pb"], "is reserved"),
        ([f"f{n}" for n in range(10_001)], "10001 files to pack, the limit is 10000"),
        ([f"{n}/" + "x" * 200 for n in range(8000)], "push fewer files"),
    ],
)
def test_what_could_not_be_mounted_is_not_packed(paths: list[str], problem: str) -> None:
    with pytest.raises(UnsupportedModelError, match=problem):
        pack([source(path) for path in paths], _NOTHING)


@pytest.mark.parametrize(
    "description", [ModelDescription(name="\udcff"), ModelDescription(annotations={"a": "\udcff"})]
)
def test_a_description_that_is_not_text_is_wrong_usage(description: ModelDescription) -> None:
    with pytest.raises(InvalidVolumeError, match="not UTF-8"):
        pack(_FILES, description)
