"""`modelmount inspect` and `modelmount ls`, on artifacts of every format, in layouts and in a real registry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from formats import artifacts
from formats.artifacts import ARTIFACTS, CNCF, KIT, Artifact, Layer, artifact, body, files, index, raw, tar
from formats.places import push, write_layout
from registry_process import PASSWORD, USERNAME, RegistryProcess

from csi.cli.main import main


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """The JSON of a verb that worked."""
    assert main([*arguments, "--output", "json"]) == 0, capsys.readouterr().err
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"modelmount {arguments[0]}: ")
    return err


@pytest.mark.parametrize("name", ARTIFACTS)
def test_inspect_says_what_it_is(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = ARTIFACTS[name]()
    arguments = ["inspect", write_layout(found, tmp_path)]
    if "variant" in found.attributes:
        arguments += ["--variant", found.attributes["variant"]]
    described = said(capsys, *arguments)
    assert described["reference"] == f"oci-layout:{tmp_path}@{found.digest}"
    model = described["model"]
    expected = {
        "docker_v01": "docker-ai",
        "docker_v01_shards": "docker-ai",
        "docker_v02": "docker-ai",
        "kit": "kitops",
        "old_kit": "kitops",
        "ollama": "ollama",
        "oras_generic": "oras",
        "oras_undecided": "oras",
        "model_car": "image",
        "docker_car": "image",
        "oci_modelcar_like": "image",
        "multi_platform_car": "image",
    }.get(name, "modelpack")
    assert model["format"] == expected
    assert model["total_bytes"] == sum(layer["size_bytes"] for layer in model["layers"])
    modes = {
        ("streamed", "raw"),
        ("streamed", "tar"),
        ("indexed", "tar+gzip"),
        ("indexed or spooled", "tar+zstd"),
    }
    assert {(layer["mode"], layer["packing"]) for layer in model["layers"]} <= modes
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert f"  format    {expected}\n" in text
    assert all(layer["digest"][:19] in text for layer in model["layers"])


@pytest.mark.parametrize("name", ARTIFACTS)
def test_ls_lists_what_would_be_mounted(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = ARTIFACTS[name]()
    names = {"subPath": "--sub-path", "variant": "--variant"}
    flags = [word for key, text in found.attributes.items() for word in (names[key], text)]
    listing = said(capsys, "ls", write_layout(found, tmp_path), *flags)
    assert {entry["path"]: shown(entry) for entry in listing["entries"]} == {
        path: len(content) if isinstance(content, bytes) else content for path, content in found.shows.items()
    }
    assert listing["files"] == sum(isinstance(content, bytes) for content in found.shows.values())
    assert [entry["path"].split("/") for entry in listing["entries"]] == sorted(path.split("/") for path in found.shows)


def shown(entry: dict[str, Any]) -> int | str | None:
    """Size, target or nothing."""
    match entry["type"]:
        case "file":
            return int(entry["size_bytes"])
        case "symlink":
            return str(entry["target"])
        case _:
            return None


def test_ls_looks_like_ls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    described = artifacts.metadata("run.sh", 0).replace("420", str(0o755))
    layers = [
        raw(f"{CNCF}code.v1.raw", "run.sh", **{artifacts.METADATA: described}),
        Layer(f"{CNCF}weight.v1.tar", tar({"d/big": body("d/big", 1_500_000), "d/l": "big"})),
    ]
    assert main(["ls", write_layout(artifact(f"{CNCF}config.v1+json", layers, {}), tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "dr-xr-xr-x         -  -                 d/",
        "-r--r--r--    1.5 MB  -                 d/big",
        "lrwxrwxrwx         -  -                 d/l -> big",
        "-r-xr-xr-x    5.0 kB  2025-03-01 12:00  run.sh",
    ]


def test_ls_shows_a_view(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = write_layout(artifacts.modctl(), tmp_path)
    listing = said(capsys, "ls", reference, "--files", "*.json,src/**")
    assert [entry["path"] for entry in listing["entries"]] == ["config.json", "src", "src/run.py"]
    listing = said(capsys, "ls", reference, "--sub-path", "src")
    assert [entry["path"] for entry in listing["entries"]] == ["run.py"]
    assert "subPath 'nothing' is not a directory" in refused(capsys, "ls", reference, "--sub-path", "nothing")


def test_an_open_choice_is_listed_by_inspect_and_an_error_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = artifacts.quantizations()
    reference = write_layout(found, tmp_path)
    described = said(capsys, "inspect", reference)
    assert described["model"] is None
    assert [entry["annotations"] for entry in described["index"]["variants"]] == [
        {"org.example.quantization": "q4"},
        {"org.example.quantization": "q8"},
    ]
    assert "2 could be meant" in described["index"]["undecided"]
    assert main(["inspect", reference]) == 0
    assert "--variant" in capsys.readouterr().out
    assert "org.example.quantization=q4" in refused(capsys, "ls", reference)
    assert "fits variant 'q5'" in refused(capsys, "inspect", reference, "--variant", "q5")
    single = write_layout(artifacts.modctl(), tmp_path / "single")
    assert "leave out the variant" in refused(capsys, "ls", single, "--variant", "q4")


def test_a_chosen_variant_is_marked_and_attestations_are_called_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    described = said(capsys, "inspect", write_layout(artifacts.multi_platform_car(), tmp_path))
    variants = described["index"]["variants"]
    assert [entry["attachment"] for entry in variants] == [None, None, "an attestation"]
    (chosen,) = [entry for entry in variants if entry["chosen"]]
    assert chosen["digest"] == described["digest"]


def test_what_is_no_model_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    signature = artifact(EMPTY_CONFIG, [raw("application/vnd.dev.cosign.simplesigning.v1+json", "s")], {})
    assert "this reference is a signature" in refused(capsys, "inspect", write_layout(signature, tmp_path / "1"))
    cog = artifact("application/vnd.cog.weight.config.v1+json", [raw(artifacts.TAR, "x")], {})
    assert "Cog weights" in refused(capsys, "inspect", write_layout(cog, tmp_path / "2"))
    helm = artifact("application/vnd.cncf.helm.config.v1+json", [Layer("application/x", b"x")], {})
    assert "not a model" in refused(capsys, "inspect", write_layout(helm, tmp_path / "3"))
    nested = write_layout(endless_index(), tmp_path / "4")
    assert "indexes lie in each other" in refused(capsys, "inspect", nested)


EMPTY_CONFIG = artifacts.EMPTY


def endless_index() -> Artifact:
    """Indexes in indexes, more than anybody needs."""
    found = artifacts.modctl()
    children: list[Artifact] = [found]
    for _ in range(6):
        found = index([(found, {})], 0, artifacts.OCI_INDEX)
        children.append(found)
    return Artifact(found.manifest, found.blobs, {}, {}, children[:-1])


def test_large_compressed_layers_are_read_only_on_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("csi.cli.found_model.READ_LIMIT_BYTES", 100)
    reference = write_layout(artifacts.model_car(), tmp_path)
    message = refused(capsys, "ls", reference)
    assert "layers[0] (tar+gzip," in message
    assert "layers[2] (tar+zstd," in message
    assert "layers[1]" not in message
    assert "--read-all" in message
    assert said(capsys, "ls", reference, "--read-all")["files"] == 4


def test_a_damaged_layer_is_not_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = artifacts.model_car()
    reference = write_layout(found, tmp_path)
    digest = found.manifest["layers"][0]["digest"].partition(":")[2]
    layer = tmp_path / "blobs" / "sha256" / digest
    data = bytearray(layer.read_bytes())
    data[9] ^= 1  # the operating system in gzip's header: still the same archive
    layer.write_bytes(data)
    assert "its bytes have digest" in refused(capsys, "ls", reference)


def test_a_damaged_config_is_not_believed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = artifacts.kit()
    reference = write_layout(found, tmp_path)
    digest = found.manifest["config"]["digest"].partition(":")[2]
    config = tmp_path / "blobs" / "sha256" / digest
    config.write_bytes(config.read_bytes().replace(b"model", b"MODEL"))
    assert "its bytes have digest" in refused(capsys, "inspect", reference)


@pytest.mark.registry
def test_a_registry_is_read_by_ranges_and_with_credentials(
    docker_registry: RegistryProcess,
    private_registry: RegistryProcess,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference = push(artifacts.modctl_before_raw(), docker_registry.host, "inspect/old")
    listing = said(capsys, "ls", reference)
    assert [entry["path"] for entry in listing["entries"]] == ["config.json", "sub", "sub/model.safetensors"]
    assert listing["reference"] == reference
    by_tag = said(capsys, "inspect", f"{docker_registry.host}/inspect/old:latest")
    assert by_tag["reference"] == reference
    missing = refused(capsys, "ls", f"{docker_registry.host}/inspect/old:nothing")
    assert f"{docker_registry.host}/inspect/old" in missing
    anonymous = refused(capsys, "inspect", f"{private_registry.host}/any:1")
    monkeypatch.setattr("sys.stdin", Password())
    logged_in = refused(capsys, "inspect", f"{private_registry.host}/any:1", "--username", USERNAME, "--password-stdin")
    assert "credentials" in anonymous
    assert "credentials" not in logged_in
    assert "not found" in logged_in


class Password:
    """What stdin gives."""

    def readline(self) -> str:
        return PASSWORD + "\n"

    def isatty(self) -> bool:
        return False


@pytest.mark.registry
def test_a_kit_is_completed_by_its_parents(
    docker_registry: RegistryProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    host = docker_registry.host
    root = artifact(
        f"{KIT}config.v1+json",
        [Layer(f"{KIT}model.v1.tar", tar(files("w/model.gguf"))), Layer(f"{KIT}docs.v1.tar", tar(files("root.md")))],
        {},
        config={"model": {"path": "w", "digest": "sha256:0"}},
    )
    push(root, host, "kits/root", "1")
    middle = artifact(
        f"{KIT}config.v1+json",
        [Layer(f"{KIT}modelpart.v1.tar", tar(files("adapter.bin")))],
        {},
        config={"model": {"path": f"{host}/kits/root:1", "parts": [{"path": "adapter.bin", "digest": "sha256:0"}]}},
    )
    middle_reference = push(middle, host, "kits/middle", "1")
    child = artifact(
        f"{KIT}config.v1+json",
        [Layer(f"{KIT}code.v1.tar", tar(files("run.py")))],
        {},
        config={"model": {"path": middle_reference}, "code": [{"path": "run.py", "digest": "sha256:0"}]},
    )
    reference = push(child, host, "kits/child")
    listing = said(capsys, "ls", reference)
    assert [entry["path"] for entry in listing["entries"] if entry["type"] == "file"] == [
        "adapter.bin",
        "run.py",
        "w/model.gguf",
    ]
    described = said(capsys, "inspect", reference)
    assert described["model"]["parents"] == [middle_reference, f"{host}/kits/root:1@{root.digest}"]
    assert [layer["origin"] for layer in described["model"]["layers"]] == [
        f"{host}/kits/root",
        f"{host}/kits/middle",
        None,
    ]

    circle = artifact(f"{KIT}config.v1+json", [], {}, config={"model": {"path": f"{host}/kits/circle:1"}})
    push(circle, host, "kits/circle", "1")
    assert "in a circle" in refused(capsys, "ls", f"{host}/kits/circle:1")
