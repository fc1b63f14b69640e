"""What a worker needs of the registry before there is a tree: headers, configs, and layers that must be read whole.

The worker has a channel of its own for this; each message there has an id, and one reply:

    range     the bytes of a range, in a memfd. Not verified, not kept
    whole     a small blob, verified
    fetch     once: the blobs that are read block by block. They come in that order, and are kept
    block     answered when the block is in the cache, where the worker reads it; it asks again after a while
    verified  answered when the blob is known to be right
    spool     an empty file for the decoded form of a blob, to be written by the worker
    room      before so many bytes of it are written: refused when the cache has no room
    keep      the layer index of a blob, stored beside it as it is; with `spooled`, the spool stays too

What is stored here nobody but a worker of the same mount reads, and it checks it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from csi.cache import format as fmt
from csi.cache.allowance import Allowance
from csi.cache.blob import BlobWriter, make_directory
from csi.cache.format import BlobState
from csi.control import wire
from csi.errors import (
    CacheError,
    ControlError,
    DigestMismatchError,
    ModelMountError,
    RegistryError,
    SizeMismatchError,
)
from csi.fetcher.answers import Answers
from csi.fetcher.engine import EngineSettings, FetchEngine
from csi.fetcher.opening import open_blobs, read_specs
from csi.fetcher.origins import Origins
from csi.integrity.index import BlockIndex
from csi.oci.digest import Digest, wrong_bytes
from csi.stream.scheduler import Priority
from csi.tree.model import BlobSpec

log = logging.getLogger(__name__)

_MAX_RANGE_BYTES = 16 * 1024 * 1024
_MAX_INDEX_BYTES = 4 * 1024 * 1024 * 1024
_PARALLEL_RANGES = 8
_PATIENCE_S = 30.0  # with a registry that answers badly; then the worker gives up, and the publish is tried again
_FIRST_DELAY_S = 0.2
_TRIES_OF_WRONG_BLOBS = 3


class BuildService:
    """Serves one channel until it ends. Where a blob has several sources they are asked in turn; `index` are the block
    hashes, where bytes must be verified before they are used.
    """

    def __init__(
        self,
        channel: socket.socket,
        origins: Callable[[], Origins],
        area_fd: int,
        settings: EngineSettings,
        index: BlockIndex | None,
        on_wrong: Callable[[ModelMountError], None],
        allowance: Allowance,
    ) -> None:
        self._channel, self._origins, self._area_fd = channel, origins, area_fd
        self._settings, self._index, self._on_wrong = settings, index, on_wrong
        self._allowance = allowance
        self._answers = Answers(channel, "the build's worker")
        self._pool = ThreadPoolExecutor(_PARALLEL_RANGES, thread_name_prefix="range")
        self._specs: list[BlobSpec] = []
        self._writers: list[BlobWriter] = []
        self._engine: FetchEngine | None = None
        self._lock = threading.Lock()
        self._waiting: dict[tuple[int, int], list[wire.Message]] = {}
        self._spools: dict[Digest, str] = {}
        self._room_bytes = 0  # for spools: what the worker will write, or has written
        self._thread = threading.Thread(target=self._run, daemon=True, name="build")

    def start(self) -> None:
        """Serve in a thread."""
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether its channel is open."""
        return self._thread.is_alive()

    def use_origins(self, origins: Origins) -> None:
        """Other sources, or the same with other credentials."""
        if self._engine is not None:
            self._engine.use_sources(origins.for_blobs(self._specs))

    def stop(self) -> None:
        """End the channel; the thread ends with it. What was half made is gone when this returns."""
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)
        self._remove_spools()

    def _remove_spools(self) -> None:
        while self._spools:
            with contextlib.suppress(KeyError, OSError):  # the other thread may have been quicker
                os.unlink(self._spools.popitem()[1], dir_fd=self._area_fd)

    def _run(self) -> None:
        try:
            while (received := wire.recv(self._channel)) is not None:
                self._handle(*received)
        except (OSError, ControlError) as exc:
            log.warning("build channel: %s", exc)
        finally:
            if self._engine is not None:
                self._engine.stop()
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._remove_spools()
            self._allowance.landed(self._room_bytes)
            self._channel.close()

    def _handle(self, request: wire.Message, fds: list[int]) -> None:
        with self._answers.failures_of(request):
            match request.get("op"):
                case "fetch":
                    self._start_engine(wire.exactly(fds, 1)[0])
                    self._answers.ok(request)
                case "range":
                    self._pool.submit(self._answered, self._range, request)
                case "whole":
                    self._pool.submit(self._answered, self._whole, request)
                case "verified":
                    threading.Thread(target=self._answered, args=(self._verified, request), daemon=True).start()
                case "block":
                    self._block(request)
                case "spool":
                    self._spool(request)
                case "room":
                    size_bytes = wire.field(request, "size_bytes", int)
                    self._allowance.take(size_bytes)
                    self._room_bytes += size_bytes
                    self._answers.ok(request)
                case "keep":
                    self._keep(request, wire.exactly(fds, 1)[0])
                case other:
                    wire.close_all(fds)
                    raise ControlError(f"fetcher: unknown build operation {other!r}")

    def _answered(self, work: Callable[[wire.Message], None], request: wire.Message) -> None:
        with self._answers.failures_of(request):
            work(request)

    def _start_engine(self, specs_fd: int) -> None:
        listed = read_specs(specs_fd)
        if self._engine is not None:
            raise ControlError("fetcher: the build's blobs are being fetched already")
        self._specs = listed
        opened = open_blobs(self._area_fd, listed, self._index, self._allowance)
        if opened.trouble is not None:  # what the worker reads it reads from the cache
            raise opened.trouble
        self._writers = opened.writers
        self._engine = FetchEngine(
            self._origins().for_blobs(self._specs),
            self._specs,
            self._writers,
            self._settings,
            on_block=lambda blob, block: self._answer_block(blob, block, None),
            on_failed=self._answer_block,
            on_wrong=self._on_wrong,
            hashes=opened.hashes,
        )
        self._engine.start()

    def _position(self, request: wire.Message) -> int:
        position = wire.field(request, "blob", int)
        if self._engine is None or not 0 <= position < len(self._specs):
            raise ControlError(f"fetcher: the build fetches no blob {position}")
        return int(position)

    def _range(self, request: wire.Message) -> None:
        spec = _spec(request)
        offset, length = wire.field(request, "offset", int), wire.field(request, "length", int)
        if self._index is not None:
            raise ControlError("fetcher: with 'verify: chunk' only verified blocks are read")
        if not (offset >= 0 and 0 < length <= _MAX_RANGE_BYTES and offset + length <= spec.size_bytes):
            raise ControlError(f"fetcher: range {offset}+{length} of a blob of {spec.size_bytes} bytes")
        self._answers.ok_with(request, "range", self._fetch(spec, offset, length))

    def _whole(self, request: wire.Message) -> None:
        spec = _spec(request)
        if spec.size_bytes > _MAX_RANGE_BYTES:
            raise SizeMismatchError(
                f"blob {spec.digest.short()}: {spec.size_bytes} bytes are too many to be read whole"
            )
        data = self._fetch(spec, 0, spec.size_bytes) if spec.size_bytes else bytearray()
        _check_whole(spec, data)
        self._answers.ok_with(request, "range", data)

    def _fetch(self, spec: BlobSpec, offset: int, length: int) -> bytearray:
        """Raises: the last error, when it is final or none of the sources has delivered for `_PATIENCE_S`; for a whole blob
        also DigestMismatchError, when nobody who was asked has the right one.
        """
        data = bytearray(length)
        deadline, tries, wrong = time.monotonic() + _PATIENCE_S, 0, 0
        while True:
            sources = self._origins().of(spec.origin)
            source = sources[tries % len(sources)]
            tries += 1
            try:
                reader = source.open_range(spec.digest, spec.size_bytes, offset, length)
                try:
                    reader.readinto(memoryview(data))
                    if length == spec.size_bytes:
                        try:
                            _check_whole(spec, data)
                        except DigestMismatchError:
                            reader.reject()
                            wrong += 1
                            if wrong < _TRIES_OF_WRONG_BLOBS:
                                continue
                            raise
                finally:
                    reader.close()
                return data
            except RegistryError as exc:
                delay = float(exc.fields.get("retry_after_s", min(5.0, _FIRST_DELAY_S * 2**tries)))
                if tries < len(sources):
                    continue
                if not exc.retryable or time.monotonic() + delay > deadline:
                    raise
            time.sleep(delay)

    def _block(self, request: wire.Message) -> None:
        """A block, and `ahead` more that will be asked for next."""
        blob, block, ahead = (
            self._position(request),
            wire.field(request, "block", int),
            wire.field(request, "ahead", int),
        )
        if not 0 <= block < self._writers[blob].block_count:
            raise ControlError(f"fetcher: blob {blob} of the build has no block {block}")
        if self._writers[blob].state is BlobState.POISONED:
            raise self._poisoned(blob)
        with self._lock:
            self._waiting.setdefault((blob, block), []).append(request)
        assert self._engine is not None
        self._engine.want(blob, block, 1, Priority.DEMAND)
        if ahead > 0:
            self._engine.want(blob, block + 1, ahead, Priority.AHEAD)

    def _answer_block(self, blob: int, block: int, error: ModelMountError | None) -> None:
        with self._lock:
            requests = self._waiting.pop((blob, block), ())
        for request in requests:
            self._answers.say(wire.failed(request, error) if error is not None else wire.ok(request))

    def _verified(self, request: wire.Message) -> None:
        """Polled: the state is one byte in memory, and a layer is read but once."""
        blob = self._position(request)
        writer = self._writers[blob]
        if self._index is not None or writer.hashes is not None:  # every block was checked before it was read
            self._answers.ok(request)
            return
        while self._channel.fileno() >= 0:
            if writer.state is BlobState.VERIFIED:
                self._answers.ok(request)
                return
            if writer.state is BlobState.POISONED:
                raise self._poisoned(blob)
            time.sleep(0.02)

    def _poisoned(self, blob: int) -> DigestMismatchError:
        digest = self._specs[blob].digest
        return DigestMismatchError(
            f"layer {digest.short()}: the registry sent bytes that do not hash to its digest; check the registry's "
            "storage, or push the model again",
            expected=str(digest),
            subject=str(digest),
        )

    def _spool(self, request: wire.Message) -> None:
        digest = _spec(request).digest
        path = fmt.spool_path(digest, partial=True)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path, dir_fd=self._area_fd)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            spool_fd = os.open(path, flags, fmt.FILE_MODE, dir_fd=self._area_fd)
        except OSError as exc:
            raise CacheError(f"a spool file cannot be made in the cache: {exc.strerror}") from exc
        self._spools[digest] = path
        try:
            self._answers.ok(request, [spool_fd])
        finally:
            os.close(spool_fd)

    def _keep(self, request: wire.Message, index_fd: int) -> None:
        """The spool is durable before the index, which says that it is complete."""
        digest = _spec(request).digest
        path = fmt.layer_index_path(digest)
        try:
            make_directory(self._area_fd, digest)
            if request.get("spooled"):
                partial = self._spools[digest]
                _sync(partial, self._area_fd)
                os.rename(partial, fmt.spool_path(digest), src_dir_fd=self._area_fd, dst_dir_fd=self._area_fd)
                del self._spools[digest]
            _store(index_fd, path, self._area_fd)
        except OSError as exc:
            raise CacheError(f"a layer's index cannot be kept: {exc.strerror}") from exc
        finally:
            os.close(index_fd)
        self._answers.ok(request)


def _check_whole(spec: BlobSpec, data: bytearray) -> None:
    """Raises: DigestMismatchError."""
    found = Digest.of(memoryview(data), spec.digest.algorithm)
    if found != spec.digest:
        raise wrong_bytes(
            f"blob {spec.digest.short()}", spec.digest, found, spec.size_bytes, "nothing of them was used"
        )


def _spec(request: wire.Message) -> BlobSpec:
    return BlobSpec(
        Digest.parse(wire.field(request, "digest", str)),
        wire.field(request, "size", int),
        origin=wire.field(request, "origin", str),
    )


def _sync(path: str, area_fd: int) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=area_fd)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _store(content_fd: int, path: str, area_fd: int) -> None:
    """A copy of a memfd, whole or not at all."""
    size = os.fstat(content_fd).st_size
    if size > _MAX_INDEX_BYTES:
        raise CacheError(f"a layer's index of {size} bytes is not kept")
    temporary = f"{path}.part"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(temporary, flags, fmt.FILE_MODE, dir_fd=area_fd)
    try:
        at = 0
        while at < size:
            at += os.sendfile(fd, content_fd, at, size - at)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(temporary, path, src_dir_fd=area_fd, dst_dir_fd=area_fd)
