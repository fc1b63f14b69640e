"""Content digests (`sha256:<hex>`), parsed once at the edge and passed on as a type.

Source: OCI image-spec, descriptor.md, section Digests. sha256 and sha512 are the registered algorithms.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from csi.errors import DigestMismatchError, InvalidVolumeError

if TYPE_CHECKING:
    from hashlib import _Hash

_HEX_LENGTH = {"sha256": 64, "sha512": 128}
_HEX = re.compile(r"[0-9a-f]+")


@dataclass(frozen=True, slots=True)
class Digest:
    """An algorithm and its lower-case hex value. Equal digests name equal bytes."""

    algorithm: str
    hex: str

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Raises: InvalidVolumeError for an unknown algorithm, a wrong length or upper-case hex."""
        algorithm, separator, hex_value = text.partition(":")
        length = _HEX_LENGTH.get(algorithm)
        if not separator or length is None:
            raise InvalidVolumeError(
                f"digest {text[:80]!r}: expected sha256:<64 hex digits> or sha512:<128 hex digits>", field="digest"
            )
        if len(hex_value) != length or not _HEX.fullmatch(hex_value):
            raise InvalidVolumeError(
                f"digest {text[:80]!r}: {algorithm} needs {length} lower-case hex digits, "
                f"got {len(hex_value)} characters",
                field="digest",
            )
        return cls(algorithm, hex_value)

    @classmethod
    def of(cls, content: bytes | memoryview, algorithm: str = "sha256") -> Digest:
        """The digest of `content`, whole."""
        return cls(algorithm, hashlib.new(algorithm, content).hexdigest())

    def hasher(self) -> _Hash:
        """A fresh hash object of this digest's algorithm."""
        return hashlib.new(self.algorithm)

    @property
    def path_name(self) -> str:
        """A name for files and directories: `sha256-<hex>`."""
        return f"{self.algorithm}-{self.hex}"

    def short(self) -> str:
        """For people: `sha256:0123456789ab`."""
        return f"{self.algorithm}:{self.hex[:12]}"

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hex}"


def wrong_bytes(
    what: str, expected: Digest, actual: Digest, size_bytes: int, consequence: str = ""
) -> DigestMismatchError:
    """The error for content that came whole and is another one than its digest says. `what`: which, and where from;
    `consequence`: what became of it.
    """
    return DigestMismatchError(
        f"{what}: the {size_bytes} bytes received hash to {actual.short()}; {consequence}{'; ' if consequence else ''}"
        "check the registry's storage, or push the model again",
        expected=str(expected),
        actual=str(actual),
        subject=str(expected),
    )
