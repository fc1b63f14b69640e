"""A model as plain files: a directory of hard links to proven blobs, and of copies of what is too small to be shared.

    sealed/<mount id>/     ours alone to write; shown to pods as it is, so nothing in it ever changes

The names come from a mount's worker, which has read what a registry sent: they are taken only if they lead nowhere else. What is
linked is what this mount was given, each file hashed since the machine started. A directory is put together under another name and
appears whole or not at all. Who shows it to pods locks it (flock, shared), and what is locked stays.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence

from csi.cache import format as fmt
from csi.errors import CacheError
from csi.oci.digest import Digest

_HIDDEN = "."
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
_FILE_MODE, _DIRECTORY_MODE = 0o444, 0o755
_MAX_COPIED_BYTES = 64 * 1024 * 1024
"""Of one model: copies are made while others wait."""

File = tuple[str, Digest, int]
"""A path, a digest and a size in bytes."""


class SealedModels:
    """Those below `directory_fd`; proven blobs are below `blobs_fd`. `open_proven(mount id, digest)` is a descriptor of a proven
    blob that the mount has, None where it is not known to be right now; `read_whole(mount id, digest, size)` are the bytes of a
    small one, hashed.
    """

    def __init__(
        self,
        directory_fd: int,
        blobs_fd: int,
        open_proven: Callable[[str, Digest], int | None],
        read_whole: Callable[[str, Digest, int], bytes],
    ) -> None:
        self._fd, self._blobs_fd = directory_fd, blobs_fd
        self._open_proven, self._read_whole = open_proven, read_whole
        self._right: dict[str, tuple[int, int]] = {}
        for name in os.listdir(directory_fd):
            if name.startswith(_HIDDEN):  # left by one who died over it
                shutil.rmtree(name, dir_fd=directory_fd, ignore_errors=True)

    def seal(self, mount_id: str, files: Sequence[File]) -> list[Digest]:
        """Have the model there, complete. One that is there already is looked at again: each of its files must still be what is
        proven now. The blobs that must be hashed first; none: it is there. Raises: CacheError with what is missing.
        """
        for path, _, _ in files:
            _check_path(path)
        sources: dict[Digest, int] = {}
        unproven: dict[Digest, None] = {}
        try:
            for _, digest, size_bytes in files:
                if size_bytes >= fmt.SHARED_FROM_BYTES and digest not in sources | unproven:
                    source = self._open_proven(mount_id, digest)
                    if source is None:
                        unproven[digest] = None
                    else:
                        sources[digest] = source
            if unproven or self._is_there(mount_id, files, sources):
                return list(unproven)
            if not self.remove(mount_id):
                raise CacheError(f"mount {mount_id[:8]}: other files of it are shown")
            self._put_together(mount_id, files, sources)
            return []
        except OSError as exc:
            raise CacheError(f"mount {mount_id[:8]}: cannot be shown as plain files: {exc.strerror}") from exc
        finally:
            for source in sources.values():
                os.close(source)

    def remove(self, mount_id: str) -> bool:
        """False when somebody shows it."""
        with self._locked(mount_id) as free:
            if free:
                gone = f"{_HIDDEN}gone-{mount_id}"
                with contextlib.suppress(FileNotFoundError):
                    os.rename(mount_id, gone, src_dir_fd=self._fd, dst_dir_fd=self._fd)
                shutil.rmtree(gone, dir_fd=self._fd, ignore_errors=True)
                self._right = {path: seen for path, seen in self._right.items() if not path.startswith(f"{mount_id}/")}
            return free

    def is_shown(self, mount_id: str) -> bool:
        """Whether somebody shows it."""
        with self._locked(mount_id) as free:
            return not free

    def own_bytes(self, mount_id: str) -> int:
        """What it takes beside the proven blobs."""
        total = 0
        with contextlib.suppress(OSError):
            for _, _, names, fd in os.fwalk(mount_id, dir_fd=self._fd):
                for name in names:
                    status = os.stat(name, dir_fd=fd, follow_symlinks=False)
                    total += status.st_blocks * 512 if status.st_nlink == 1 else 0
        return total

    def _is_there(self, mount_id: str, files: Sequence[File], sources: dict[Digest, int]) -> bool:
        for path, digest, size_bytes in files:
            try:
                found = os.stat(f"{mount_id}/{path}", dir_fd=self._fd, follow_symlinks=False)
            except OSError:
                return False
            source = sources.get(digest)
            if found.st_size != size_bytes:
                return False
            if source is not None:
                if not os.path.samestat(found, os.fstat(source)):
                    return False
            elif not self._is_right(f"{mount_id}/{path}", digest, found):
                return False
        return bool(files)

    def _is_right(self, path: str, digest: Digest, found: os.stat_result) -> bool:
        """Whether a copy is what it was made as: hashed once by this process, and whenever it was written to since."""
        seen = (found.st_ino, found.st_mtime_ns)
        if self._right.get(path) != seen:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self._fd)
            with open(fd, "rb") as file:
                if Digest.of(file.read(), digest.algorithm) != digest:
                    return False
            self._right[path] = seen
        return True

    def _put_together(self, mount_id: str, files: Sequence[File], sources: dict[Digest, int]) -> None:
        """Raises: OSError, CacheError; then nothing of it stays."""
        work, copied = f"{_HIDDEN}{mount_id}", 0
        shutil.rmtree(work, dir_fd=self._fd, ignore_errors=True)
        os.mkdir(work, _DIRECTORY_MODE, dir_fd=self._fd)
        try:
            made = {""}
            for path, digest, size_bytes in files:
                self._make_parents(work, path, made)
                if (source := sources.get(digest)) is not None:
                    name = f"{digest.path_name}/{fmt.DATA_NAME}"
                    os.link(name, f"{work}/{path}", src_dir_fd=self._blobs_fd, dst_dir_fd=self._fd)
                    made_now = os.stat(f"{work}/{path}", dir_fd=self._fd, follow_symlinks=False)
                    if not os.path.samestat(made_now, os.fstat(source)):
                        raise CacheError(f"blob {digest.short()}: was replaced just now")
                    continue
                copied += size_bytes
                if copied > _MAX_COPIED_BYTES:
                    raise CacheError(f"mount {mount_id[:8]}: more than {_MAX_COPIED_BYTES >> 20} MiB in small files")
                content = self._read_whole(mount_id, digest, size_bytes)
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
                with open(os.open(f"{work}/{path}", flags, _FILE_MODE, dir_fd=self._fd), "wb") as file:
                    file.write(content)
            os.rename(work, mount_id, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        finally:
            shutil.rmtree(work, dir_fd=self._fd, ignore_errors=True)

    def _make_parents(self, work: str, path: str, made: set[str]) -> None:
        parts = path.split("/")[:-1]
        for depth in range(1, len(parts) + 1):
            directory = "/".join(parts[:depth])
            if directory not in made:
                os.mkdir(f"{work}/{directory}", _DIRECTORY_MODE, dir_fd=self._fd)
                made.add(directory)

    @contextlib.contextmanager
    def _locked(self, mount_id: str) -> Iterator[bool]:
        """Whether nobody shows it; while inside, nobody begins to."""
        try:
            fd = os.open(mount_id, _DIRECTORY, dir_fd=self._fd)
        except OSError:
            yield True
            return
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True
        finally:
            os.close(fd)


def parse_files(value: object) -> list[File]:
    """From JSON [[path, digest, size], …]. Raises: InvalidVolumeError, ValueError."""
    if not isinstance(value, list):
        raise ValueError("files: not a list")
    return [(str(path), Digest.parse(str(digest)), int(size)) for path, digest, size in value]


def _check_path(path: str) -> None:
    """Raises: CacheError for a path that leads anywhere but down."""
    parts = path.split("/")
    if (
        "\0" in path
        or len(path.encode()) > 4000
        or any(part in ("", ".", "..") or len(part.encode()) > 255 for part in parts)
    ):
        raise CacheError(f"file {path[:80]!r} cannot be shown as a plain file")
