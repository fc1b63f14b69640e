"""ModelPack: what each layer is, in every spelling producers have used."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi.errors import UnsupportedModelError
from csi.oci.descriptor import Descriptor
from csi.oci.digest import Digest
from csi.oci.formats import modelpack
from csi.oci.formats.detect import needs_config, plan_of
from csi.oci.formats.plan import LayerPlan, ModelFormat, Packing
from csi.oci.manifest import OCI_MANIFEST, Manifest

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


def files_of(manifest: Manifest) -> tuple[LayerPlan, ...]:
    plan = plan_of(manifest)
    assert (plan.format, plan.is_overlay, plan.parent) == (ModelFormat.MODELPACK, False, None)
    return plan.layers


def refusal(manifest: Manifest) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        plan_of(manifest)
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
    assert modelpack.matches(manifest)
    assert not needs_config(manifest)


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
        ("application/vnd.cncf.model.novelty.v1.raw", ""),
    ],
)
def test_categories_and_unknown_packings_are_raw(media_type: str, category: str) -> None:
    assert [file.category for file in files_of(model(layer(media_type, filepath="f")))] == [category]


@pytest.mark.parametrize("prefix", ["application/vnd.cncf.model", "application/vnd.cnai.model"])
@pytest.mark.parametrize("category", ["weight", "weight.config", "doc", "code", "dataset"])
@pytest.mark.parametrize("packing", list(Packing))
def test_all_twenty_types_of_both_spellings(prefix: str, category: str, packing: Packing) -> None:
    (planned,) = files_of(model(layer(f"{prefix}.{category}.v1.{packing}", filepath="f")))
    assert (planned.packing, planned.category) == (packing, category)
    assert planned.path == ("f" if packing is Packing.RAW else ""), "archives are named by their headers only"


@pytest.mark.parametrize(
    ("media_type", "packing"),
    [
        ("application/vnd.cncf.model.layer.v1.tar+gzip", Packing.TAR_GZIP),
        ("application/vnd.cncf.model.layer.v1.tar", Packing.TAR),
        ("application/vnd.cncf.model.weight.v1.TAR", Packing.TAR),
    ],
)
def test_layer_types_of_single_producers(media_type: str, packing: Packing) -> None:
    assert [planned.packing for planned in files_of(model(layer(media_type)))] == [packing]


@pytest.mark.parametrize("suffix", ["tar+bzip2", "tar+lz4", "tar.xz", "raw+gzip"])
def test_an_unknown_compression_is_refused_by_name(suffix: str) -> None:
    media_type = f"application/vnd.cncf.model.weight.v1.{suffix}"
    message = refusal(model(layer(filepath="a"), layer(media_type, filepath="b")))
    assert message.startswith(f"layers[1]: media type {media_type} is compressed in a way that is not mounted")


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


@pytest.mark.parametrize("path", ["../x", "/x", "a/../b", "a\\b", "a\nb"])
def test_unsafe_names_are_refused_by_layer(path: str) -> None:
    assert refusal(model(layer(filepath="ok"), layer(filepath=path))).startswith("layers[1]: file name ")


def test_a_layer_without_a_name_is_refused() -> None:
    assert "layers[0]: the layer (application/vnd.cncf.model.weight.v1.raw) has no file name" in refusal(model(layer()))


def test_a_foreign_layer_is_a_file_where_it_has_a_name_and_left_out_where_not() -> None:
    plan = plan_of(model(layer("text/plain", title="x.tar"), layer("application/spdx+json"), layer(filepath="a")))
    assert [(planned.path, planned.packing) for planned in plan.layers] == [("x.tar", Packing.RAW), ("a", Packing.RAW)]
    assert plan.warnings == (
        "layers[1]: left out; media type application/spdx+json is no ModelPack layer, and it has no name",
    )


def test_a_title_that_says_something_else_is_warned_of() -> None:
    plan = plan_of(model(layer(filepath="sub/a", title="a")))
    assert [planned.path for planned in plan.layers] == ["sub/a"]
    assert "'sub/a' here, and 'a' by programs" in plan.warnings[0]


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
        files = plan_of(model(*layers)).layers
    except UnsupportedModelError:
        return
    assert files
    assert all(file.path for file in files)
