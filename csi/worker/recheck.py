"""Looks at the headers of plain tar layers again, once their blobs are known to be right, and at the beginning of files that
might have been packed directories.

With `verify: whole` the tree was made from ranges of the registry that nobody could check then, and that were not kept. A
registry could have shown other headers there than the blob has. So when the blob's sha256 has matched, its own headers
decide: if they are not what the tree was made from, the blob is treated as one whose sha256 did not match.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from csi.errors import CacheError, ContentError
from csi.oci.archive import tar
from csi.oci.archive.layer_index import Access, LayerIndex
from csi.oci.descriptor import Descriptor
from csi.oci.formats.plan import Packing
from csi.tree.file_format import Tree
from csi.tree.model import Encoding
from csi.worker.layers import FIRST_BYTES, first_member_in, load_index, open_complete, read_cached

log = logging.getLogger(__name__)

_POLL_S = 1.0


async def recheck_headers(tree: Tree, area_fd: int, distrust: Callable[[int], None]) -> None:
    """Returns when every such layer of the tree was checked. `distrust(blob)` hears of those that were not what they
    seemed.
    """
    waiting = await trio.to_thread.run_sync(_layers, tree, area_fd)
    while waiting:
        for blob, (descriptor, index) in list(waiting.items()):
            right = await trio.to_thread.run_sync(_is_right, area_fd, descriptor, index)
            if right is None:
                continue
            del waiting[blob]
            if not right:
                log.error("layer %s: its headers are not those the tree was made from", descriptor.digest.short())
                distrust(blob)
        await trio.sleep(_POLL_S)


def _layers(tree: Tree, area_fd: int) -> dict[int, tuple[Descriptor, LayerIndex]]:
    """Those with an index: any other blob is a file whatever is in it."""
    found = {}
    for position, blob in enumerate(tree.blobs):
        if blob.encoding is Encoding.IDENTITY:
            descriptor = Descriptor("", blob.digest, blob.size_bytes)
            index = load_index(area_fd, descriptor)
            if index is not None and index.access in (Access.DIRECT, Access.FILE):
                found[position] = (descriptor, index)
    return found


def _is_right(area_fd: int, descriptor: Descriptor, index: LayerIndex) -> bool | None:
    """None: the blob is not complete, or cannot be read just now."""
    reader = open_complete(area_fd, descriptor)
    if reader is None:
        return None
    what = f"layer {descriptor.digest.short()}"
    try:
        if index.access is Access.FILE:
            prefix = read_cached(reader, 0, min(FIRST_BYTES, descriptor.size_bytes))
            return first_member_in(prefix, Packing.TAR_GZIP, what) == index.members
        found = tar.members_of(lambda at, length: read_cached(reader, at, length), descriptor.size_bytes, what)
    except CacheError:
        return None
    except ContentError:
        return False
    finally:
        reader.close()
    return found == index.members
