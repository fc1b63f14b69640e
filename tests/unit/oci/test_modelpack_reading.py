"""`files_of`: which file each layer is."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi.errors import UnsupportedModelError
from csi.oci.descriptor import Descriptor
from csi.oci.digest import Digest
from csi.oci.manifest import OCI_MANIFEST, Manifest
from csi.oci.modelpack import files_of, is_modelpack

_RAW = "application/vnd.cncf.model.weight.v1.raw"
_EMPTY = "application/vnd.oci.empty.v1+json"


def layer(media_type: str = _RAW, content: bytes = b"x", **annotations: Any) -> Descriptor:
    """Keyword names stand for annotations: `filepath`, `cnai`, `metadata`, `title`."""
    keys = {
        "filepath": "org.cncf.model.filepath",
        "cnai": "org.cnai.model.filepath",
        "metadata": "org.cncf.model.file.metadata+json",
        "old_metadata": "org.cnai.model.file.metadata",
        "title": "org.opencontainers.image.title",
    }
    named = {keys[key]: value for key, value in annotations.items()}
    return Descriptor(media_type, Digest.of(content), len(content), named)


def model(*layers: Descriptor, artifact_type: str = "", config_type: str = _EMPTY) -> Manifest:
    return Manifest(OCI_MANIFEST, artifact_type, Descriptor(config_type, Digest.of(b"{}"), 2), layers)


def refusal(manifest: Manifest) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        files_of(manifest)
    return str(caught.value)


@pytest.mark.parametrize(
    "manifest",
    [
        model(artifact_type="application/vnd.cncf.model.manifest.v1+json"),
        model(artifact_type="application/vnd.cnai.model.manifest.v1+json"),
        model(config_type="application/vnd.cncf.model.config.v1+json"),
        model(config_type="application/vnd.cnai.model.config.v1+json"),
        model(layer("application/octet-stream"), layer("application/vnd.CNCF.model.doc.v1.raw")),
    ],
)
def test_any_one_sign_makes_a_modelpack(manifest: Manifest) -> None:
    assert is_modelpack(manifest)


def test_something_else_is_refused_with_what_was_seen_and_what_is_accepted() -> None:
    image = model(
        *[layer("application/vnd.oci.image.layer.v1.tar+gzip")] * 3,
        layer("application/x"),
        config_type="application/vnd.oci.image.config.v1+json",
    )
    message = refusal(image)
    assert "artifactType none" in message
    assert "config application/vnd.oci.image.config.v1+json" in message
    assert "layers application/vnd.oci.image.layer.v1.tar+gzip, application/x;" in message
    assert "expected a CNCF ModelPack artifact (artifactType application/vnd.cncf.model.manifest.v1+json)" in message
    assert "layers none" in refusal(model())


@pytest.mark.parametrize(
    ("annotations", "path"),
    [
        ({"filepath": "a", "cnai": "b", "metadata": '{"name": "c"}', "title": "d"}, "a"),
        ({"cnai": "b", "metadata": '{"name": "c"}', "title": "d"}, "b"),
        ({"metadata": '{"name": "c"}', "title": "d"}, "c"),
        ({"old_metadata": '{"name": "c"}', "title": "d"}, "c"),
        ({"title": "d"}, "d"),
        ({"filepath": "", "title": "d"}, "d"),
        ({"metadata": '{"name": ""}', "title": "d"}, "d"),
        ({"metadata": "not JSON", "old_metadata": '{"name": "c"}'}, "c"),
        ({"metadata": "[" * 5000, "title": "d"}, "d"),
        ({"metadata": "[]", "title": "d"}, "d"),
        ({"metadata": '{"name": "' + "c" * 70_000 + '"}', "title": "d"}, "d"),
        ({"filepath": "./sub/dir/a"}, "sub/dir/a"),
    ],
)
def test_the_name_comes_from_the_first_source_that_has_one(annotations: dict[str, Any], path: str) -> None:
    assert [file.path for file in files_of(model(layer(**annotations)))] == [path]


@pytest.mark.parametrize(
    ("media_type", "category"),
    [
        (_RAW, "weight"),
        ("application/vnd.cnai.model.weight.v1.raw", "weight"),
        ("application/vnd.cncf.model.weight.config.v1.raw", "weight.config"),
        ("application/vnd.cncf.model.doc.v1.raw", "doc"),
        ("application/vnd.cncf.model.code.v1.raw", "code"),
        ("application/vnd.cncf.model.dataset.v1.raw", "dataset"),
        ("application/vnd.cncf.model.weight.v1.gguf", "weight"),
        ("application/vnd.cncf.model.weight.v1.safetensors", "weight"),
        ("application/vnd.cncf.model.novelty.v1.raw", "other"),
    ],
)
def test_categories_and_unknown_packings_are_raw(media_type: str, category: str) -> None:
    assert [file.category for file in files_of(model(layer(media_type, filepath="f")))] == [category]


@pytest.mark.parametrize(
    "media_type",
    [
        "application/vnd.cncf.model.weight.v1.tar",
        "application/vnd.cncf.model.weight.config.v1.tar+gzip",
        "application/vnd.cnai.model.doc.v1.tar+zstd",
        "application/vnd.cncf.model.layer.v1.tar+gzip",
        "application/vnd.cncf.model.weight.v1.TAR",
    ],
)
def test_tar_packings_are_refused_with_layer_type_and_next_step(media_type: str) -> None:
    message = refusal(model(layer(filepath="a"), layer(media_type, filepath="b")))
    assert message.startswith(f"layers[1]: media type {media_type} packs files into a tar archive")
    assert "modelmount push" in message


def test_metadata_gives_time_and_executable_bit() -> None:
    def read(**metadata: Any) -> tuple[int, bool]:
        (file,) = files_of(model(layer(filepath="f", metadata=json.dumps(metadata))))
        return file.mtime_s, file.executable

    assert read(mtime="2025-01-01T00:00:00Z", mode=0o755) == (1735689600, True)
    assert read(mtime="2025-01-01T00:00:00.123456789+00:00", mode=0o644) == (1735689600, False)
    assert read(mtime="2025-01-01T02:00:00+02:00") == (1735689600, False)
    assert read(mtime="2025-01-01T00:00:00") == (1735689600, False)  # no zone: UTC, not this machine's
    for odd in ("yesterday", "1969-12-31T23:59:59Z", 7, None, "9" * 100, "0001-01-01T00:00:00Z"):
        assert read(mtime=odd) == (0, False)
    for odd_mode in ("493", -1, True, 1.5, None, 2**70 + 0o111):
        assert read(mode=odd_mode) == (0, False)


def test_layers_under_the_reserved_directory_are_not_files() -> None:
    index = layer("application/vnd.cncf.model.doc.v1.raw", b"index", filepath=".modelmount/index.v1.pb")
    assert [file.path for file in files_of(model(layer(filepath="f"), index))] == ["f"]
    assert "has no files" in refusal(model(index))


def test_one_file_named_twice_is_one_and_two_of_one_name_are_refused() -> None:
    twice = model(layer(content=b"1", filepath="a"), layer(content=b"1", filepath="./a"))
    assert [file.path for file in files_of(twice)] == ["a"]
    message = refusal(model(layer(content=b"1", filepath="a"), layer(content=b"2", filepath="a")))
    assert "layers[1]: 'a' is named twice, with different contents" in message


@pytest.mark.parametrize("paths", [("a", "a/b"), ("a/b/c", "a"), ("a/b", "x", "a/b/c/d")])
def test_a_name_cannot_be_file_and_directory(paths: tuple[str, ...]) -> None:
    message = refusal(model(*(layer(content=path.encode(), filepath=path) for path in paths)))
    assert "is a file and also the directory of" in message


def test_names_that_only_look_alike_do_not_conflict() -> None:
    paths = ("a", "ab/c", "a.d/e", "A/b")
    assert len(files_of(model(*(layer(content=path.encode(), filepath=path) for path in paths)))) == 4


@pytest.mark.parametrize("path", ["../x", "/x", "a/../b", "a\\b", "a\nb"])
def test_unsafe_names_are_refused_by_layer(path: str) -> None:
    assert refusal(model(layer(filepath="ok"), layer(filepath=path))).startswith("layers[1]: file name ")


def test_unnamed_and_foreign_layers_are_refused() -> None:
    assert "layers[0]: the layer has no file name" in refusal(model(layer()))
    foreign = model(layer("text/plain", title="x"), artifact_type="application/vnd.cncf.model.manifest.v1+json")
    assert "layers[0]: media type text/plain is not a ModelPack layer" in refusal(foreign)


def test_ten_thousand_deep_names_are_quick() -> None:
    layers = [layer(content=b"x", filepath="/".join(["d"] * 63) + f"/{n}") for n in range(10_000)]
    started = time.monotonic()
    assert len(files_of(model(*layers))) == 10_000
    assert time.monotonic() - started < 10


_texts = st.text(max_size=12)


@given(
    st.lists(
        st.builds(
            Descriptor,
            st.sampled_from([_RAW, "application/vnd.cnai.model.doc.v1.x", "application/vnd.cncf.model.", "a/b"]),
            st.sampled_from([Digest.of(b"1"), Digest.of(b"2")]),
            st.integers(0, 100),
            st.dictionaries(
                st.sampled_from(
                    [
                        "org.cncf.model.filepath",
                        "org.cncf.model.file.metadata+json",
                        "org.opencontainers.image.title",
                    ]
                ),
                st.sampled_from(["a", "a/b", "b"])
                | _texts
                | st.builds('{{"name": "{}", "mtime": "{}"}}'.format, _texts, _texts),
            ),
        ),
        max_size=4,
    )
)
def test_any_layers_give_files_or_our_error(layers: list[Descriptor]) -> None:
    try:
        files = files_of(model(*layers))
    except UnsupportedModelError:
        return
    paths = [file.path for file in files]
    assert len(set(paths)) == len(paths) > 0
