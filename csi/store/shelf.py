"""The cache of one trust domain on disk, as the store sees it:

    blobs/<digest>/    proven blobs, ours alone to write: data (one file), hashes (BLAKE3 of every block), about (JSON)
    blobs/pins         JSON: digest → label
    sealed/<id>/       a mount's model as plain files, see `csi.store.sealing`
    mounts/<id>/       what each mount fetched; its fetcher writes there, and so may we

A mount gets a proven blob as hard links in its own area: its worker and fetcher read there as always, and can change
nothing, because the files are ours. A blob becomes proven by a copy (a clone where the file system can) that is hashed
while it is made. The fetcher's own file would not do: whoever wrote it may still have it open.

A directory of a mount in use is locked (flock, shared) by whoever has it open; what is not locked may be evicted.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import random
import shutil
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from csi.cache import format as fmt
from csi.errors import CacheError, DigestMismatchError
from csi.integrity.index import hasher
from csi.oci.digest import Digest
from csi.store.eviction import Disk, Entry, Kind
from csi.store.sealing import File, SealedModels
from csi.stream import blocks

_FICLONERANGE = 0x4020940D
_CLONE_RANGE = struct.Struct("<qQQQ")  # src_fd src_offset src_length dest_offset
_HIDDEN = "."  # of work in progress, and of what is being removed
_PINS = "pins"
_ABOUT = "about"
_SHARED_FILE_MODE = 0o444
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW

Blob = tuple[Digest, int]
"""A digest and a size in bytes."""


@dataclass(frozen=True, slots=True)
class Attached:
    """What a mount got, and for which blobs its registry has to show a block first: (digest, block)."""

    shared: tuple[Digest, ...]
    challenges: tuple[tuple[Digest, int], ...]


@dataclass(frozen=True, slots=True)
class _Proof:
    """That a file was hashed and found right: in which boot, which file, and when it was written to for the last time."""

    boot: str
    inode: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class _About:
    size_bytes: int
    origins: tuple[str, ...]
    proof: _Proof | None = None


class Shelf:
    """Thread-safe. `domain_fd` is the domain's directory; everything is reached from there. `boot`: this one's id. `domains_fd` is
    the directory of all domains: of the others only the areas' sizes count, and what is in no use may leave.
    """

    def __init__(self, domain_fd: int, boot: str, domains_fd: int = -1) -> None:
        self._domain_fd, self._boot, self._domains_fd = domain_fd, boot, domains_fd
        self._blobs_fd = os.open("blobs", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=domain_fd)
        self._mounts_fd = os.open("mounts", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=domain_fd)
        self._sealed = SealedModels(
            os.open("sealed", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=domain_fd),
            self._blobs_fd,
            self.open_proven,
            self._read_whole,
        )
        self._lock = threading.Lock()
        self._random = random.SystemRandom()
        for fd in (self._blobs_fd, self._mounts_fd):
            for name in os.listdir(fd):
                if name.startswith(_HIDDEN):  # left by one who died over it
                    _remove_tree(fd, name)
        for domain in self._other_domains():
            with contextlib.suppress(OSError), self._mounts_dir(domain) as fd:
                for name in os.listdir(fd):
                    if name.startswith(_HIDDEN):
                        _remove_tree(fd, name)

    def attach(self, mount_id: str, origins: Sequence[str], wanted: Iterable[Blob]) -> Attached:
        """Give a mount what is proven and what one of its registries is known to have."""
        shared, challenges = [], []
        with self._lock:
            for digest, size_bytes in wanted:
                about = self._about(digest)
                if about is None or about.size_bytes != size_bytes:
                    continue
                if set(origins) & set(about.origins):
                    if self._link(mount_id, digest):
                        shared.append(digest)
                else:
                    challenges.append((digest, self._random.randrange(blocks.block_count(size_bytes))))
        return Attached(tuple(shared), tuple(challenges))

    def prove(self, mount_id: str, digest: Digest, block: int, origins: Sequence[str]) -> bool:
        """The mount's registry delivered that block: if it is the right one, the mount gets the blob."""
        with self._lock:
            about = self._about(digest)
            if about is None or not 0 <= block < blocks.block_count(about.size_bytes):
                return False
            length = blocks.block_length(about.size_bytes, block)
            try:
                segment, offset = blocks.segment_of(block)
                with self._segment(f"{mount_id}/{digest.path_name}", segment) as (fd, start):
                    theirs = os.pread(fd, length, start + offset)
                with _opened(self._blobs_fd, f"{digest.path_name}/{fmt.DATA_NAME}") as fd:
                    ours = os.pread(fd, length, block * blocks.BLOCK_BYTES)
            except OSError:
                return False
            if theirs != ours:
                return False
            self._add_origins(digest, about, origins)
            return self._link(mount_id, digest)

    def promote(self, mount_id: str, digest: Digest, size_bytes: int, origins: Sequence[str]) -> bool:
        """Make a mount's complete blob a proven one, and share it with that mount too. True when the proven blob is a copy of
        the mount's, made and hashed just now.

        Raises: DigestMismatchError when it is not what its digest says, CacheError when it cannot be read or copied.
        """
        source = f"{mount_id}/{digest.path_name}"
        if fresh := self._about(digest) is None:
            work = f"{_HIDDEN}{digest.path_name}"
            try:
                _remove_tree(self._blobs_fd, work)
                os.mkdir(work, 0o755, dir_fd=self._blobs_fd)
                proof = self._copy(source, work, digest, size_bytes)
                self._write_about(work, _About(size_bytes, tuple(origins), proof))
                with self._lock:
                    self._remove_blob(digest.path_name)  # one whose `about` is damaged, if any
                os.rename(work, digest.path_name, src_dir_fd=self._blobs_fd, dst_dir_fd=self._blobs_fd)
            except OSError as exc:
                raise CacheError(f"blob {digest.short()} cannot be shared: {exc.strerror}") from exc
            finally:
                _remove_tree(self._blobs_fd, work)
        else:  # another mount was first; a few blocks show that this one has the same
            count = blocks.block_count(size_bytes)
            for block in {self._random.randrange(count) for _ in range(4)}:
                if not self.prove(mount_id, digest, block, origins):
                    raise CacheError(f"blob {digest.short()}: block {block} of mount {mount_id[:8]} is another one")
        with self._lock:
            self._link(mount_id, digest)
        return fresh

    def verify(self, digest: Digest) -> bool:
        """Hash a proven blob again; a damaged one leaves the shelf (mounts that have it check every block anyway)."""
        if self.prove_again(digest):
            return True
        with self._lock:
            self._remove_blob(digest.path_name)
        return False

    def prove_again(self, digest: Digest) -> bool:
        """Hash a proven blob again, and note that it is right."""
        proof = self._hashed(digest)
        with self._lock:
            about = self._about(digest)
            if proof is not None and about is not None:
                with contextlib.suppress(OSError):
                    self._write_about(digest.path_name, replace(about, proof=proof))
        return proof is not None

    def doubt(self, mount_id: str, digest: Digest) -> None:
        """A mount that has the blob found it damaged: what was proven of it does not count any more. Raises: CacheError."""
        if (file_fd := self.open_proven(mount_id, digest)) is None:
            return
        os.close(file_fd)
        with self._lock:
            if about := self._about(digest):
                try:
                    self._write_about(digest.path_name, replace(about, proof=None))
                except OSError as exc:
                    raise CacheError(f"blob {digest.short()}: doubts cannot be noted: {exc.strerror}") from exc

    def open_proven(self, mount_id: str, digest: Digest) -> int | None:
        """A descriptor of a proven blob that the mount has. None when it has to be hashed first: it was not since the machine
        started, or it was written to since.

        Raises: CacheError when the mount does not have it.
        """
        with self._lock:
            about = self._about(digest)
            try:
                linked = os.stat(f"{mount_id}/{digest.path_name}/{fmt.DATA_NAME}", dir_fd=self._mounts_fd)
                with _opened(self._blobs_fd, f"{digest.path_name}/{fmt.DATA_NAME}") as fd:
                    found = os.fstat(fd)
                    if about is None or not os.path.samestat(found, linked):
                        raise CacheError(f"blob {digest.short()}: mount {mount_id[:8]} has another file of it")
                    if about.proof != _Proof(self._boot, found.st_ino, found.st_mtime_ns):
                        return None
                    return os.dup(fd)
            except OSError as exc:
                raise CacheError(f"blob {digest.short()}: mount {mount_id[:8]} has no proven file of it") from exc

    def seal(self, mount_id: str, files: Sequence[File]) -> list[Digest]:
        """Have a mount's model as plain files, to be shown as they are, unless there are blobs that must be hashed first, which
        are returned. Raises: CacheError while that cannot be.
        """
        with self._area(mount_id) as (_, in_use):
            if not in_use:
                raise CacheError(f"mount {mount_id[:8]}: has ended")
        return self._sealed.seal(mount_id, files)

    def _read_whole(self, mount_id: str, digest: Digest, size_bytes: int) -> bytes:
        """A small blob of a mount, hashed. Raises: CacheError, OSError."""
        content = b""
        if size_bytes:
            with self._segment(f"{mount_id}/{digest.path_name}", 0) as (fd, start):
                content = os.pread(fd, size_bytes, start)
        if len(content) != size_bytes or str(Digest.of(content, digest.algorithm)) != str(digest):
            raise CacheError(f"blob {digest.short()}: mount {mount_id[:8]} does not have it yet")
        return content

    def _hashed(self, digest: Digest) -> _Proof | None:
        """The proof that the blob is right; None when it is not, or was written to meanwhile."""
        about = self._about(digest)
        if about is None:
            return None
        hashes = _Hashes(digest)
        try:
            with _opened(self._blobs_fd, f"{digest.path_name}/{fmt.DATA_NAME}") as fd:
                before = os.fstat(fd)
                for piece in _pieces_of(fd, 0, about.size_bytes):
                    hashes.update(piece)
                found, block_hashes = hashes.finish()
                proof, unchanged = _Proof(self._boot, before.st_ino, before.st_mtime_ns), _same(before, os.fstat(fd))
            with _opened(self._blobs_fd, f"{digest.path_name}/{fmt.HASHES_NAME}") as fd:
                kept = os.pread(fd, len(block_hashes) + 1024, 0)
        except OSError:
            return None
        right = found == digest.hex and kept == fmt.pack_hashes(block_hashes)
        return proof if unchanged and right else None

    def entries(self) -> list[Entry]:
        """Everything that takes room. Areas that nobody uses any more give back their links on the way."""
        found: list[Entry] = []
        pins = self.pins()
        used: set[str] = set()
        with self._lock:
            for domain, mount_id in self._mounts():
                with self._area(mount_id, domain) as (area_fd, in_use):
                    if area_fd < 0:
                        continue
                    if in_use:
                        used.update(
                            name for name in os.listdir(area_fd) if _exists(area_fd, f"{name}/{fmt.HASHES_NAME}")
                        )
                        os.utime(area_fd)
                    elif not domain:
                        _drop_links(area_fd)
                        self._sealed.remove(mount_id)
                    size, last_used = _own_bytes(area_fd), os.fstat(area_fd).st_mtime
                    if not domain:
                        size += self._sealed.own_bytes(mount_id)
                    found.append(Entry(Kind.AREA, mount_id, size, last_used, in_use=in_use, domain=domain))
            for name in os.listdir(self._blobs_fd):
                if name.startswith((_HIDDEN, _PINS)):
                    continue
                if name in used:
                    os.utime(name, dir_fd=self._blobs_fd)
                status = os.stat(name, dir_fd=self._blobs_fd)
                size = _tree_bytes(self._blobs_fd, name)
                pinned = str(_digest_of(name)) in pins
                found.append(Entry(Kind.BLOB, name, size, status.st_mtime, in_use=name in used, pinned=pinned))
        return found

    def remove(self, entry: Entry) -> bool:
        """False when it is in use after all."""
        with self._lock:
            if entry.kind is Kind.BLOB:
                if self._is_used(entry.name) or str(_digest_of(entry.name)) in self.pins():
                    return False
                self._remove_blob(entry.name)
                return True
            with self._mounts_dir(entry.domain) as mounts_fd:
                with self._area(entry.name, entry.domain) as (area_fd, in_use):
                    if area_fd < 0 or in_use:
                        return False
                    gone = f"{_HIDDEN}{entry.name}"
                    os.rename(entry.name, gone, src_dir_fd=mounts_fd, dst_dir_fd=mounts_fd)
                _remove_tree(mounts_fd, gone)
                if not entry.domain:
                    self._sealed.remove(entry.name)
            return True

    def _is_used(self, name: str) -> bool:
        """Whether a mount has begun to use that blob; what it reads would stay, but no longer be shared."""
        for domain, mount_id in self._mounts():
            with self._area(mount_id, domain) as (area_fd, in_use):
                if area_fd >= 0 and in_use and _exists(area_fd, f"{name}/{fmt.HASHES_NAME}"):
                    return True
        return False

    def disk(self) -> Disk:
        """The file system the cache lies on."""
        status = os.fstatvfs(self._domain_fd)
        return Disk(status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize)

    def pins(self) -> dict[str, str]:
        """Digest → why."""
        try:
            with _opened(self._blobs_fd, _PINS) as fd:
                value = json.loads(os.pread(fd, 16 << 20, 0))
        except (OSError, ValueError):
            return {}
        return {str(digest): str(label) for digest, label in value.items()}

    def set_pins(self, pins: dict[str, str]) -> None:
        """Raises: OSError."""
        _write_whole(self._blobs_fd, _PINS, json.dumps(pins, sort_keys=True).encode())

    def size_of(self, digest: Digest) -> int | None:
        """Bytes of a proven blob."""
        about = self._about(digest)
        return about.size_bytes if about else None

    def _copy(self, source: str, work: str, digest: Digest, size_bytes: int) -> _Proof:
        hashes = _Hashes(digest)
        with _new(self._blobs_fd, f"{work}/{fmt.DATA_NAME}") as ours:
            for segment in range(-(-size_bytes // blocks.SEGMENT_BYTES)):
                first, length = segment * blocks.SEGMENT_BYTES, blocks.segment_length(size_bytes, segment)
                with self._segment(source, segment) as (theirs, start):
                    cloned = _clone(theirs, start, length, ours, first)
                    if not cloned:
                        os.posix_fallocate(ours, first, length)
                    done = first
                    for piece in _pieces_of(ours, first, length) if cloned else _pieces_of(theirs, start, length):
                        hashes.update(piece)
                        if not cloned:
                            _write_all(ours, piece, done)
                        done += len(piece)
                os.fsync(ours)
            made = os.fstat(ours)
        found, block_hashes = hashes.finish()
        if found != digest.hex:
            raise DigestMismatchError(
                f"blob {digest.short()}: its blocks hash to {digest.algorithm}:{found[:12]}; it is not shared. "
                "Either its block index is not that of the blob, or the cache was damaged: push the model again",
                expected=str(digest),
                actual=f"{digest.algorithm}:{found}",
                subject=str(digest),
            )
        _write_whole(self._blobs_fd, f"{work}/{fmt.HASHES_NAME}", fmt.pack_hashes(block_hashes), mode=_SHARED_FILE_MODE)
        return _Proof(self._boot, made.st_ino, made.st_mtime_ns)

    def _link(self, mount_id: str, digest: Digest) -> bool:
        """All or nothing for a reader: the hashes come last, and without them nothing counts."""
        target = f"{mount_id}/{digest.path_name}"
        try:
            for name in (fmt.DATA_NAME, fmt.HASHES_NAME):
                temporary = f"{target}/{_HIDDEN}{name}"
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary, dir_fd=self._mounts_fd)
                os.link(f"{digest.path_name}/{name}", temporary, src_dir_fd=self._blobs_fd, dst_dir_fd=self._mounts_fd)
                os.rename(temporary, f"{target}/{name}", src_dir_fd=self._mounts_fd, dst_dir_fd=self._mounts_fd)
                with contextlib.suppress(FileNotFoundError):  # rename of two names of one file leaves both
                    os.unlink(temporary, dir_fd=self._mounts_fd)
            os.utime(digest.path_name, dir_fd=self._blobs_fd)
        except OSError:  # the mount is gone, or its directory is not as it should be
            return False
        return True

    def _about(self, digest: Digest) -> _About | None:
        try:
            with _opened(self._blobs_fd, f"{digest.path_name}/{_ABOUT}") as fd:
                value = json.loads(os.pread(fd, 1 << 20, 0))
            proof = value.get("proof")
            return _About(
                int(value["size_bytes"]),
                tuple(map(str, value["origins"])),
                _Proof(str(proof["boot"]), int(proof["inode"]), int(proof["mtime_ns"])) if proof else None,
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _write_about(self, name: str, about: _About) -> None:
        _write_whole(self._blobs_fd, f"{name}/{_ABOUT}", json.dumps(asdict(about)).encode())

    def _add_origins(self, digest: Digest, about: _About, origins: Sequence[str]) -> None:
        merged = tuple(dict.fromkeys([*about.origins, *origins]))
        if merged != about.origins:
            self._write_about(digest.path_name, replace(about, origins=merged))

    @contextlib.contextmanager
    def _segment(self, directory: str, segment: int) -> Iterator[tuple[int, int]]:
        """A segment as the mount reads it: the file it is in, and where it begins there. Raises: OSError."""
        with contextlib.ExitStack() as stack:
            try:
                fd = stack.enter_context(_opened(self._mounts_fd, f"{directory}/{fmt.segment_name(segment)}"))
                start = 0
            except FileNotFoundError:
                fd = stack.enter_context(_opened(self._mounts_fd, f"{directory}/{fmt.DATA_NAME}"))
                start = segment * blocks.SEGMENT_BYTES
            yield fd, start

    def _remove_blob(self, name: str) -> None:
        gone = f"{_HIDDEN}gone-{name}"  # not the name under which it may just be made anew
        with contextlib.suppress(FileNotFoundError):
            os.rename(name, gone, src_dir_fd=self._blobs_fd, dst_dir_fd=self._blobs_fd)
        _remove_tree(self._blobs_fd, gone)

    def _other_domains(self) -> list[str]:
        if self._domains_fd < 0:
            return []
        own, found = os.fstat(self._domain_fd), []
        for name in os.listdir(self._domains_fd):
            with contextlib.suppress(OSError):  # it is being made
                if not os.path.samestat(os.stat(name, dir_fd=self._domains_fd), own):
                    found.append(name)
        return found

    def _mounts(self) -> Iterator[tuple[str, str]]:
        """The areas there are, as domain and mount id."""
        for domain in ("", *self._other_domains()):
            with contextlib.suppress(OSError), self._mounts_dir(domain) as mounts_fd:
                yield from ((domain, name) for name in os.listdir(mounts_fd) if not name.startswith(_HIDDEN))

    @contextlib.contextmanager
    def _mounts_dir(self, domain: str) -> Iterator[int]:
        """Raises: OSError."""
        if not domain:
            yield self._mounts_fd
            return
        fd = os.open(f"{domain}/mounts", _DIRECTORY, dir_fd=self._domains_fd)
        try:
            yield fd
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _area(self, mount_id: str, domain: str = "") -> Iterator[tuple[int, bool]]:
        """An open area and whether somebody uses it; while nobody does, nobody can begin to. -1 when it is gone."""
        try:
            with self._mounts_dir(domain) as mounts_fd:
                fd = os.open(mount_id, _DIRECTORY, dir_fd=mounts_fd)
        except OSError:
            yield -1, False
            return
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                in_use = not domain and self._sealed.is_shown(mount_id)
            except BlockingIOError:
                in_use = True
            yield fd, in_use
        finally:
            os.close(fd)


def parse_blobs(value: object) -> list[Blob]:
    """From JSON [[digest, size], …]. Raises: InvalidVolumeError, ValueError."""
    assert isinstance(value, list)
    return [(Digest.parse(str(digest)), int(size)) for digest, size in value]


def _digest_of(name: str) -> str:
    return name.replace("-", ":", 1)


def _clone(source_fd: int, start: int, length: int, target_fd: int, at: int) -> bool:
    """Share the extents of a range where the file system can (xfs, btrfs)."""
    try:
        fcntl.ioctl(target_fd, _FICLONERANGE, _CLONE_RANGE.pack(source_fd, start, length, at))
    except OSError:
        return False
    return True


class _Hashes:
    """Of a blob that comes in pieces, in order: its digest, and BLAKE3 of every block."""

    def __init__(self, digest: Digest) -> None:
        self._whole, self._block = digest.hasher(), hasher()
        self._block_bytes = 0
        self._done = bytearray()

    def update(self, piece: memoryview) -> None:
        """No piece reaches beyond the end of a block."""
        self._whole.update(piece)
        self._block.update(piece)
        self._block_bytes += len(piece)
        if self._block_bytes == blocks.BLOCK_BYTES:
            self._end_block()

    def finish(self) -> tuple[str, bytes]:
        """The digest in hexadecimal, and the hashes of the blocks one after the other."""
        if self._block_bytes:
            self._end_block()
        return self._whole.hexdigest(), bytes(self._done)

    def _end_block(self) -> None:
        self._done += self._block.digest()
        self._block, self._block_bytes = hasher(), 0


def _pieces_of(fd: int, first: int, length: int) -> Iterator[memoryview]:
    """`length` bytes of a file from `first`, in one buffer that a core's cache holds. Raises: OSError when it is shorter."""
    buffer = memoryview(mmap.mmap(-1, blocks.PIECE_BYTES))
    for start in range(first, first + length, blocks.PIECE_BYTES):
        view = buffer[: min(blocks.PIECE_BYTES, first + length - start)]
        done = 0
        while done < len(view):
            count = os.preadv(fd, [view[done:]], start + done)
            if count == 0:
                raise OSError(0, "a file is shorter than its blob")
            done += count
        yield view


def _same(one: os.stat_result, other: os.stat_result) -> bool:
    return (one.st_size, one.st_mtime_ns) == (other.st_size, other.st_mtime_ns)


def _write_all(fd: int, view: memoryview, offset: int) -> None:
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


@contextlib.contextmanager
def _opened(directory_fd: int, path: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory_fd)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _new(directory_fd: int, path: str) -> Iterator[int]:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(path, flags, _SHARED_FILE_MODE, dir_fd=directory_fd)
    try:
        yield fd
    finally:
        os.close(fd)


def _write_whole(directory_fd: int, path: str, content: bytes, mode: int = 0o644) -> None:
    """Whole or not at all, also after a crash of the machine."""
    temporary = f"{path}.new"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(temporary, flags, mode, dir_fd=directory_fd)
    with open(fd, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(fd)
    os.rename(temporary, path, src_dir_fd=directory_fd, dst_dir_fd=directory_fd)


def _exists(directory_fd: int, path: str) -> bool:
    try:
        os.stat(path, dir_fd=directory_fd, follow_symlinks=False)
    except OSError:
        return False
    return True


def _remove_tree(directory_fd: int, name: str) -> None:
    shutil.rmtree(name, dir_fd=directory_fd, ignore_errors=True)


def _drop_links(area_fd: int) -> None:
    """Forget proven blobs in an area that nobody uses: they are linked again when it is used again."""
    for name in os.listdir(area_fd):
        if _exists(area_fd, f"{name}/{fmt.HASHES_NAME}"):
            with _opened(area_fd, name) as fd:
                for file in os.listdir(fd):
                    if file in (fmt.DATA_NAME, fmt.HASHES_NAME, fmt.MAP_NAME) or fmt.is_segment(file):
                        os.unlink(file, dir_fd=fd)


def _own_bytes(area_fd: int) -> int:
    """What the area alone holds: files with one name."""
    return sum(status.st_blocks * 512 for status in _stats(area_fd, ".") if status.st_nlink == 1)


def _tree_bytes(directory_fd: int, name: str) -> int:
    return sum(status.st_blocks * 512 for status in _stats(directory_fd, name))


def _stats(directory_fd: int, name: str) -> Iterator[os.stat_result]:
    """Of every regular file below."""
    for _, _, files, fd in os.fwalk(name, dir_fd=directory_fd):
        for file in files:
            with contextlib.suppress(OSError):
                yield os.stat(file, dir_fd=fd, follow_symlinks=False)
