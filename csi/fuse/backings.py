"""FUSE passthrough: which files the kernel reads from the cache by itself, and how an open is answered. No I/O.

A backing id is the kernel's name for a file that the keeper has registered with the connection. Only a file of the model that
is one whole blob can be read from one, and only from a blob that the store has proven: see `csi.supervisor.passing`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from csi.oci.digest import Digest
from csi.tree.file_format import Tree
from csi.tree.model import Encoding, Entry

THROUGH_US = 0
"""No backing id: the file is read through the worker and the page cache of the mount."""


class Backings:
    """The backing ids of a mount's blobs, as far as they are known now."""

    def __init__(self, tree: Tree) -> None:
        self._blobs = tree.blobs
        self._numbers: dict[Digest, list[int]] = {}
        for number, blob in enumerate(tree.blobs):
            self._numbers.setdefault(blob.digest, []).append(number)
        self._ids: dict[int, int] = {}

    def use(self, ids: Mapping[Digest, int]) -> None:
        """From now on files that are one of these blobs may be opened so."""
        for digest, backing_id in ids.items():
            self._ids |= dict.fromkeys(self._numbers.get(digest, ()), backing_id)

    def forget(self, digest: Digest) -> int:
        """The blob's file is not what it should be. The id it had, `THROUGH_US` for none."""
        ids = [self._ids.pop(number, THROUGH_US) for number in self._numbers.get(digest, ())]
        return max(ids, default=THROUGH_US)

    def forget_all(self) -> None:
        """No blob has an id any more."""
        self._ids.clear()

    def of(self, entry: Entry) -> int:
        """The id for a file, `THROUGH_US` when it has none, or is not its blob from the first byte to the last."""
        backing_id = self._ids.get(entry.blob, THROUGH_US)
        if backing_id == THROUGH_US:
            return THROUGH_US
        blob = self._blobs[entry.blob]
        whole = entry.blob_offset == 0 and entry.size_bytes == blob.size_bytes and blob.encoding is Encoding.IDENTITY
        return backing_id if whole else THROUGH_US


def way_of(open_ids: Sequence[int], wanted: int) -> int:
    """How to open an inode whose open handles have `open_ids`: as those that are open, the kernel allows nothing else."""
    passed = [backing_id for backing_id in open_ids if backing_id != THROUGH_US]
    if passed:
        return passed[0]
    return THROUGH_US if open_ids else wanted
