"""One blob in the cache: the writer of the fetcher, the reader of the worker. Both open by directory descriptor,
so neither needs any right on the directories above.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Sequence
from typing import Self

from csi.cache import format as fmt
from csi.cache.allowance import Allowance
from csi.cache.format import BlobState, Mark
from csi.errors import CacheError
from csi.oci.digest import Digest
from csi.stream import blocks


class _OpenFile:
    """A descriptor that is closed with the last reference: a read in another thread may still use it when it is replaced,
    and must not find another file under its number.
    """

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


class _MappedBlob:
    """The block map, mapped; files with the bytes opened when first used. Borrows `area_fd`.

    Two descriptors per blob (Python's mmap keeps one) and one per segment of its own: a model may have thousands of files.
    """

    def __init__(self, area_fd: int, name: str, map_fd: int, size_bytes: int, *, writable: bool) -> None:
        """`map_fd` -1: a map in memory only."""
        self._area_fd = area_fd
        self._name = name
        self.size_bytes = size_bytes
        self.block_count = blocks.block_count(size_bytes)
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._map = mmap.mmap(map_fd, fmt.HEADER_BYTES + self.block_count, mmap.MAP_SHARED, protection)
        self._segments: dict[int, tuple[_OpenFile, int]] = {}  # and where in the file the segment begins
        self._shared: _OpenFile | None = None
        self._generation = self._map[fmt.GENERATION_OFFSET]

    @property
    def state(self) -> BlobState:
        """As the writer left it, this instant."""
        return BlobState(self._map[fmt.STATE_OFFSET])

    @property
    def generation(self) -> int:
        """Of the segments' files. What was read while it moved on may be of either file."""
        return self._map[fmt.GENERATION_OFFSET]

    def has(self, block: int) -> bool:
        """Whether the block's bytes may be read. Whether they are known to be right is for the mount to say."""
        return self._map[fmt.HEADER_BYTES + block] == Mark.PRESENT

    @property
    def is_whole(self) -> bool:
        """Whether every block may be read."""
        return self._map[fmt.HEADER_BYTES :].count(Mark.PRESENT) == self.block_count

    def stored_blocks(self) -> int:
        """How many blocks are there, checked or still to be."""
        return self.block_count - self._map[fmt.HEADER_BYTES :].count(Mark.ABSENT)

    def read_into(self, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        """preadv2 of present bytes at `offset`, within one segment: at most to the segment's end.

        Returns the bytes read. Raises: BlockingIOError with RWF_NOWAIT when they are not in memory, CacheError
        when the segment is missing.
        """
        segment, at = offset // blocks.SEGMENT_BYTES, offset % blocks.SEGMENT_BYTES
        opened, start = self._opened(segment)  # held until the read is done
        return os.preadv(opened.fd, buffers, start + at, flags)

    def _opened(self, segment: int) -> tuple[_OpenFile, int]:
        if (generation := self._map[fmt.GENERATION_OFFSET]) != self._generation:
            self.forget_segments()
            self._generation = generation
        opened = self._segments.get(segment)
        if opened is None:
            try:
                opened = self._open(segment)
            except OSError as exc:
                raise CacheError(f"cache segment {segment} cannot be opened: {exc.strerror}") from exc
            opened = self._segments.setdefault(segment, opened)
        return opened

    def _open(self, segment: int) -> tuple[_OpenFile, int]:
        """The mount's own file of that segment; where it has none, the proven blob."""
        with contextlib.suppress(FileNotFoundError):
            return self._open_file(fmt.segment_name(segment)), 0
        shared = self._shared = self._shared or self._open_file(fmt.DATA_NAME)
        return shared, segment * blocks.SEGMENT_BYTES

    def _open_file(self, name: str) -> _OpenFile:
        path = f"{self._name}/{name}"
        return _OpenFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self._area_fd))

    def forget_segments(self) -> None:
        """Open them anew at the next use: what they were may have been replaced."""
        self._segments, self._shared = {}, None

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


