"""What the read path asks of its edges. Edges do not import each other; what two of them share stands here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from csi.oci.digest import Digest


@dataclass(frozen=True, slots=True)
class ManifestBytes:
    """A manifest as the source sent it: the very bytes that hash to `digest`."""

    data: bytes
    media_type: str
    digest: Digest


class RangeReader(Protocol):
    """The bytes of one requested range, in order. Not thread-safe; close it when done, finished or not."""

    def readinto(self, buffer: memoryview) -> None:
        """Fill the whole of `buffer` with the next bytes of the range.

        Raises: RegistryUnavailableError when the source stalls, resets or ends early.
        """

    def reject(self) -> None:
        """What it brought is wrong: whoever sent it is not asked for this blob any more, nor for a while for anything, as long
        as somebody else can be.
        """

    def close(self) -> None:
        """Give the connection back (range read to its end) or drop it. Idempotent."""


class ModelSource(Protocol):
    """A place that has one repository's manifests and blobs. Thread-safe. Nothing it returns is trusted but
    what it says it has verified.
    """

    @property
    def origin(self) -> str:
        """For people and cache keys: `registry/repository` or `oci-layout:/directory`."""

    def fetch_manifest(self, tag: str | None, digest: Digest | None, timeout_s: float) -> ManifestBytes:
        """The manifest of `digest` if given, else of `tag`; fetched once, hashed, checked against `digest`.

        Raises: ModelNotFoundError, RegistryAuthError, RegistryUnavailableError, DigestMismatchError,
        SizeMismatchError (over 4 MiB).
        """

    def referrers(self, digest: Digest, artifact_type: str, timeout_s: float) -> tuple[Digest, ...]:
        """The manifests that say that they belong to the manifest `digest`, anybody's, and are said to be of that artifact type,
        or may be: the first 16.

        Raises: RegistryAuthError, RegistryUnavailableError, UnsupportedModelError (not a list).
        """

    def open_range(self, digest: Digest, size_bytes: int, offset: int, length: int) -> RangeReader:
        """Start reading `length` bytes from `offset` of a blob that its descriptor says has `size_bytes`.

        `0 ≤ offset`, `1 ≤ length`, `offset + length ≤ size_bytes`. The bytes are *not* verified.

        Raises: ModelNotFoundError, RegistryAuthError, RegistryUnavailableError, SizeMismatchError (the source
        says the blob has another size).
        """

    def close(self) -> None:
        """Close idle connections."""
