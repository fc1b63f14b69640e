"""Imports point down (docs/architecture.md). A new arrow is a deliberate line here."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# package → packages of ours it may import. Values at the root of csi/ may be imported by everybody.
ALLOWED: dict[str, set[str]] = {
    "oci": set(),
    "wire": set(),
    "tree": {"oci"},
    "stream": {"oci"},
    "integrity": {"stream", "oci", "wire"},
    "store": {"jail", "cache", "control", "integrity", "stream", "oci"},
    "control": {"oci"},
    "observe": set(),
    "jail": set(),
    "registry": {"stream", "oci"},
    "cache": {"stream", "oci"},
    "fuse": {"tree", "stream", "oci"},
    "keeper": {"fuse", "control", "jail"},
    "fetcher": {"jail", "registry", "cache", "control", "integrity", "tree", "stream", "oci"},
    "worker": {"jail", "fuse", "cache", "control", "tree", "stream", "oci"},
    "keychain": set(),
    "supervisor": {"cache", "control", "fuse", "keychain", "stream", "oci"},
    "kube": set(),
    "driver": {"cache", "control", "observe", "oci", "wire"},
    "cli": {
        "cache", "control", "driver", "fetcher", "fuse", "integrity", "jail", "keeper", "keychain", "kube", "observe",
        "oci", "registry", "store", "stream", "supervisor", "tree", "worker",
    },
}  # fmt: skip

# The values everybody may import, and what they may import themselves.
VALUES: dict[str, set[str]] = {
    "boot": set(),
    "errors": set(),
    "heap": set(),
    "mountinfo": set(),
    "credentials": {"errors"},
    "registry_hosts": {"errors"},
    "volume": {"oci", "errors"},
    "provisioned": set(),
    "redact": set(),
    "quantity": set(),
    "pods": set(),
}

# third-party module → the only packages that may import it
ONLY_IN: dict[str, set[str]] = {
    "grpc": {"driver", "wire"},
    "prometheus_client": {"driver"},
    "google": {"wire", "integrity", "driver"},
    "blake3": {"integrity"},
    "cryptography": {"integrity"},
    "pyfuse3": {"fuse"},
    "trio": {"fuse", "worker"},
    "requests": {"registry"},
    "oras": {"registry"},
    "http": {"registry"},
    "kubernetes": {"kube", "cli"},
    "urllib3": {"registry", "kube"},
    "ssl": {"registry", "jail"},
}

# These run where nothing but the standard library may be trusted to be there, or to be small.
STANDARD_LIBRARY_ONLY = ("keeper", "control", "observe", "jail")


def modules() -> list[Path]:
    return [
        path for path in sorted((ROOT / "csi").rglob("*.py")) if not path.name.endswith(("_pb2.py", "_pb2_grpc.py"))
    ]


def package_of(path: Path) -> str:
    parts = path.relative_to(ROOT / "csi").parts
    return parts[0] if len(parts) > 1 else path.stem


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            base = node.module or ""
            found.update(f"{base}.{alias.name}" if base == "csi" else base for alias in node.names)
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    package = package_of(path)
    if package == "__init__":
        return
    allowed = VALUES[package] if package in VALUES else ALLOWED[package] | set(VALUES) | {package}
    for name in imports_of(path):
        top, _, rest = name.partition(".")
        if top == "csi":
            target = rest.partition(".")[0]
            assert target in allowed or package == "errors", f"{path.name} imports csi.{rest}: {package} → {target}"
        elif top in ONLY_IN:
            assert package in ONLY_IN[top], f"{path.name} imports {top}, which belongs to {ONLY_IN[top]}"


@pytest.mark.parametrize("package", STANDARD_LIBRARY_ONLY)
def test_small_processes_import_the_standard_library_only(package: str) -> None:
    for path in modules():
        if package_of(path) == package:
            foreign = {name.partition(".")[0] for name in imports_of(path)} - set(sys.stdlib_module_names) - {"csi"}
            assert not foreign, f"{path.name} imports {foreign}"


def test_the_keeper_loads_nothing_but_the_standard_library() -> None:
    import subprocess

    code = (
        "import sys; before = set(sys.modules); import csi.cli.main, csi.cli.keeper, csi.keeper.main;"
        "print('\\n'.join(sorted({name.partition('.')[0] for name in set(sys.modules) - before})))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert set(loaded) - set(sys.stdlib_module_names) == {"csi"}
