"""Small blobs that are read whole, and checked, before anything of them is used."""

from __future__ import annotations

from csi.oci.digest import Digest, wrong_bytes
from csi.stream.ports import ModelSource

_TRIES = 2  # what was damaged on the way is right the next time


def read_whole(source: ModelSource, digest: Digest, size_bytes: int, what: str) -> bytes:
    """The blob's bytes; `size_bytes` is for the caller to limit.

    Raises: DigestMismatchError that says `what` it was, and what the source raises.
    """
    data = bytearray(size_bytes)
    for _ in range(_TRIES):
        if size_bytes:
            reader = source.open_range(digest, size_bytes, 0, size_bytes)
            try:
                reader.readinto(memoryview(data))
                actual = Digest.of(memoryview(data), digest.algorithm)
                if actual != digest:
                    reader.reject()
            finally:
                reader.close()
        else:
            actual = Digest.of(b"", digest.algorithm)
        if actual == digest:
            return bytes(data)
    raise wrong_bytes(f"{what} {digest.short()} from {source.origin}", digest, actual, size_bytes)
