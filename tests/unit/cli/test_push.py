"""`modelmount push`, as a user calls it."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from registry_process import PASSWORD, USERNAME, RegistryProcess

from csi.cli import push
from csi.cli.main import main
from csi.cli.push import find_files
from csi.cli.sizes import size_text
from csi.errors import UnsupportedModelError
from csi.integrity import index
from csi.oci.digest import Digest
from csi.oci.manifest import parse_manifest
from csi.oci.modelpack import index_layer_of, pack


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small model directory with the usual clutter."""
    root = tmp_path / "model"
    contents = {
        "config.json": b"{}",
        "tokenizer/vocab.txt": b"a\nb\n",
        "model-00001-of-00002.safetensors": os.urandom(1_500_000),
        "model-00002-of-00002.safetensors": os.urandom(10),
        ".gitattributes": b"*",
        ".cache/huggingface/x": b"y",
    }
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


_PATHS = [
    "config.json",
    "tokenizer/vocab.txt",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
]


class Outcome:
    """What one call left behind."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def json(self) -> dict[str, Any]:
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found


class Call:
    """`modelmount push` in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object) -> Outcome:
        self._capsys.readouterr()
        try:
            status = main(["push", *map(str, arguments)])
        except SystemExit as exit_:
            status = int(str(exit_.code))
        out, err = self._capsys.readouterr()
        assert "Traceback" not in err
        return Outcome(status, out, err)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    return Call(capsys)


def test_push_to_a_layout_prints_the_pinned_reference_last(call: Call, model: Path, tmp_path: Path) -> None:
    done = call(model, f"oci-layout:{tmp_path}/l:v1")
    assert done.status == 0
    assert done.out.startswith(f"oci-layout:{tmp_path}/l@sha256:")
    assert done.out.count("\n") == 1
    lines = done.err.splitlines()
    assert lines[0] == "left out as hidden: .cache/, .gitattributes"
    assert [line.split()[0] for line in lines[1:]] == ["uploaded"] * 4
    assert [line.split()[-1] for line in lines[1:]] == _PATHS
    again = call(model, f"oci-layout:{tmp_path}/l:v1")
    assert again.out == done.out
    assert [line.split()[0] for line in again.err.splitlines()[1:]] == ["exists"] * 4


def test_json_output_is_one_stable_object(call: Call, model: Path, tmp_path: Path) -> None:
    done = call(model, f"oci-layout:{tmp_path}/l", "--output", "json")
    assert done.status == 0
    assert done.out.count("\n") == 1
    value = done.json
    assert sorted(value) == ["digest", "files", "manifest_size_bytes", "pushed_bytes", "reference"]
    assert value["reference"] == f"oci-layout:{tmp_path}/l@{value['digest']}"
    assert value["pushed_bytes"] == 1_500_000 + 10 + 4 + 2
    manifest = (tmp_path / "l/blobs/sha256" / value["digest"].removeprefix("sha256:")).read_bytes()
    assert value["manifest_size_bytes"] == len(manifest)
    assert [file["path"] for file in value["files"]] == _PATHS
    assert {tuple(sorted(file)) for file in value["files"]} == {("digest", "media_type", "path", "size_bytes", "state")}
    assert value["files"][1]["media_type"] == "application/vnd.cncf.model.weight.config.v1.raw"
    again = call(model, f"oci-layout:{tmp_path}/l", "--output", "json").json
    assert again == {
        **value,
        "pushed_bytes": 0,
        "files": [{**file, "state": "exists"} for file in value["files"]],
    }


def test_a_pushed_model_carries_a_block_index_of_every_file(call: Call, model: Path, tmp_path: Path) -> None:
    digest = call(model, f"oci-layout:{tmp_path}/l", "--output", "json").json["digest"]
    blobs = tmp_path / "l/blobs/sha256"
    manifest = parse_manifest((blobs / digest.removeprefix("sha256:")).read_bytes())
    layer = index_layer_of(manifest)
    assert layer is not None
    found = index.load((blobs / layer.digest.hex).read_bytes(), index.file_layers(manifest.layers, layer), "index")
    for path in _PATHS:
        content = (model / path).read_bytes()
        assert found[Digest.of(content)].is_right(0, content)


def test_no_tag_is_latest_and_times_and_modes_do_not_matter(call: Call, model: Path, tmp_path: Path) -> None:
    first = call(model, f"oci-layout:{tmp_path}/l", "--output", "json").json
    (entry,) = json.loads((tmp_path / "l/index.json").read_text())["manifests"]
    assert entry["annotations"] == {"org.opencontainers.image.ref.name": "latest"}
    os.utime(model / "config.json", (1, 1))
    (model / "config.json").chmod(0o755)
    assert call(model, f"oci-layout:{tmp_path}/l", "--output", "json").json["digest"] == first["digest"]


def test_a_single_file_is_a_model(call: Call, model: Path, tmp_path: Path) -> None:
    value = call(model / "config.json", f"oci-layout:{tmp_path}/l", "--output", "json").json
    assert [file["path"] for file in value["files"]] == ["config.json"]


