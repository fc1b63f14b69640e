"""`modelmount inspect` and `modelmount ls`: what a reference is, and the tree it would mount as, without pulling it."""

from __future__ import annotations

import argparse
import json
import sys
from datetime import UTC, datetime
from typing import Any

from csi.cli.found_model import FoundModel, add_source_flags, open_finder
from csi.cli.sizes import size_text
from csi.cli.view_flags import add_view_flags, view_of
from csi.oci.descriptor import Descriptor
from csi.oci.formats.plan import ModelPlan, Packing
from csi.oci.manifest import IndexEntry
from csi.oci.modelpack import index_layer_of
from csi.tree.model import EntryKind, TreeContent

# As `modelmount status` calls them; what a tar+zstd layer allows shows only when it is read.
_MODES = {
    Packing.RAW: "streamed",
    Packing.TAR: "streamed",
    Packing.TAR_GZIP: "indexed",
    Packing.TAR_ZSTD: "indexed or spooled",
}
_MODE_TEXTS = {
    "streamed": "nothing but headers of archives is read before the mount",
    "indexed": "read once before the first mount, then decoded where it is read",
    "indexed or spooled": "read once before the first mount, then decoded where its frames allow it, else from a decoded copy",
}
_KINDS = {EntryKind.FILE: "file", EntryKind.DIRECTORY: "directory", EntryKind.SYMLINK: "symlink"}
_MAX_ANNOTATION = 100


def add_parser(subparsers: Any) -> None:
    """Register both verbs."""
    inspect = subparsers.add_parser(
        "inspect",
        help="say what a reference is: format, layers, sizes, variants",
        description="Read the manifest (and, where the format needs it, the config) of a model and say what would be mounted. "
        "Nothing else is read.",
    )
    add_source_flags(inspect)
    inspect.add_argument(
        "--variant", default="", metavar="SELECTOR", help="of an index: the manifest to look at, as for a volume"
    )
    listing = subparsers.add_parser(
        "ls",
        help="list the files a reference would mount as, without pulling it",
        description="List the tree of a model. Layers that are files need no reading, plain archives only their headers; "
        "compressed archives are read through, and nothing of them is kept.",
    )
    add_source_flags(listing)
    add_view_flags(listing)
    listing.add_argument(
        "--read-all", action="store_true", help="read compressed layers of any size (default: up to 1 GB together)"
    )
    for parser in (inspect, listing):
        parser.add_argument(
            "--output", choices=["text", "json"], default="text", help="what stdout gets (default: text)"
        )
    inspect.set_defaults(run=run_inspect)
    listing.set_defaults(run=run_ls)


def run_inspect(args: argparse.Namespace) -> int:
    """Returns 0 also for an index that leaves the variant open: then its variants are listed."""
    with open_finder(args) as finder:
        found = finder.find(args.variant)
        if found.undecided is not None and args.variant:
            raise found.undecided
        described = _described(found, finder.plan(found) if found.manifest else None)
    if args.output == "json":
        print(json.dumps(described, sort_keys=True))
    else:
        print("\n".join(_inspect_lines(described)))
    return 0


def run_ls(args: argparse.Namespace) -> int:
    """Returns 0. Raises: UnsupportedModelError for an index that leaves the variant open, or what cannot be listed."""
    view = view_of(args)
    warnings: list[str] = []
    with open_finder(args) as finder:
        found = finder.find(view.variant)
        if found.undecided is not None:
            raise found.undecided
        tree = finder.tree(finder.plan(found), view, warnings, read_all=args.read_all)
    assert found.manifest_bytes is not None
    if args.output == "json":
        entries = _entries(tree)
        outcome = {
            "digest": str(found.manifest_bytes.digest),
            "entries": entries,
            "files": sum(entry["type"] == "file" for entry in entries),
            "reference": f"{found.reference.origin}@{found.root.digest}",
            "total_bytes": sum(entry.get("size_bytes", 0) for entry in entries),
            "warnings": warnings,
        }
        print(json.dumps(outcome, sort_keys=True))
        return 0
    for entry in _entries(tree):
        print(_ls_line(entry))
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return 0


def _described(found: FoundModel, plan: ModelPlan | None) -> dict[str, Any]:
    described: dict[str, Any] = {
        "digest": str(found.manifest_bytes.digest) if found.manifest_bytes else None,
        "index": None,
        "model": None,
        "reference": f"{found.reference.origin}@{found.root.digest}",
    }
    if found.index is not None:
        described["index"] = {
            "annotations": dict(found.index.annotations),
            "artifact_type": found.index.artifact_type or None,
            "digest": str(found.root.digest),
            "media_type": found.index.media_type,
            "undecided": str(found.undecided) if found.undecided else None,
            "variants": [_variant(entry, found.chosen) for entry in found.index.entries],
        }
    if found.manifest is not None and plan is not None:
        manifest = found.manifest
        index_layer = index_layer_of(manifest)
        described["model"] = {
            "annotations": dict(manifest.annotations),
            "artifact_type": manifest.artifact_type or None,
            "block_index": index_layer is not None,
            "config": _blob(manifest.config),
            "format": str(plan.format),
            "layers": [
                {
                    **_blob(layer.descriptor),
                    "annotations": dict(layer.descriptor.annotations),
                    "category": layer.category or None,
                    "mode": _MODES[layer.packing],
                    "origin": layer.origin or None,
                    "packing": str(layer.packing),
                    "path": layer.path or None,
                }
                for layer in plan.layers
            ],
            "media_type": manifest.media_type,
            "parents": found.parents,
            "total_bytes": sum(
                {layer.descriptor.digest: layer.descriptor.size_bytes for layer in plan.layers}.values()
            ),
            "warnings": list(plan.warnings),
        }
    return described


