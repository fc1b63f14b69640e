"""What an artifact shows, found out without a mount: plan, members, tree, bytes. Decoding is the standard library's."""

from __future__ import annotations

import gzip
import platform
import sys
import zlib
from dataclasses import replace

from formats.artifacts import Artifact, Contents

from csi.oci.archive import tar
from csi.oci.archive.table import MemberTable
from csi.oci.formats.detect import needs_config, plan_of
from csi.oci.formats.index import pick, platform_of
from csi.oci.formats.plan import LayerPlan, ModelPlan, Packing
from csi.oci.manifest import Index, parse
from csi.oci.view import View
from csi.tree import file_format
from csi.tree.assemble import assemble
from csi.tree.file_format import Tree
from csi.tree.model import EntryKind

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


def decoded(layer: LayerPlan, data: bytes) -> bytes:
    match layer.packing:
        case Packing.TAR_GZIP:
            return gzip.decompress(data)
        case Packing.TAR_ZSTD:
            return zstd.decompress(data)
        case _:
            return data


def members(layer: LayerPlan, data: bytes) -> MemberTable | None:
    try:
        stream = decoded(layer, data)
    except (OSError, zlib.error):
        return None
    return tar.members_of(lambda offset, length: stream[offset : offset + length], len(stream), "layer")


def resolve(found: Artifact) -> tuple[ModelPlan, dict[str, bytes]]:
    parsed = parse(found.data, found.media_type)
    if isinstance(parsed, Index):
        chosen = pick(parsed, found.attributes.get("variant", ""), platform_of(platform.system(), platform.machine()))
        return resolve(next(child for child in found.children if child.digest == str(chosen.descriptor.digest)))
    config = found.blobs[str(parsed.config.digest)] if needs_config(parsed) else None
    return plan_of(parsed, config), found.blobs


def shown_by(found: Artifact) -> Contents:
    """Path → content of what a volume would show."""
    plan, blobs = resolve(found)
    tables, sizes, layers = {}, {}, []
    for position, layer in enumerate(plan.layers):
        data = blobs[str(layer.descriptor.digest)]
        settled = layer
        if layer.packing.is_archive:
            table = members(layer, data)
            settled = layer.settle(table[0].path if table else None)
            if table is not None and settled.packing.is_archive:
                tables[position], sizes[position] = table, len(decoded(layer, data))
        layers.append(settled)
    view = View.parse(found.attributes)
    content = assemble(replace(plan, layers=tuple(layers)), tables, decoded_bytes=sizes, view=view)
    tree = Tree(file_format.dump(content))
    packings = {layer.descriptor.digest: layer for layer in layers}
    shown: dict[str, bytes | str | None] = {}
    for inode in range(2, len(tree) + 1):
        entry = tree.entry(inode)
        match entry.kind:
            case EntryKind.DIRECTORY:
                shown[tree.path(inode)] = None
            case EntryKind.SYMLINK:
                shown[tree.path(inode)] = entry.target.decode()
            case _:
                digest = tree.blobs[entry.blob].digest
                stream = decoded(packings[digest], blobs[str(digest)])
                shown[tree.path(inode)] = stream[entry.blob_offset : entry.blob_offset + entry.size_bytes]
    return shown
