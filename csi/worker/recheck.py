"""Looks at the headers of plain tar layers again, once their blobs are known to be right.

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
from csi.oci.archive.table import MemberTable
from csi.oci.descriptor import Descriptor
from csi.tree.file_format import Tree
from csi.tree.model import Encoding
from csi.worker.layers import load_index, open_complete, read_cached

log = logging.getLogger(__name__)

_POLL_S = 1.0


async def recheck_headers(tree: Tree, area_fd: int, distrust: Callable[[int], None]) -> None:
    """Returns when every tar layer of the tree was checked. `distrust(blob)` hears of those that were not what they
    seemed.
    """
    waiting = await trio.to_thread.run_sync(_tar_layers, tree, area_fd)
    while waiting:
        for blob, (descriptor, members) in list(waiting.items()):
            right = await trio.to_thread.run_sync(_are_right, area_fd, descriptor, members)
            if right is None:
                continue
            del waiting[blob]
            if not right:
                log.error("layer %s: its headers are not those the tree was made from", descriptor.digest.short())
                distrust(blob)
        await trio.sleep(_POLL_S)


def _tar_layers(tree: Tree, area_fd: int) -> dict[int, tuple[Descriptor, MemberTable]]:
    """Those with an index: a raw blob has none."""
    found = {}
    for position, blob in enumerate(tree.blobs):
        if blob.encoding is Encoding.IDENTITY:
            descriptor = Descriptor("", blob.digest, blob.size_bytes)
            if (index := load_index(area_fd, descriptor)) is not None:
                found[position] = (descriptor, index.members)
    return found


def _are_right(area_fd: int, descriptor: Descriptor, members: MemberTable) -> bool | None:
    """None: the blob is not complete, or cannot be read just now."""
    reader = open_complete(area_fd, descriptor)
    if reader is None:
        return None
    what = f"layer {descriptor.digest.short()}"
    try:
        found = tar.members_of(lambda at, length: read_cached(reader, at, length), descriptor.size_bytes, what)
    except CacheError:
        return None
    except ContentError:
        return False
    finally:
        reader.close()
    return found == members