def _variant(entry: IndexEntry, chosen: IndexEntry | None) -> dict[str, Any]:
    return {
        **_blob(entry.descriptor),
        "annotations": dict(entry.descriptor.annotations),
        "artifact_type": entry.artifact_type or None,
        "attachment": entry.attachment,
        "chosen": entry is chosen,
        "platform": entry.platform or None,
    }


def _blob(descriptor: Descriptor) -> dict[str, Any]:
    return {
        "digest": str(descriptor.digest),
        "media_type": descriptor.media_type,
        "size_bytes": descriptor.size_bytes,
    }


def _inspect_lines(described: dict[str, Any]) -> list[str]:
    lines = [described["reference"]]
    if index := described["index"]:
        lines.append(f"  index     {index['media_type']}, {len(index['variants'])} manifests")
        for variant in index["variants"]:
            mark = "→" if variant["chosen"] else "·"
            words = [variant["digest"], variant["platform"], variant["attachment"] or variant["artifact_type"]]
            words += [f"{_shown(key)}={_shown(text)}" for key, text in sorted(variant["annotations"].items())]
            lines.append(f"          {mark} {' '.join(word for word in words if word)}")
        if index["undecided"]:
            lines.append("  choose    a variant: by its digest, or --variant with anything of the above")
    model = described["model"]
    if model is None:
        return lines
    if described["index"]:
        lines.append(f"  manifest  {described['digest']}")
    layers = model["layers"]
    lines += [
        f"  format    {model['format']}",
        f"  type      {model['artifact_type'] or model['config']['media_type']}",
        f"  size      {size_text(model['total_bytes'])} in {len(layers)} layers",
        f"  verify    {'every block before it is read (it has a block index)' if model['block_index'] else 'whole blobs'}",
    ]
    for mode in dict.fromkeys(layer["mode"] for layer in layers):
        chosen = [layer for layer in layers if layer["mode"] == mode]
        total = sum(layer["size_bytes"] for layer in chosen)
        lines.append(f"  layers    {len(chosen)} {mode}, {size_text(total)}: {_MODE_TEXTS[mode]}")
    lines += [f"  parent    {parent}" for parent in model["parents"]]
    lines += [f"  {'annotated':9} {_shown(key)}={_shown(text)}" for key, text in sorted(model["annotations"].items())]
    for layer in layers:
        name = layer["path"] or f"({layer['packing']})"
        lines.append(
            f"  {layer['digest'][:19]}  {size_text(layer['size_bytes']):>9}  {layer['category'] or '':13} {name}"
        )
    lines += [f"  warning   {warning}" for warning in model["warnings"]]
    return lines


def _entries(tree: TreeContent) -> list[dict[str, Any]]:
    """In the order of the tree: directory by directory, names sorted."""
    paths = {1: ""}
    entries = []
    for entry in tree:
        if entry.inode == 1:
            continue
        name = entry.name.decode()
        path = f"{paths[entry.parent]}/{name}" if paths[entry.parent] else name
        described: dict[str, Any] = {"mtime_s": entry.mtime_s, "path": path, "type": _KINDS[entry.kind]}
        if entry.kind is EntryKind.DIRECTORY:
            paths[entry.inode] = path
        elif entry.kind is EntryKind.SYMLINK:
            described["target"] = entry.target.decode()
        else:
            blob = tree.blobs[entry.blob]
            described |= {
                "blob": str(blob.digest),
                "executable": entry.executable,
                "offset": entry.blob_offset,
                "size_bytes": entry.size_bytes,
            }
        entries.append(described)
    return sorted(entries, key=lambda entry: str(entry["path"]).split("/"))


def _ls_line(entry: dict[str, Any]) -> str:
    """`-r-xr-xr-x   1.2 GB  2025-01-01 12:00  path`, as ls -l has it."""
    kind, rights = {"file": ("-", "r--r--r--"), "directory": ("d", "r-xr-xr-x"), "symlink": ("l", "rwxrwxrwx")}[
        entry["type"]
    ]
    if entry.get("executable"):
        rights = "r-xr-xr-x"
    size = size_text(entry["size_bytes"]) if "size_bytes" in entry else "-"
    time = datetime.fromtimestamp(entry["mtime_s"], UTC).strftime("%Y-%m-%d %H:%M") if entry["mtime_s"] else "-"
    name = entry["path"] + {"directory": "/", "symlink": f" -> {entry.get('target')}"}.get(entry["type"], "")
    return f"{kind}{rights} {size:>9}  {time:16}  {name}"


def _shown(text: str) -> str:
    """A stranger's text on a terminal: short, nothing it would obey."""
    text = "".join(character if character.isprintable() else "?" for character in text[: _MAX_ANNOTATION + 1])
    return text if len(text) <= _MAX_ANNOTATION else text[:_MAX_ANNOTATION] + "…"