def test_description_and_annotations_are_in_the_artifact(call: Call, model: Path, tmp_path: Path) -> None:
    flags = ["--name", "m", "--model-version", "1", "--annotation", "a=b=c", "--annotation", "d="]
    digest = call(model, f"oci-layout:{tmp_path}/l", "--output", "json", *flags).json["digest"]
    manifest = json.loads((tmp_path / "l/blobs/sha256" / digest.removeprefix("sha256:")).read_bytes())
    assert manifest["annotations"] == {"a": "b=c", "d": ""}
    config = (tmp_path / "l/blobs/sha256" / manifest["config"]["digest"].removeprefix("sha256:")).read_bytes()
    assert json.loads(config)["descriptor"] == {"name": "m", "version": "1"}


def test_a_dry_run_tells_the_digest_and_sends_nothing(call: Call, model: Path, tmp_path: Path) -> None:
    dry = call(model, f"oci-layout:{tmp_path}/l", "--dry-run", "--output", "json")
    assert dry.status == 0
    assert "dry run: nothing was sent" in dry.err
    assert not (tmp_path / "l").exists()
    assert {file["state"] for file in dry.json["files"]} == {"planned"}
    assert dry.json["pushed_bytes"] == 0
    assert call(model, f"oci-layout:{tmp_path}/l", "--output", "json").json["digest"] == dry.json["digest"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["r.io/m@sha256:" + "0" * 64], "has a digest, but the digest is the outcome of a push"),
        (["m"], "does not begin with a registry host"),
        (["oci-layout:relative"], "absolute directory"),
        (["r.io/m", "--annotation", "x"], "expected KEY=VALUE"),
        (["r.io/m", "--annotation", "=x"], "expected KEY=VALUE"),
        (["r.io/m", "--annotation", "a=1", "--annotation", "a=2"], "every KEY once"),
        (["r.io/m", "--password-stdin"], "--password-stdin needs --username"),
        (["oci-layout:/tmp/x", "--username", "u", "--password-stdin"], "a directory needs no credentials"),
        (["r.io/m", "--output", "yaml"], "invalid choice"),
        (["r.io/m", "--dry-run", "--name", "\udcff"], "not UTF-8"),
        ([], "required"),
    ],
)
def test_wrong_usage_is_status_2_and_says_why(call: Call, model: Path, arguments: list[str], problem: str) -> None:
    done = call(model, *arguments)
    assert (done.status, done.out) == (2, "")
    assert problem in done.err
    assert "modelmount push: " in done.err


@pytest.mark.parametrize(("given", "problem"), [("", "password is empty"), ("\n", "password is empty")])
def test_an_empty_password_is_wrong_usage(
    call: Call, model: Path, monkeypatch: pytest.MonkeyPatch, given: str, problem: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(given))
    done = call(model, "r.io/m", "--username", "u", "--password-stdin")
    assert done.status == 2
    assert problem in done.err


def test_a_password_is_never_waited_for_without_a_terminal(
    call: Call, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("secret\n"))
    done = call(model, "r.io/m", "--username", "u")
    assert done.status == 2
    assert "needs --password-stdin" in done.err


def test_what_failed_is_status_1_and_one_line(call: Call, model: Path, tmp_path: Path) -> None:
    done = call(tmp_path / "gone", f"oci-layout:{tmp_path}/l")
    assert (done.status, done.out) == (1, "")
    assert done.err == f"modelmount push: {tmp_path}/gone: no such file or directory\n"
    done = call(model, "registry.invalid/m:v1")
    assert done.status == 1
    assert done.err.splitlines()[-1].startswith("modelmount push: registry registry.invalid: HEAD https://")


def test_a_file_that_changes_while_it_is_pushed_is_noticed(
    call: Call, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changing = model / "model-00002-of-00002.safetensors"

    def pack_and_change(*arguments: Any) -> Any:
        changing.write_bytes(b"0123456789")
        return pack(*arguments)

    monkeypatch.setattr("csi.cli.push.pack", pack_and_change)
    done = call(model, f"oci-layout:{tmp_path}/l")
    assert (done.status, done.out) == (1, "")
    assert f"{changing}: changed while it was pushed" in done.err
    assert not (tmp_path / "l/index.json").exists()


# --- which files ------------------------------------------------------------------------------------------------------


def test_files_come_in_path_order_without_hidden_ones(model: Path) -> None:
    found, hidden = find_files(str(model))
    assert [file.path for file in found] == sorted(_PATHS)
    assert {file.path: file.disk_path for file in found}["tokenizer/vocab.txt"] == f"{model}/tokenizer/vocab.txt"
    assert hidden == [".cache/", ".gitattributes"]


def test_links_inside_the_directory_are_files(model: Path) -> None:
    (model / "again.json").symlink_to("config.json")
    (model / "tokenizer" / "up.json").symlink_to("../config.json")
    found, _ = find_files(str(model))
    assert {"again.json", "tokenizer/up.json"} <= {file.path for file in found}


def test_a_link_to_the_directory_itself_may_be_named(model: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(model)
    found, _ = find_files(str(tmp_path / "link"))
    assert [file.path for file in found] == sorted(_PATHS)


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("/etc/hostname", "is a link out of"),
        ("../outside", "is a link out of"),
        ("../model-but-longer/x", "is a link out of"),
        ("nothing", "is a link to nothing"),
        ("tokenizer", "is a link to a directory"),
        ("loop", "is a link to nothing"),
    ],
)
def test_links_that_lead_elsewhere_are_refused(model: Path, target: str, problem: str) -> None:
    (model.parent / "outside").write_text("secret")
    (model.parent / "model-but-longer").mkdir()
    (model.parent / "model-but-longer" / "x").write_text("secret")
    (model / "loop").symlink_to(target)
    with pytest.raises(UnsupportedModelError, match=problem):
        find_files(str(model))


