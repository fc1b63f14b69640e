"""Runs csi-sanity against the real driver, real mounts and a real registry: `python tests/csi/sanity.py PATH-TO-CSI-SANITY`.

Twice: node and controller as one process, and as two. Nothing is skipped by name: what csi-sanity skips itself is
what the driver says it does not offer.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "deploy" / "demo"))

from registry_process import RegistryProcess, find_or_install_registry
from support.controller_process import ControllerProcess
from support.node_process import COMMAND, NodeProcess

TOOLS = Path(__file__).resolve().parents[2] / ".tools"


def main() -> int:
    """The first exit status of csi-sanity that is not 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("binary", type=Path)
    binary = parser.parse_args().binary.absolute()
    with tempfile.TemporaryDirectory(prefix="sanity-") as name:
        scratch = Path(name)
        registry = RegistryProcess(find_or_install_registry(TOOLS), scratch / "registry")
        registry.start()
        try:
            parameters = scratch / "parameters.yaml"
            parameters.write_text(f"reference: {push_model(registry, scratch)}\n", encoding="utf-8")
            return together(binary, scratch, parameters) or apart(binary, scratch, parameters)
        finally:
            registry.stop()


def push_model(registry: RegistryProcess, scratch: Path) -> str:
    """The tag of a small model."""
    source = scratch / "model"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "sanity"}', encoding="utf-8")
    (source / "model.safetensors").write_bytes(bytes(100_000))
    reference = f"{registry.host}/sanity/model:v1"
    subprocess.run([*COMMAND, "push", str(source), reference], check=True, stdout=subprocess.DEVNULL)
    return reference


def together(binary: Path, scratch: Path, parameters: Path) -> int:
    """Node and Controller services at one socket."""
    print("node and controller together", flush=True)
    with NodeProcess(scratch / "together", "--with-controller") as node:
        return run(binary, scratch, parameters, f"--csi.endpoint={node.socket_path}")


def apart(binary: Path, scratch: Path, parameters: Path) -> int:
    """A node, and a controller of its own process."""
    print("node and controller apart", flush=True)
    with (
        NodeProcess(scratch / "apart") as node,
        ControllerProcess(scratch / "controller", f"--volume-dir={scratch}/volumes") as controller,
    ):
        endpoints = (f"--csi.endpoint={node.socket_path}", f"--csi.controllerendpoint={controller.socket_path}")
        return run(binary, scratch, parameters, *endpoints)


def run(binary: Path, scratch: Path, parameters: Path, *endpoints: str) -> int:
    """csi-sanity's exit status."""
    return subprocess.run(
        [
            binary,
            *endpoints,
            f"--csi.mountdir={scratch}/target",
            f"--csi.stagingdir={scratch}/staging",
            f"--csi.testvolumeparameters={parameters}",
            "--ginkgo.no-color",
        ]
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
