"""`modelmount mount`, `status` and `umount`: a model without Kubernetes, and nothing left afterwards."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes.registry import FakeRegistry
from registry_process import PASSWORD, USERNAME, RegistryProcess
from support.node_process import COMMAND, mounts_below

pytestmark = pytest.mark.fuse


def run(*arguments: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, input=given, timeout=60)


@pytest.fixture
def places(tmp_path: Path) -> Iterator[list[str]]:
    flags = ["--state-dir", str(tmp_path / "state"), "--data-dir", str(tmp_path / "data")]
    yield flags
    for path in mounts_below(tmp_path):  # of a test that failed
        if "/state/" not in path:
            run("umount", path, *flags)


def nothing_is_left(directory: Path) -> bool:
    marker = f"--state-dir={directory / 'state'}".encode()
    running = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                running += [entry.name] if marker in (entry / "cmdline").read_bytes() else []
            except OSError:
                continue
    return not running and not mounts_below(directory)


def test_two_models_by_hand(fake_registry: FakeRegistry, tmp_path: Path, places: list[str]) -> None:
    for name in ("one", "two"):
        fake_registry.add_model(f"team/{name}", "v1", {"name": name.encode()})
        done = run("mount", f"{fake_registry.host}/team/{name}:v1", str(tmp_path / name), *places)
        assert done.returncode == 0, done.stderr
        assert f"team/{name}@sha256:" in done.stdout
        assert (tmp_path / name / "name").read_bytes() == name.encode()
    shown = json.loads(run("status", *places[:2], "--output", "json").stdout)["mounts"]
    assert len(shown) == 2
    text = run("status", str(tmp_path / "one"), *places[:2]).stdout
    assert "team/one:v1@sha256:" in text
    assert "team/two" not in text
    assert run("umount", str(tmp_path / "one"), *places).returncode == 0
    assert (tmp_path / "two" / "name").read_bytes() == b"two"
    assert not (tmp_path / "one").exists()
    assert run("umount", str(tmp_path / "two"), *places).returncode == 0
    assert nothing_is_left(tmp_path)


def test_a_layout_directory_by_hand(tmp_path: Path, places: list[str]) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    layout = tmp_path / "layout"
    pushed = run("push", str(tmp_path / "source"), f"oci-layout:{layout}:v1")
    assert pushed.returncode == 0, pushed.stderr
    done = run("mount", f"oci-layout:{layout}:v1", str(tmp_path / "mnt"), *places, "--output", "json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["files"] == 1
    assert (tmp_path / "mnt" / "config.json").read_text() == "{}"
    assert run("umount", str(tmp_path / "mnt"), *places).returncode == 0
    assert nothing_is_left(tmp_path)


@pytest.mark.registry
def test_a_password_from_stdin(private_registry: RegistryProcess, tmp_path: Path, places: list[str]) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    reference = f"{private_registry.host}/hand/model:v1"
    login = ["--username", USERNAME, "--password-stdin"]
    assert run("push", str(tmp_path / "source"), reference, *login, given=PASSWORD).returncode == 0
    refused = run("mount", reference, str(tmp_path / "mnt"), *places)
    assert refused.returncode == 1
    assert "credentials" in refused.stderr
    assert nothing_is_left(tmp_path)
    assert run("mount", reference, str(tmp_path / "mnt"), *places, *login, given=PASSWORD).returncode == 0
    assert os.listdir(tmp_path / "mnt") == ["config.json"]
    assert run("umount", str(tmp_path / "mnt"), *places).returncode == 0
    assert nothing_is_left(tmp_path)
    entry = {"auth": base64.b64encode(f"{USERNAME}:{PASSWORD}".encode()).decode()}
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"auths": {private_registry.host: entry}}))
    as_configured = ["--registry-config", str(config)]
    assert run("push", str(tmp_path / "source"), reference, *as_configured).returncode == 0
    assert run("mount", reference, str(tmp_path / "mnt"), *places, *as_configured).returncode == 0
    assert run("umount", str(tmp_path / "mnt"), *places).returncode == 0
    assert nothing_is_left(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["mount", "no-registry", "DIR"], 2, "registry host"),
        (["mount", "127.0.0.1:1/a:b", "DIR"], 1, "cannot connect"),
        (["mount", "oci-layout:/no/such/dir:v1", "DIR"], 1, "OCI image-layout"),
        (["umount", "DIR"], 2, "nothing was mounted there"),
        (["status"], 1, "is 'modelmount supervisor' running"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    tmp_path: Path, places: list[str], arguments: list[str], status: int, words: str
) -> None:
    directory = tmp_path / "mnt"
    given = [str(directory) if argument == "DIR" else argument for argument in arguments]
    done = run(*given, *(places[:2] if arguments[0] == "status" else places))
    assert (done.returncode, done.stdout) == (status, "")
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not directory.exists()
    assert nothing_is_left(tmp_path)


def test_help_names_every_verb() -> None:
    done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, check=True)
    for verb in ("push", "mount", "umount", "status", "node", "keeper", "supervisor"):
        assert verb in done.stdout
        assert run(verb, "--help").returncode == 0
    assert subprocess.run([*COMMAND, "fly"], capture_output=True).returncode == 2