def test_a_directory_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"has no files to push$"):
        find_files(str(tmp_path))
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").write_text("x")
    with pytest.raises(UnsupportedModelError, match="only hidden ones"):
        find_files(str(tmp_path))


def test_what_is_no_regular_file_is_refused(model: Path) -> None:
    os.mkfifo(model / "pipe")
    with pytest.raises(UnsupportedModelError, match="pipe: is not a regular file"):
        find_files(str(model))


def test_names_that_could_not_be_mounted_are_refused_before_anything_is_hashed(model: Path) -> None:
    (model / "a\\b").write_text("x")
    with pytest.raises(UnsupportedModelError, match="has a backslash"):
        find_files(str(model))
    (model / "a\\b").unlink()
    with open(os.fsencode(model) + b"/\xff", "w"):
        pass
    with pytest.raises(UnsupportedModelError, match="is not valid Unicode"):
        find_files(str(model))


def test_files_and_directories_that_cannot_be_read_are_named(model: Path, tmp_path: Path) -> None:
    """In a process without root's right to read everything."""
    command = [sys.executable, "-m", "csi.cli.main", "push", str(model), f"oci-layout:{tmp_path}/l", "--dry-run"]
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("no setpriv (util-linux) to drop root's rights with")
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    for name in ("config.json", "tokenizer"):
        mode = (model / name).stat().st_mode
        (model / name).chmod(0)
        done = subprocess.run(command, capture_output=True, text=True)
        (model / name).chmod(mode)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1] == f"modelmount push: {model / name}: cannot be read: Permission denied"
        assert "Traceback" not in done.stderr


# --- progress ---------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_that_is_removed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(push, "_REDRAW_S", 0.0)
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["push", str(model), f"oci-layout:{tmp_path}/l"]) == 0
    drawn = terminal.getvalue()
    assert "hashing config.json" in drawn
    assert "█" in drawn
    assert "of 1.5 MB" in drawn
    assert drawn.endswith("\r\033[K")
    assert all(len(line) < 60 for line in drawn.replace("\n", "\r\033[K").split("\r\033[K") if "█" in line)
    assert capsys.readouterr().out.startswith("oci-layout:")


@pytest.mark.parametrize(
    ("size_bytes", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (90_868_376, "90.9 MB"),
        (141 * 10**9, "141.0 GB"),
        (8 * 10**15, "8000.0 TB"),
    ],
)
def test_sizes_are_shown_for_people(size_bytes: int, shown: str) -> None:
    assert size_text(size_bytes) == shown


# --- real registries --------------------------------------------------------------------------------------------------


@pytest.mark.registry
def test_push_to_a_real_registry_and_to_a_layout_give_one_digest(
    call: Call, docker_registry: RegistryProcess, model: Path, tmp_path: Path
) -> None:
    target = f"{docker_registry.host}/unit/push"
    first = call(model, f"{target}:v1", "--output", "json")
    assert first.status == 0
    assert first.json["reference"] == f"{target}@{first.json['digest']}"
    assert {file["state"] for file in first.json["files"]} == {"uploaded"}
    second = call(model, f"{target}:v2", "--output", "json").json
    assert second["pushed_bytes"] == 0
    assert {file["state"] for file in second["files"]} == {"exists"}
    layout = call(model, f"oci-layout:{tmp_path}/l", "--output", "json").json
    assert first.json["digest"] == second["digest"] == layout["digest"]


@pytest.mark.registry
def test_push_with_a_password_from_stdin(
    call: Call, private_registry: RegistryProcess, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = f"{private_registry.host}/unit/push:v1"
    anonymous = call(model, target)
    assert anonymous.status == 1
    assert "give --username and --password-stdin" in anonymous.err
    for password, status in (("wrong horse", 1), (PASSWORD, 0)):
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"{password}\n"))
        done = call(model, target, "--username", USERNAME, "--password-stdin")
        assert done.status == status
        assert password not in done.out + done.err
