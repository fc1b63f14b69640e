"""Models as the programs push them that people push models with: each is run for real, against a real registry, and what it
pushed is mounted and compared byte for byte with its source.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from formats.artifacts import Contents, body, tar
from formats.mounted import mounted
from registry_process import RegistryProcess
from support.node_process import NodeProcess

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / ".tools"

pytestmark = [pytest.mark.fuse, pytest.mark.registry, pytest.mark.timeout(600)]

FILES = {
    "config.json": body("config.json", 700),
    "model-00001-of-00002.safetensors": body("one", 70_000),
    "model-00002-of-00002.safetensors": body("two", 50_001),
    "onnx/deep/model.onnx": body("onnx", 9_999),
    "tokenizer/vocab.json": body("vocab", 1),
}


@pytest.fixture(scope="session")
def python_tools() -> Path:
    """The virtual environment with oras-py, oci-modelcar, olot and omlmd."""
    install(needs_go=False)
    return TOOLS / "producers" / "bin"


@pytest.fixture(scope="session")
def go_tools() -> Path:
    """The directory with oras and crane."""
    install(needs_go=True)
    return TOOLS


def install(*, needs_go: bool) -> None:
    done = subprocess.run([Path(__file__).parent / "install-producers", TOOLS], capture_output=True, text=True)
    if done.returncode and (needs_go or done.returncode != 3):
        pytest.skip(f"the producers do not install here: {done.stderr.strip()[-300:]}")


Show = Callable[..., Contents]


@pytest.fixture
def show(docker_registry: RegistryProcess, modelmount_node: NodeProcess) -> Show:
    """What a volume of a repository's `latest` shows, given its attributes."""

    def shown(repository: str, **attributes: str) -> Contents:
        target = modelmount_node.target()
        reference = f"{docker_registry.host}/{repository}:latest"
        modelmount_node.publish(reference, target, f"vol-{target.parent.name}", attributes=attributes)
        return mounted(target)

    return shown


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory of model files."""
    directory = tmp_path / "model"
    for path, content in FILES.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(content)
    return directory


def run(*command: str | Path, cwd: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "HOME": str(cwd), "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])


def with_directories(contents: dict[str, bytes]) -> Contents:
    shown: dict[str, bytes | str | None] = dict(contents)
    for path in contents:
        for parent in list(Path(path).parents)[:-1]:
            shown[str(parent)] = None
    return shown


def below(directory: str, contents: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{directory}/{path}": content for path, content in contents.items()}


def test_oras_files_and_directories(go_tools: Path, docker_registry: RegistryProcess, show: Show, model: Path) -> None:
    names = [name for name in sorted(os.listdir(model)) if name != "onnx"]
    (model / "tokenizer" / "link.json").symlink_to("vocab.json")
    run(
        go_tools / "oras",
        "push",
        "--plain-http",
        f"{docker_registry.host}/oras/model:latest",
        *names,
        "onnx/deep/model.onnx:application/octet-stream",
        cwd=model,
    )
    shown = with_directories(FILES)
    assert show("oras/model") == {**shown, "tokenizer/link.json": "vocab.json"}


def test_oras_a_whole_directory(go_tools: Path, docker_registry: RegistryProcess, show: Show, model: Path) -> None:
    for name, directory, expected in [
        ("dot", ".", FILES),
        ("named", "onnx", {"onnx/deep/model.onnx": FILES["onnx/deep/model.onnx"]}),
    ]:
        run(
            go_tools / "oras",
            "push",
            "--plain-http",
            f"{docker_registry.host}/oras/{name}:latest",
            directory,
            cwd=model,
        )
        assert show(f"oras/{name}") == with_directories(expected)


def test_oras_as_modelpack(go_tools: Path, docker_registry: RegistryProcess, show: Show, model: Path) -> None:
    run(
        go_tools / "oras",
        "push",
        "--plain-http",
        *("--artifact-type", "application/vnd.cncf.model.manifest.v1+json"),
        f"{docker_registry.host}/oras/modelpack:latest",
        "config.json:application/vnd.cncf.model.weight.config.v1.raw",
        "model-00001-of-00002.safetensors:application/vnd.cncf.model.weight.v1.raw",
        cwd=model,
    )
    shown = show("oras/modelpack")
    assert shown == {name: FILES[name] for name in ("config.json", "model-00001-of-00002.safetensors")}


def test_crane_an_image_with_a_base(
    go_tools: Path, docker_registry: RegistryProcess, show: Show, tmp_path: Path
) -> None:
    base, model = {"etc": None, "etc/hosts": body("hosts")}, below("models", FILES)
    for name, contents in (("base", base), ("model", model), ("whiteout", {"etc/.wh.hosts": b""})):
        (tmp_path / f"{name}.tar").write_bytes(tar(contents))
    image = f"{docker_registry.host}/crane/car"
    run(go_tools / "crane", "append", "-f", "base.tar", "-t", f"{image}:base", "--oci-empty-base", cwd=tmp_path)
    layers = ["-f", "model.tar", "-f", "whiteout.tar"]
    run(go_tools / "crane", "append", "-b", f"{image}:base", *layers, "-t", f"{image}:latest", cwd=tmp_path)
    assert show("crane/car") == {**with_directories(model), "etc": None}
    assert show("crane/car", subPath="models") == with_directories(FILES)


def test_oras_py_files_and_directories(
    python_tools: Path, docker_registry: RegistryProcess, show: Show, model: Path
) -> None:
    code = (
        "import sys, oras.client\n"
        "client = oras.client.OrasClient(insecure=True)\n"
        "client.push(target=sys.argv[1], files=sys.argv[2:], disable_path_validation=True)\n"
    )
    target = f"{docker_registry.host}/oras-py/model:latest"
    run(python_tools / "python", "-c", code, target, *sorted(os.listdir(model)), cwd=model)
    assert show("oras-py/model") == with_directories(FILES)


def test_omlmd(python_tools: Path, docker_registry: RegistryProcess, show: Show, model: Path) -> None:
    target = f"{docker_registry.host}/omlmd/model:latest"
    (model / "card.json").write_text(json.dumps({"name": "model", "author": "somebody"}))
    name = "model-00001-of-00002.safetensors"
    run(python_tools / "omlmd", "push", target, name, "--metadata", "card.json", "--plain-http", cwd=model)
    shown = show("omlmd/model")
    assert shown[name] == FILES[name]
    assert set(shown) == {name, "model_metadata.omlmd.json", "model_metadata.omlmd.yaml"}


def test_olot_adds_a_model_to_an_image(
    go_tools: Path, python_tools: Path, docker_registry: RegistryProcess, show: Show, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "base.tar").write_bytes(tar({"bin/sh": body("sh")}))
    image = f"{docker_registry.host}/olot/base:latest"
    run(go_tools / "crane", "append", "-f", "base.tar", "-t", image, "--oci-empty-base", cwd=tmp_path)
    run(go_tools / "crane", "pull", "--format", "oci", image, "layout", cwd=tmp_path)
    paths = [str(model / path) for path in FILES]
    run(python_tools / "olot", "--root-dir", model, "layout", *paths, cwd=tmp_path)
    run(go_tools / "crane", "push", "--index", "layout", f"{docker_registry.host}/olot/car:latest", cwd=tmp_path)
    assert show("olot/car", subPath="models") == with_directories(FILES)
    assert show("olot/car", files="bin/*") == {"bin": None, "bin/sh": body("sh")}


def test_oci_modelcar(python_tools: Path, docker_registry: RegistryProcess, show: Show, tmp_path: Path) -> None:
    with hugging_face(FILES) as endpoint:
        run(
            python_tools / "oci-modelcar",
            "push",
            *(
                "--registry",
                docker_registry.host,
                "--target-repo",
                "modelcar/model",
                "--target-tag",
                "latest",
                "--allow-patterns",
                "*",
            ),
            *("--hf-repo", "org/model", "--hf-endpoint", endpoint, "--spool-dir", tmp_path / "spool"),
            cwd=tmp_path,
        )
    assert show("modelcar/model", subPath="models") == with_directories(FILES)


@contextmanager
def hugging_face(files: dict[str, bytes]) -> Iterator[str]:
    """As much of the Hub's interface as oci-modelcar uses to list and to download."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            _, found, name = path.partition("/resolve/")
            if found:
                self.answer(files[name.partition("/")[2]], "application/octet-stream")
            elif "/tree/" in path:
                entries = [
                    {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                    for name, content in files.items()
                ]
                self.answer(json.dumps(entries).encode(), "application/json")
            else:
                self.answer(json.dumps({"id": "org/model", "sha": "0" * 40}).encode(), "application/json")

        def answer(self, content: bytes, media_type: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", media_type)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
