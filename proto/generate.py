"""Generates csi/wire/ from proto/csi/wire/*.proto: `python proto/generate.py`, or `--check` that nothing is stale.

The .proto files lie under the path of the package they become (`csi/wire/`), so the generated imports are right as
they are.
"""

from __future__ import annotations

import argparse
import filecmp
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTO_DIR = ROOT / "proto"
PACKAGE_DIR = ROOT / "csi" / "wire"


def generate(output: Path) -> set[str]:
    """Write the stubs of every proto below `output`/csi/wire; returns their file names."""
    protos = sorted(PROTO_DIR.glob("csi/wire/*.proto"))
    arguments = [
        "protoc",
        f"-I{PROTO_DIR}",
        f"-I{files('grpc_tools') / '_proto'}",
        f"--python_out={output}",
        f"--pyi_out={output}",
        f"--grpc_python_out={output}",
        *map(str, protos),
    ]
    if protoc.main(arguments) != 0:
        raise SystemExit("protoc failed; its message is above")
    made = set()
    for proto in protos:
        names = [f"{proto.stem}_pb2.py", f"{proto.stem}_pb2.pyi"]
        grpc_stub = output / "csi" / "wire" / f"{proto.stem}_pb2_grpc.py"
        if "\nservice " in proto.read_text(encoding="utf-8"):
            names.append(grpc_stub.name)
        else:
            grpc_stub.unlink(missing_ok=True)
        made.update(names)
    return made


def stale_files() -> list[str]:
    """One line for each stub in csi/wire that is missing, stale (not what protoc makes today) or left over."""
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        made = generate(Path(scratch))
        for name in made:
            if not (PACKAGE_DIR / name).exists():
                found.append(f"csi/wire/{name} is missing")
            elif not filecmp.cmp(Path(scratch) / "csi" / "wire" / name, PACKAGE_DIR / name, shallow=False):
                found.append(f"csi/wire/{name} is stale")
    left_over = [path.name for path in PACKAGE_DIR.glob("*_pb2*") if path.name not in made]
    return sorted(found + [f"csi/wire/{name} is left over: no proto makes it" for name in left_over])


def main() -> int:
    """Exit status 1 when --check found something."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a stub is stale")
    if parser.parse_args().check:
        stale = stale_files()
        for problem in stale:
            print(f"{problem}; run 'make proto'", file=sys.stderr)
        return 1 if stale else 0
    made = generate(ROOT)
    for path in PACKAGE_DIR.glob("*_pb2*"):
        if path.name not in made:
            path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
