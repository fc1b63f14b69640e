"""Whether a registry really has a model, or only repeats its manifest.

Where all bytes are verified, volumes from different registries share one mount. Somebody who knows the manifest of a
model that is none of his could then put that manifest into a registry of his own and read the blobs out of this node's
cache. So before a volume joins a mount from another registry, that registry has to deliver a block chosen at random.
"""

from __future__ import annotations

import random

from csi.errors import DigestMismatchError
from csi.integrity.index import BlobHashes, BlockIndex
from csi.stream import blocks
from csi.stream.ports import ModelSource


def prove_possession(source: ModelSource, index: BlockIndex) -> None:
    """Returns when the source has delivered a random block.

    Raises: DigestMismatchError when the block is another one; ModelNotFoundError and the like from the source.
    """
    blob, block = choose(list(index.values()), random.SystemRandom())
    if blob is None:
        return
    content = memoryview(bytearray(blocks.block_length(blob.size_bytes, block)))
    reader = source.open_range(blob.digest, blob.size_bytes, block * blocks.BLOCK_BYTES, len(content))
    try:
        reader.readinto(content)
    finally:
        reader.close()
    if not blob.is_right(block, content):
        raise DigestMismatchError(
            f"{source.origin}: has the manifest, but another content than it says for blob {blob.digest.short()}; "
            "copy the model there with a tool that copies its blobs too",
            subject=str(blob.digest),
        )


def choose(blobs: list[BlobHashes], random_source: random.Random) -> tuple[BlobHashes | None, int]:
    """Every block of the model is as likely as any other. (None, 0) for a model without a byte."""
    counts = [blocks.block_count(blob.size_bytes) for blob in blobs]
    if not any(counts):
        return None, 0
    chosen = random_source.randrange(sum(counts))
    for blob, count in zip(blobs, counts, strict=True):
        if chosen < count:
            return blob, chosen
        chosen -= count
    raise AssertionError("unreachable")