class BlockWrite:
    """A block on its way to the disk. All of it goes into one file, and it counts only if that file is still the blob's when
    the last byte is written: the store may have put another in its place meanwhile.
    """

    __slots__ = ("_blob", "_block", "_generation", "_offset", "_opened")

    def __init__(self, blob: BlobWriter, block: int, opened: _OpenFile, generation: int) -> None:
        self._blob, self._block, self._opened, self._generation = blob, block, opened, generation
        self._offset = blocks.segment_of(block)[1]

    def write(self, start: int, data: memoryview) -> None:
        """Write bytes of the block from `start` within it. Raises: CacheError (a full disk)."""
        offset = self._offset + start
        try:
            while data:
                written = os.pwrite(self._opened.fd, data, offset)
                data, offset = data[written:], offset + written
        except OSError as exc:
            raise CacheError(f"cache write failed: {exc.strerror}") from exc

    def read_back(self, buffer: memoryview) -> None:
        """The beginning of the block as it was written. Raises: CacheError."""
        try:
            if os.preadv(self._opened.fd, [buffer], self._offset) != len(buffer):
                raise CacheError("cache read failed: the segment was cut off")
        except OSError as exc:
            raise CacheError(f"cache read failed: {exc.strerror}") from exc

    def commit(self) -> bool:
        """Every byte is written (and checked, where that can be done): readers may have the block. False when what was
        written is not the blob's any more; the block is then absent, or there in another way.
        """
        return self._blob.mark_checked(self._block, self._generation)


