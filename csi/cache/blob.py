"""One blob in the cache: the writer of the fetcher, the reader of the worker. Both open by directory descriptor,
so neither needs any right on the directories above.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Sequence

from csi.cache import format as fmt
from csi.cache.format import BlobState, Mark
from csi.errors import CacheError
from csi.oci.digest import Digest
from csi.stream import blocks


class _OpenSegment:
    """A descriptor that is closed with the last reference: a read in another thread may still use it when it is replaced,
    and must not find another file under its number.
    """

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


class _MappedBlob:
    """The block map, mapped; segments opened when first used. Borrows `area_fd`.

    Two descriptors per blob (Python's mmap keeps one): a model may have thousands of files.
    """

    def __init__(self, area_fd: int, name: str, map_fd: int, size_bytes: int, *, writable: bool) -> None:
        """`map_fd` -1: a map in memory only."""
        self._area_fd = area_fd
        self._name = name
        self._flags = os.O_RDWR if writable else os.O_RDONLY
        self.size_bytes = size_bytes
        self.block_count = blocks.block_count(size_bytes)
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._map = mmap.mmap(map_fd, fmt.HEADER_BYTES + self.block_count, mmap.MAP_SHARED, protection)
        self._segments: dict[int, _OpenSegment] = {}

    @property
    def state(self) -> BlobState:
        """As the writer left it, this instant."""
        return BlobState(self._map[fmt.STATE_OFFSET])

    def has(self, block: int) -> bool:
        """Whether the block's bytes may be read. Whether they are known to be right is for the mount to say."""
        return self._map[fmt.HEADER_BYTES + block] == Mark.PRESENT

    def stored_blocks(self) -> int:
        """How many blocks are there, checked or still to be."""
        return self.block_count - self._map[fmt.HEADER_BYTES :].count(Mark.ABSENT)

    def read_into(self, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        """preadv2 of present bytes at `offset`, within one segment: at most to the segment's end.

        Returns the bytes read. Raises: BlockingIOError with RWF_NOWAIT when they are not in memory, CacheError
        when the segment is missing.
        """
        segment, at = offset // blocks.SEGMENT_BYTES, offset % blocks.SEGMENT_BYTES
        opened = self._opened(segment)  # held until the read is done
        return os.preadv(opened.fd, buffers, at, flags)

    def _opened(self, segment: int) -> _OpenSegment:
        opened = self._segments.get(segment)
        if opened is None:
            try:
                path = f"{self._name}/{fmt.segment_name(segment)}"
                fd = os.open(path, self._flags | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self._area_fd)
            except OSError as exc:
                raise CacheError(f"cache segment {segment} cannot be opened: {exc.strerror}") from exc
            opened = self._segments.setdefault(segment, _OpenSegment(fd))
        return opened

    def forget_segments(self) -> None:
        """Open them anew at the next use: what they were may have been replaced."""
        self._segments = {}

    def close(self) -> None:
        """Idempotent."""
        self.forget_segments()
        self._map.close()


class BlobReader(_MappedBlob):
    """A worker's view: read-only. Blocks appear as the writer marks them."""

    @classmethod
    def open(cls, area_fd: int, digest: Digest, size_bytes: int) -> BlobReader:
        """Raises: CacheError when the writer has not made the blob yet, or made it for another size."""
        try:
            path = f"{digest.path_name}/{fmt.MAP_NAME}"
            map_fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=area_fd)
        except OSError as exc:
            raise CacheError(f"blob {digest.short()} is not in the cache: {exc.strerror}") from exc
        try:
            header = fmt.unpack_header(os.pread(map_fd, fmt.HEADER_BYTES, 0))
            if header.size_bytes != size_bytes:
                raise CacheError(f"blob {digest.short()}: cached for {header.size_bytes} bytes, not {size_bytes}")
            return cls(area_fd, digest.path_name, map_fd, size_bytes, writable=False)
        except (OSError, ValueError) as exc:
            raise CacheError(f"blob {digest.short()}: block map unreadable: {exc}") from exc
        finally:
            os.close(map_fd)


class BlobWriter(_MappedBlob):
    """The fetcher's view. One writer per blob directory at a time; writing is thread-safe for distinct
    blocks, and a segment that two threads allocate at once is opened once.
    """

    @classmethod
    def open(
        cls, area_fd: int, digest: Digest, size_bytes: int, boot_id: bytes, *, recheck: bool = False
    ) -> BlobWriter:
        """Resume what an earlier writer left, or start empty. `recheck`: the caller can and will check every block
        found here (see `is_kept`) before it marks it. Raises: CacheError.
        """
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(digest.path_name, 0o750, dir_fd=area_fd)
            map_fd = _open_map(area_fd, digest.path_name, size_bytes, boot_id, recheck=recheck)
        except OSError as exc:
            raise CacheError(f"cache of blob {digest.short()} cannot be opened: {exc.strerror}") from exc
        try:
            writer = cls(area_fd, digest.path_name, map_fd, size_bytes, writable=True)
            if recheck:
                writer._keep_all()
            return writer
        except (OSError, ValueError) as exc:
            raise CacheError(f"block map of blob {digest.short()} cannot be mapped: {exc}") from exc
        finally:
            os.close(map_fd)

    @classmethod
    def without_disk(cls, area_fd: int, digest: Digest, size_bytes: int) -> BlobWriter:
        """For a cache that cannot even hold the map: it has no block, and every write may fail."""
        return cls(area_fd, digest.path_name, -1, size_bytes, writable=True)

    def write(self, block: int, start: int, data: memoryview) -> None:
        """Write bytes of a block from `start` within it. Raises: CacheError (a full disk)."""
        segment, offset = blocks.segment_of(block)
        offset += start
        try:
            opened = self._segments.get(segment) or self._allocate(segment)
            while data:
                written = os.pwrite(opened.fd, data, offset)
                data, offset = data[written:], offset + written
        except OSError as exc:
            raise CacheError(f"cache write failed: {exc.strerror}") from exc

    def mark(self, block: int) -> None:
        """Every byte of the block is written (and checked, where that can be done): readers may have it."""
        self._map[fmt.HEADER_BYTES + block] = Mark.PRESENT

    def is_kept(self, block: int) -> bool:
        """Whether the block was there at the start and is to be checked: then `mark` or `drop` it."""
        return self._map[fmt.HEADER_BYTES + block] == Mark.KEPT

    def drop(self, block: int) -> None:
        """The block's bytes are not what they should be: nobody reads them."""
        self._map[fmt.HEADER_BYTES + block] = Mark.ABSENT
        if self.state is BlobState.VERIFIED:
            self._map[fmt.STATE_OFFSET] = BlobState.FILLING

    def mark_verified(self) -> None:
        """The sha256 matched: make the bytes durable, then say so. Raises: CacheError."""
        try:
            for segment in range(-(-self.size_bytes // blocks.SEGMENT_BYTES)):
                os.fdatasync(self._opened(segment).fd)
        except OSError as exc:
            raise CacheError(f"cache sync failed: {exc.strerror}") from exc
        self._map.flush()
        self._map[fmt.STATE_OFFSET] = BlobState.VERIFIED
        self._map.flush()

    def poison(self) -> None:
        """The sha256 did not match: nobody reads another byte of this, and the next writer starts empty."""
        self._map[fmt.STATE_OFFSET] = BlobState.POISONED
        self._map[fmt.HEADER_BYTES :] = bytes(self.block_count)

    def _keep_all(self) -> None:
        found = self._map[fmt.HEADER_BYTES :]
        self._map[fmt.HEADER_BYTES :] = found.translate(_ALL_KEPT)

    def _allocate(self, segment: int) -> _OpenSegment:
        path = f"{self._name}/{fmt.segment_name(segment)}"
        try:
            fd = self._create(path)
        except (PermissionError, IsADirectoryError):  # not a file of ours: somebody put it there
            os.rename(path, f"{path}.foreign", src_dir_fd=self._area_fd, dst_dir_fd=self._area_fd)
            fd = self._create(path)
        try:
            length = blocks.segment_length(self.size_bytes, segment)
            if os.fstat(fd).st_size != length:
                os.posix_fallocate(fd, 0, length)
        except OSError:
            os.close(fd)
            raise
        return self._segments.setdefault(segment, _OpenSegment(fd))  # another thread may have been first

    def _create(self, path: str) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(path, flags, fmt.FILE_MODE, dir_fd=self._area_fd)


_ALL_KEPT = bytes([Mark.ABSENT, Mark.KEPT, Mark.KEPT, *[Mark.ABSENT] * 253])


def _open_map(area_fd: int, name: str, size_bytes: int, boot_id: bytes, *, recheck: bool) -> int:
    count = blocks.block_count(size_bytes)
    path = f"{name}/{fmt.MAP_NAME}"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, fmt.FILE_MODE, dir_fd=area_fd)
    try:
        if not _is_usable(fd, size_bytes, boot_id, recheck=recheck):
            header = fmt.MapHeader(size_bytes, blocks.BLOCK_BYTES, count, BlobState.FILLING, boot_id)
            os.ftruncate(fd, 0)
            os.pwrite(fd, fmt.pack_header(header) + bytes(count), 0)
    except OSError:
        os.close(fd)
        raise
    return fd


def _is_usable(fd: int, size_bytes: int, boot_id: bytes, *, recheck: bool) -> bool:
    try:
        header = fmt.unpack_header(os.pread(fd, fmt.HEADER_BYTES, 0))
    except CacheError:
        return False
    fits = (header.size_bytes, header.block_bytes) == (size_bytes, blocks.BLOCK_BYTES)
    complete = os.fstat(fd).st_size == fmt.HEADER_BYTES + blocks.block_count(size_bytes)
    trusted = header.state is BlobState.VERIFIED or (
        header.state is BlobState.FILLING and (recheck or header.boot_id == boot_id)
    )
    return fits and complete and trusted


def this_boot() -> bytes:
    """16 bytes that differ from boot to boot."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return bytes.fromhex(file.read().strip().replace("-", ""))
