"""Any manifest and any config give a plan or our error, and every plan keeps its promises."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from csi.errors import ContentError
from csi.oci.descriptor import Descriptor
from csi.oci.digest import Digest
from csi.oci.formats.detect import needs_config, plan_of
from csi.oci.formats.plan import ModelFormat, ModelPlan, Packing
from csi.oci.manifest import OCI_MANIFEST, Manifest
from csi.oci.paths import check_member_path

_PREFIXES = (
    "application/vnd.cncf.model.",
    "application/vnd.cnai.model.weight.v1.",
    "application/vnd.docker.ai.",
    "application/vnd.kitops.modelkit.",
    "application/vnd.kitops.modelkit.model.v1.",
    "application/vnd.ollama.image.",
    "application/vnd.oci.image.layer.v1.",
    "application/vnd.docker.image.rootfs.diff.",
    "application/vnd.cog.weight.",
    "application/",
)
_ENDINGS = (
    "raw",
    "tar",
    "tar+gzip",
    "tar+zstd",
    "tar.gzip",
    "gguf",
    "gguf.v3",
    "model",
    "tensor",
    "config.v1+json",
    "x",
    "",
)
_types = st.builds(str.__add__, st.sampled_from(_PREFIXES), st.sampled_from(_ENDINGS)) | st.sampled_from(
    [
        "application/vnd.oci.image.config.v1+json",
        "application/vnd.docker.container.image.v1+json",
        "application/vnd.docker.ai.model.config.v0.1+json",
        "application/vnd.kitops.modelkit.config.v1+json",
        "application/vnd.oci.empty.v1+json",
    ]
)
_names = st.sampled_from(["a", "a/b", "./a", "../a", "/a", ".", "a/", ".modelmount/x"]) | st.text(max_size=6)
_layers = st.builds(
    Descriptor,
    _types,
    st.sampled_from([Digest.of(b"1"), Digest.of(b"2"), Digest.of(b"3")]),
    st.integers(0, 2**62),
    st.dictionaries(
        st.sampled_from(
            [
                "org.opencontainers.image.title",
                "org.cncf.model.filepath",
                "org.cnai.model.filepath",
                "org.cncf.model.file.metadata+json",
                "io.deis.oras.content.unpack",
            ]
        ),
        _names | st.sampled_from(["true", '{"name": "n"}', '{"name": 1}', "{"]),
        max_size=3,
    ),
)
_json = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
_entries = st.fixed_dictionaries(
    {},
    optional={"path": _names | st.sampled_from(["r.io/a:1", "a:b", "@"]) | _json, "digest": _json, "remotePath": _json},
)
_configs = st.fixed_dictionaries(
    {},
    optional={
        "model": _entries | _json,
        "code": st.lists(_entries, max_size=2) | _json,
        "datasets": st.lists(_entries, max_size=2) | _json,
        "rootfs": st.fixed_dictionaries({}, optional={"diff_ids": st.lists(st.text(max_size=3)) | _json}) | _json,
    },
)


def outcome(manifest: Manifest, config: dict[str, Any]) -> ModelPlan | ContentError:
    try:
        wanted = json.dumps(config).encode() if needs_config(manifest) else None
        return plan_of(manifest, wanted)
    except ContentError as exc:
        return exc


@given(_types, st.lists(_layers, max_size=5), st.just("") | _types, _configs)
def test_any_manifest_gives_a_plan_or_our_error(
    config_type: str, layers: list[Descriptor], artifact_type: str, config: dict[str, Any]
) -> None:
    manifest = Manifest(OCI_MANIFEST, artifact_type, Descriptor(config_type, Digest.of(b"{}"), 2), tuple(layers))
    plan = outcome(manifest, config)
    if isinstance(plan, ContentError):
        assert str(plan).isprintable()
        return
    assert plan.layers or plan.parent
    assert plan.is_overlay == (plan.format is ModelFormat.IMAGE)
    assert {layer.descriptor.digest for layer in plan.layers} <= {layer.digest for layer in layers}
    for layer in plan.layers:
        if layer.packing is Packing.RAW:
            assert check_member_path(layer.path, "layer") == layer.path
        else:
            assert bool(layer.path) == layer.maybe_file
        for directory in (layer.base, layer.member_root):
            assert not directory or check_member_path(directory, "layer") == directory
    assert all(warning.isprintable() for warning in plan.warnings)