class BlobWriter(_MappedBlob):
    """The fetcher's view. One writer per blob directory at a time; writing is thread-safe for distinct
    blocks, and a segment that two threads allocate at once is opened once.
    """

    def __init__(
        self, area_fd: int, name: str, map_fd: int, size_bytes: int, allowance: Allowance | None = None
    ) -> None:
        super().__init__(area_fd, name, map_fd, size_bytes, writable=True)
        self._allowance = allowance
        self._is_on_disk = map_fd >= 0
        self._writable: dict[int, _OpenFile] = {}
        self._allocating = threading.Lock()
        self._replacing = threading.Lock()  # held for no longer than it takes to change a mark or a name
        self.hashes: bytes | None = None
        """BLAKE3 of every block, where the sha256 of all of them was right: in the store, or here."""
        self.is_shared = False
        """What has no segment of its own is in a proven blob."""
        self.drops = 0
        """How often a mark was taken from a block."""
        self.lost_blocks = 0
        """How many were there until somebody cut off or replaced their file."""

    @classmethod
    def open(
        cls,
        area_fd: int,
        digest: Digest,
        size_bytes: int,
        boot_id: bytes,
        *,
        recheck: bool = False,
        allowance: Allowance | None = None,
    ) -> Self:
        """Resume what an earlier writer left, or start empty. `recheck`: the caller can and will check every block
        found here (see `is_kept`) before it marks it; it must where the blob is a proven one (see `hashes`). Disk is taken
        from `allowance`, where there is one.

        Raises: CacheError.
        """
        try:
            make_directory(area_fd, digest)
            shared = _read_hashes(area_fd, digest, fmt.HASHES_NAME, size_bytes)
            hashes = shared or _read_hashes(area_fd, digest, fmt.CHECKED_NAME, size_bytes)
            recheck = recheck or hashes is not None
            map_fd = _open_map(area_fd, digest.path_name, size_bytes, boot_id, recheck=recheck)
        except OSError as exc:
            raise CacheError(f"cache of blob {digest.short()} cannot be opened: {exc.strerror}") from exc
        try:
            writer = cls(area_fd, digest.path_name, map_fd, size_bytes, allowance)
        except (OSError, ValueError) as exc:
            raise CacheError(f"block map of blob {digest.short()} cannot be mapped: {exc}") from exc
        finally:
            os.close(map_fd)
        writer.hashes = hashes
        if shared is not None:
            writer._use_shared(shared)
            writer._remove_segments()  # not before: a reader goes by the marks
        elif recheck:
            writer._keep_all()
            if hashes is not None and writer.stored_blocks() == writer.block_count:
                writer._map[fmt.STATE_OFFSET] = BlobState.VERIFIED
        return writer

    @classmethod
    def without_disk(cls, area_fd: int, digest: Digest, size_bytes: int) -> BlobWriter:
        """For a cache that cannot even hold the map: it has no block, and every write may fail."""
        return cls(area_fd, digest.path_name, -1, size_bytes)

    def unallocated_bytes(self) -> int:
        """How much of the disk the blob is still to take, when all of it is wanted."""
        if not self._is_on_disk or self.is_shared or self.state is not BlobState.FILLING:
            return 0
        missing = 0
        for segment in range(-(-self.size_bytes // blocks.SEGMENT_BYTES)):
            try:
                path = f"{self._name}/{fmt.segment_name(segment)}"
                size = os.stat(path, dir_fd=self._area_fd, follow_symlinks=False).st_size
            except OSError:
                size = 0
            if size == 0:
                missing += blocks.segment_length(self.size_bytes, segment)
        return missing

    def begin(self, block: int) -> BlockWrite | None:
        """Write a block anew. None when it need not be: it was put there by another, and is to be checked (see `is_kept`).

        Raises: CacheError (a full disk).
        """
        segment, _ = blocks.segment_of(block)
        try:
            while not self.is_kept(block):
                opened = self._writable.get(segment)
                if opened is None:
                    opened = self._allocate(segment, block)
                else:
                    self._make_whole(opened.fd, segment, known=True)
                with self._replacing:
                    if opened is not None and self._writable.get(segment) is opened:
                        return BlockWrite(self, block, opened, self.generation)
        except OSError as exc:
            raise CacheError(f"cache write failed: {exc.strerror}") from exc
        return None

    def mark_checked(self, block: int, generation: int) -> bool:
        """Readers may have a block whose bytes, read or written at that `generation`, are right. False when they are not there
        any more.
        """
        with self._replacing:
            if self.generation != generation:
                return False
            self._map[fmt.HEADER_BYTES + block] = Mark.PRESENT
            return True

    def is_kept(self, block: int) -> bool:
        """Whether the block was there at the start and is to be checked: then `mark_checked` or `drop` it."""
        return self._map[fmt.HEADER_BYTES + block] == Mark.KEPT

    def drop(self, block: int) -> None:
        """The block's bytes are not what they should be: nobody reads them."""
        self._map[fmt.HEADER_BYTES + block] = Mark.ABSENT
        self.drops += 1
        if self.state is BlobState.VERIFIED:
            self._map[fmt.STATE_OFFSET] = BlobState.FILLING

    def recheck(self) -> None:
        """Every block that is there is to be checked before it is read, also one that is being written just now."""
        with self._replacing:
            self._keep_all()
            self._next_generation()

    def _keep_all(self) -> None:
        self._map[fmt.HEADER_BYTES :] = self._map[fmt.HEADER_BYTES :].translate(_ALL_KEPT)

    def mark_verified(self, generation: int, hashes: bytes) -> bool:
        """The sha256 of what was read at that `generation` matched, and `hashes` are those of its blocks: make the bytes durable,
        then say so. False when they are not there any more. Raises: CacheError.
        """
        try:
            _write_whole(self._area_fd, f"{self._name}/{fmt.CHECKED_NAME}", fmt.pack_hashes(hashes))
            for segment in range(-(-self.size_bytes // blocks.SEGMENT_BYTES)):
                os.fdatasync(self._opened(segment)[0].fd)
        except OSError as exc:
            raise CacheError(f"cache sync failed: {exc.strerror}") from exc
        self._map.flush()
        with self._replacing:
            if self.generation != generation:
                return False
            self._map[fmt.STATE_OFFSET] = BlobState.VERIFIED
        self._map.flush()
        return True

    def poison(self) -> None:
        """The sha256 did not match: nobody reads another byte of this, and the next writer starts empty."""
        self._map[fmt.STATE_OFFSET] = BlobState.POISONED
        self._map[fmt.HEADER_BYTES :] = bytes(self.block_count)
        with contextlib.suppress(OSError):
            os.unlink(f"{self._name}/{fmt.CHECKED_NAME}", dir_fd=self._area_fd)

    def offered(self, digest: Digest) -> bytes | None:
        """The hashes of a proven blob that the store has put beside what we have, and that is not used yet."""
        return None if self.is_shared else _read_hashes(self._area_fd, digest, fmt.HASHES_NAME, self.size_bytes)

    def adopt(self, digest: Digest, known: bytes | None, *, fresh: bool) -> bool:
        """The store may have put a proven blob beside what we have. True when it is used from now on: not when its hashes are
        not those that are `known` of the blob's blocks. `fresh`: it is a copy of what we have, made and hashed just now.
        """
        hashes = self.offered(digest)
        if hashes is None or self.state is BlobState.POISONED:
            return False
        if known is not None and known != hashes:
            return False
        self._remove_segments()  # what was in one of them is read from the proven blob
        with self._replacing:
            self._remove_segments()  # those that were made meanwhile
            if fresh and self.stored_blocks() == self.block_count:
                self.hashes, self.is_shared = hashes, True
                self._writable.clear()
                self._next_generation()
            else:
                self._use_shared(hashes)
        return True

    def _use_shared(self, hashes: bytes) -> None:
        self.hashes, self.is_shared = hashes, True
        self._writable.clear()
        self._map[fmt.HEADER_BYTES :] = bytes([Mark.KEPT]) * self.block_count
        self._map[fmt.STATE_OFFSET] = BlobState.VERIFIED
        self._next_generation()

    def _remove_segments(self) -> None:
        """So that the proven blob is read. One that stays costs a check at worst."""
        with contextlib.suppress(OSError):
            directory_fd = os.open(self._name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._area_fd)
            try:
                for name in filter(fmt.is_segment, os.listdir(directory_fd)):
                    os.unlink(name, dir_fd=directory_fd)
            finally:
                os.close(directory_fd)

    def _next_generation(self) -> None:
        self._map[fmt.GENERATION_OFFSET] = (self._map[fmt.GENERATION_OFFSET] + 1) % 256

    def _allocate(self, segment: int, block: int) -> _OpenFile | None:
        """A segment to write that block to; None when the block is to be checked first after all."""
        with self._replacing:
            if self.is_kept(block):
                return None
            fd = self._open_own(segment)
        try:
            self._make_whole(fd, segment, known=False)
        except BaseException:
            os.close(fd)
            raise
        return self._writable.setdefault(segment, _OpenFile(fd))  # another thread may have been first

    def _open_own(self, segment: int) -> int:
        """The segment's file, made where there is none: from then on nothing of the segment is read from the proven blob. A
        file that is not ours to write is put aside, and nothing of it counts any more.
        """
        path = f"{self._name}/{fmt.segment_name(segment)}"
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        with contextlib.suppress(FileNotFoundError):
            try:
                return os.open(path, flags, dir_fd=self._area_fd)
            except (PermissionError, IsADirectoryError):
                os.rename(path, f"{path}.aside", src_dir_fd=self._area_fd, dst_dir_fd=self._area_fd)
                if lost := self._forget(segment, 0):
                    self.lost_blocks += lost
                    self._next_generation()
        if self._forget(segment, 0):
            self._next_generation()  # before the new file is there: who reads that one sees that it moved on
        return os.open(path, flags | os.O_CREAT, fmt.FILE_MODE, dir_fd=self._area_fd)

    def _make_whole(self, fd: int, segment: int, *, known: bool) -> None:
        """As long as it should be. What somebody has cut off is forgotten first: behind its marks zeros would be read, and a
        block that is being written to a file that is `known` would have them in its middle.
        """
        length = blocks.segment_length(self.size_bytes, segment)
        if os.fstat(fd).st_size >= length:
            return
        with self._allocating:
            if (size := os.fstat(fd).st_size) >= length:
                return  # another thread was first
            allowance = self._allowance if size == 0 else None
            if allowance is not None:
                allowance.take(length)
            try:
                with self._replacing:
                    lost = self._forget(segment, size)
                    self.lost_blocks += lost
                    if lost or known:
                        self._next_generation()  # before there is something to read again
                os.posix_fallocate(fd, 0, length)
            finally:
                if allowance is not None:
                    allowance.landed(length)

    def _forget(self, segment: int, size: int) -> int:
        """Take the marks from the blocks of a segment that end beyond its first `size` bytes. How many there were."""
        first = segment * blocks.SEGMENT_BLOCKS + size // blocks.BLOCK_BYTES
        end = min((segment + 1) * blocks.SEGMENT_BLOCKS, self.block_count)
        lost = [block for block in range(first, end) if self._map[fmt.HEADER_BYTES + block] != Mark.ABSENT]
        for block in lost:
            self.drop(block)
        return len(lost)


def make_directory(area_fd: int, digest: Digest) -> None:
    """Where a blob of a mount lies: ours, with the store's group, which it has from the area. Raises: OSError."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(digest.path_name, 0o775, dir_fd=area_fd)


def _read_hashes(area_fd: int, digest: Digest, name: str, size_bytes: int) -> bytes | None:
    try:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        fd = os.open(f"{digest.path_name}/{name}", flags, dir_fd=area_fd)
    except OSError:
        return None
    with open(fd, "rb") as file:
        return fmt.unpack_hashes(file.read(), blocks.block_count(size_bytes))


def _write_whole(area_fd: int, path: str, content: bytes) -> None:
    """Durable, and whole or not at all."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    with open(os.open(f"{path}.new", flags, fmt.FILE_MODE, dir_fd=area_fd), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.rename(f"{path}.new", path, src_dir_fd=area_fd, dst_dir_fd=area_fd)


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
    trusted = (recheck and header.state is not BlobState.POISONED) or (
        header.state is BlobState.FILLING and header.boot_id == boot_id
    )
    return fits and complete and trusted
