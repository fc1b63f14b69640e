"""What pushing to a registry and writing a layout have in common: the port both implement, the progress they report,
and the reading of a file that must still be the one that was hashed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Protocol, Self

from csi.errors import DigestMismatchError, SizeMismatchError, UnsupportedModelError
from csi.oci.descriptor import Descriptor
from csi.oci.digest import Digest
from csi.oci.modelpack import PackedModel

_READ_BYTES = 1024 * 1024


class PushState(StrEnum):
    """What is happening to a blob, or has happened."""

    EXISTS = "exists"
    """It was there before."""
    UPLOADING = "uploading"
    UPLOADED = "uploaded"


@dataclass(frozen=True, slots=True)
class PushProgress:
    """`path` is the file on disk; `bytes_done` of `bytes_total` are at the other side (or on their way)."""

    digest: Digest
    path: str
    bytes_done: int
    bytes_total: int
    state: PushState


@dataclass(frozen=True, slots=True)
class Referrer:
    """A manifest that says in its `subject` what it belongs to, and the blobs that it names by digest."""

    manifest: bytes
    digest: Digest
    artifact_type: str
    blobs: tuple[tuple[Digest, bytes], ...]


OnProgress = Callable[[PushProgress], None]


class ModelSink(Protocol):
    """A repository or a layout, to be filled with one model: every file, then `finish`. Not thread-safe."""

    def put_file(self, blob: Descriptor, path: str, on_progress: OnProgress) -> PushState:
        """Store the file at `path` as `blob`, unless it is there. Returns EXISTS or UPLOADED, and reports it last.

        Raises: SizeMismatchError or DigestMismatchError when the file is not what was hashed, and then nothing is
        stored; UnsupportedModelError when it cannot be read; RegistryError.
        """

    def finish(self, model: PackedModel, tag: str) -> None:
        """Store config, block index and manifest, and name the manifest `tag`. Call it once every file is there.

        Raises: RegistryError, DigestMismatchError.
        """

    def close(self) -> None:
        """Give up connections and locks. Idempotent."""


class HashedFile:
    """Reads a file that was hashed before, from start to end, and notices when it is not that file any more.

    The last bytes are handed out only when all of them have the right digest, so a receiver that waits for the whole
    length never completes a wrong blob. To `requests` it is a body of known length that is neither buffered nor
    chunked.
    """

    def __init__(self, blob: Descriptor, path: str, on_progress: OnProgress) -> None:
        """Raises: UnsupportedModelError when the file cannot be opened."""
        self._blob, self._path, self._on_progress = blob, path, on_progress
        self._hash = blob.digest.hasher()
        self._left = blob.size_bytes
        try:
            # Unbuffered: reads of 1 MiB need no second copy.
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        except OSError as exc:
            raise _unreadable(path, exc) from exc

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __len__(self) -> int:
        return self._blob.size_bytes

    def __iter__(self) -> Iterator[bytes]:
        while block := self.read():
            yield block

    def read(self, size: int = -1) -> bytes:
        """The next bytes, at most 1 MiB, empty at the end. `size` is not obeyed: http.client asks for 16 KiB at a
        time, and larger pieces cost a fraction of the system calls.

        Raises: SizeMismatchError, DigestMismatchError, UnsupportedModelError.
        """
        done = self._blob.size_bytes - self._left
        self._on_progress(PushProgress(self._blob.digest, self._path, done, self._blob.size_bytes, PushState.UPLOADING))
        if self._left == 0:
            if self._blob.size_bytes == 0:
                self._check_whole()
            return b""
        try:
            block = self._file.read(min(self._left, _READ_BYTES))
        except OSError as exc:
            raise _unreadable(self._path, exc) from exc
        if not block:
            raise self._changed_size(done)
        self._hash.update(block)
        self._left -= len(block)
        if self._left == 0:
            self._check_whole()
        return block

    def _check_whole(self) -> None:
        try:
            more = self._file.read(1)
        except OSError as exc:
            raise _unreadable(self._path, exc) from exc
        if more:
            raise self._changed_size(self._blob.size_bytes + 1)
        if self._hash.hexdigest() != self._blob.digest.hex:
            actual = Digest(self._blob.digest.algorithm, self._hash.hexdigest())
            raise DigestMismatchError(
                f"{self._path}: changed while it was pushed (hashed to {self._blob.digest.short()}, is "
                f"{actual.short()} now); nothing of it was stored, push again",
                expected=str(self._blob.digest),
                actual=str(actual),
                subject=self._path,
            )

    def _changed_size(self, actual: int) -> SizeMismatchError:
        found = f"{actual} now" if actual < self._blob.size_bytes else "more now"
        return SizeMismatchError(
            f"{self._path}: changed while it was pushed ({self._blob.size_bytes} bytes when hashed, {found}); "
            "nothing of it was stored, push again",
            expected=self._blob.size_bytes,
            actual=actual,
            subject=self._path,
        )


def _unreadable(path: str, error: OSError) -> UnsupportedModelError:
    return UnsupportedModelError(f"{path}: cannot be read: {error.strerror or error}", path=path[:200])
