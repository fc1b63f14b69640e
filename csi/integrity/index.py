"""Build, write, read and apply a block index: the BLAKE3 hash of every block of a model's blobs.

A layer's digest is that of the whole layer, so it cannot check a range. The index can: it hangs on the manifest's
digest (as a layer) or on a signature (as a referrer), and with it no byte need be served unchecked.

What it does *not* prove is that the blocks make up the blob of that digest: whoever packed the model could have put
other hashes there. So it binds readers of one manifest, and nobody else; see docs/semantics.md.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import BinaryIO, Protocol

import blake3
from google.protobuf.message import DecodeError

from csi.errors import InvalidVolumeError, UnsupportedModelError
from csi.oci.descriptor import Descriptor
from csi.oci.digest import Digest
from csi.stream import blocks
from csi.wire import index_pb2

VERSION = 1
HASH_BYTES = 32
MAX_INDEX_BYTES = 64 * 1024 * 1024
"""An index of 1 TB has 8 MB."""


@dataclass(frozen=True, slots=True)
class BlobHashes:
    """The hashes of one blob's blocks, one after the other."""

    digest: Digest
    size_bytes: int
    hashes: bytes

    def is_right(self, block: int, content: bytes | bytearray | memoryview) -> bool:
        """Whether `content` is that block, whole."""
        return self.is_hash(block, hash_of(content))

    def is_hash(self, block: int, found: bytes) -> bool:
        """Whether `found` is the hash of that block."""
        expected = self.hashes[block * HASH_BYTES : (block + 1) * HASH_BYTES]
        return len(expected) == HASH_BYTES and found == expected


BlockIndex = Mapping[Digest, BlobHashes]


class Hasher(Protocol):
    """A hash in the making."""

    def update(self, data: memoryview, /) -> object:
        """More of the block. In pieces of half a megabyte it costs what the whole does, in smaller ones up to twice that."""

    def digest(self) -> bytes:
        """Of what there was."""


def hasher() -> Hasher:
    """For a block that comes in pieces."""
    made: Hasher = blake3.blake3()
    return made


def hash_of(content: bytes | bytearray | memoryview) -> bytes:
    """The hash of one whole block."""
    return blake3.blake3(content).digest()


def hash_file(file: BinaryIO, algorithm: str = "sha256") -> BlobHashes:
    """Digest and block hashes of an open (unbuffered) file from where it stands, in one pass."""
    hasher = Digest(algorithm, "").hasher()
    hashes = bytearray()
    size = 0
    buffer = memoryview(mmap.mmap(-1, blocks.BLOCK_BYTES))  # aligned: copies into it cost a fraction
    while length := _fill(file, buffer):
        content = buffer[:length]
        hasher.update(content)
        hashes += hash_of(content)
        size += length
    return BlobHashes(Digest(algorithm, hasher.hexdigest()), size, bytes(hashes))


def dump(blobs: Iterable[BlobHashes]) -> bytes:
    """The bytes of an index: the same for the same blobs in any order and number."""
    index = index_pb2.BlockIndex(version=VERSION)
    unique = {str(blob.digest): blob for blob in blobs}
    for name, blob in sorted(unique.items()):
        index.blobs.append(
            index_pb2.BlobBlocks(
                digest=name,
                size_bytes=blob.size_bytes,
                block_bytes=blocks.BLOCK_BYTES,
                algorithm=index_pb2.HASH_ALGORITHM_BLAKE3,
                hashes=blob.hashes,
            )
        )
    return index.SerializeToString(deterministic=True)


def load(data: bytes, layers: Iterable[Descriptor], subject: str) -> BlockIndex:
    """Read an index of exactly these layers. `subject` is what messages call it.

    Raises: UnsupportedModelError for anything but an index of version 1 that has each layer's blob once, with the
    layer's size and one hash for each of its blocks, and no other blob.
    """

    def refuse(problem: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{subject}: {problem}; push the model again, or mount it with 'verify: whole', which needs no index"
        )

    if len(data) > MAX_INDEX_BYTES:
        raise refuse(f"has {len(data)} bytes, the limit is {MAX_INDEX_BYTES}")
    parsed = index_pb2.BlockIndex()
    try:
        parsed.ParseFromString(data)
    except DecodeError:
        raise refuse("is not a block index") from None
    if parsed.version != VERSION:
        raise refuse(f"is a block index of version {parsed.version}, expected {VERSION}")
    sizes = {layer.digest: layer.size_bytes for layer in layers}
    found: dict[Digest, BlobHashes] = {}
    for position, entry in enumerate(parsed.blobs):
        what = f"blobs[{position}]"
        try:
            digest = Digest.parse(entry.digest)
        except InvalidVolumeError as exc:
            raise refuse(f"{what}: {exc}") from None
        if digest in found:
            raise refuse(f"{what}: {digest.short()} is there twice")
        if digest not in sizes:
            raise refuse(f"{what}: {digest.short()} is no layer of the model")
        if entry.size_bytes != sizes[digest]:
            raise refuse(f"{what}: {digest.short()} has {entry.size_bytes} bytes here, {sizes[digest]} in the manifest")
        if entry.block_bytes != blocks.BLOCK_BYTES or entry.algorithm != index_pb2.HASH_ALGORITHM_BLAKE3:
            raise refuse(
                f"{what}: blocks of {entry.block_bytes} bytes and hash {entry.algorithm}, expected "
                f"{blocks.BLOCK_BYTES} and {index_pb2.HASH_ALGORITHM_BLAKE3}"
            )
        if len(entry.hashes) != blocks.block_count(entry.size_bytes) * HASH_BYTES:
            raise refuse(
                f"{what}: {len(entry.hashes)} bytes of hashes for {blocks.block_count(entry.size_bytes)} blocks, "
                f"expected {HASH_BYTES} for each"
            )
        found[digest] = BlobHashes(digest, entry.size_bytes, entry.hashes)
    if missing := [digest.short() for digest in sizes if digest not in found]:
        raise refuse(f"has no hashes of {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else ""))
    return MappingProxyType(found)


def file_layers(layers: Iterable[Descriptor], index_layer: Descriptor) -> Iterator[Descriptor]:
    """The layers that an index layer is about: all but itself."""
    return (layer for layer in layers if layer.digest != index_layer.digest)


def _fill(file: BinaryIO, buffer: memoryview) -> int:
    """How many bytes there were, less than asked for only at the end of the file."""
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])  # type: ignore[attr-defined]
        if not count:
            break
        done += count
    return done
