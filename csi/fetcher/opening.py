"""The blobs that a worker lists, and what the mount's cache area has of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from csi.boot import this_boot
from csi.cache.allowance import Allowance
from csi.cache.blob import BlobWriter
from csi.errors import CacheError, ControlError
from csi.fetcher.answers import read_and_close
from csi.integrity.index import BlobHashes, BlockIndex
from csi.oci.digest import Digest
from csi.tree.model import BlobSpec

_MAX_SPECS_BYTES = 16 * 1024 * 1024


def read_specs(specs_fd: int) -> list[BlobSpec]:
    """From a worker's JSON [[digest, size, origin], …]. Raises: InvalidVolumeError, ValueError."""
    listed = json.loads(read_and_close(specs_fd, _MAX_SPECS_BYTES, "blob list"))
    return [BlobSpec(Digest.parse(digest), int(size), origin=str(origin)) for digest, size, origin in listed]


@dataclass(frozen=True, slots=True)
class OpenedBlobs:
    """By position in the worker's list. `hashes` come from the block index or, without one, from the proven blob that is in
    place. `in_place`: that have a proven blob. `trouble`: why some go on without a disk.
    """

    writers: list[BlobWriter]
    hashes: list[BlobHashes | None]
    in_place: set[Digest]
    trouble: CacheError | None


def open_blobs(area_fd: int, specs: Sequence[BlobSpec], index: BlockIndex | None, allowance: Allowance) -> OpenedBlobs:
    """A blob whose place in the cache cannot be used gets a writer that keeps nothing.

    Raises: ControlError for a blob that the index does not have.
    """
    if index is not None and (missing := [spec.digest.short() for spec in specs if spec.digest not in index]):
        raise ControlError(f"fetcher: the worker asks for {missing[0]}, which the block index does not have")
    boot_id = this_boot()
    writers: list[BlobWriter] = []
    hashes: list[BlobHashes | None] = []
    trouble: CacheError | None = None
    for spec in specs:
        try:
            writer = BlobWriter.open(
                area_fd, spec.digest, spec.size_bytes, boot_id, recheck=index is not None, allowance=allowance
            )
        except CacheError as exc:
            trouble = exc
            writer = BlobWriter.without_disk(area_fd, spec.digest, spec.size_bytes)
        known = index[spec.digest] if index is not None else None
        if known is None and writer.hashes is not None:
            known = BlobHashes(spec.digest, spec.size_bytes, writer.hashes)
        writers.append(writer)
        hashes.append(known)
    in_place = {
        spec.digest
        for spec, writer, known in zip(specs, writers, hashes, strict=True)
        if known is not None and known.hashes == writer.hashes
    }
    return OpenedBlobs(writers, hashes, in_place, trouble)
