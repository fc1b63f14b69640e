"""Finds out what is in an archive layer, with as few bytes as its packing allows.

    tar        headers by small ranges, hop by hop; nothing is kept but the index
    tar+gzip   read once from the cache while it is being filled; the index has the places to start in the middle
    tar+zstd   the same, where its frames are small enough to be entered; else decoded once into a spool file

What was found is kept as an index beside the blob, and used without reading the layer when it is there.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from csi.cache import format as fmt
from csi.cache.blob import BlobReader
from csi.cache.format import BlobState
from csi.errors import CacheError, ContentError
from csi.oci.archive import layer_index, tar
from csi.oci.archive.gzip import GzipDecoder
from csi.oci.archive.layer_index import Access, LayerIndex
from csi.oci.archive.member import Member, MemberKind
from csi.oci.archive.points import MAX_UNIT_BYTES, AccessPoint, Decoder, check_ratio
from csi.oci.archive.stream import TarStream
from csi.oci.archive.table import MemberTable
from csi.oci.archive.zstd import ZstdDecoder
from csi.oci.descriptor import Descriptor
from csi.oci.formats.plan import Packing
from csi.stream import blocks
from csi.worker.build_channel import BuildChannel

FIRST_BYTES = 64 * 1024
"""What is read first of an archive, and all that is looked at to tell one from a file."""
_LARGEST_WINDOW_BYTES = 1024 * 1024
_AHEAD_BLOCKS = 8
_SPOOL_STEP_BYTES = 32 * 1024 * 1024
_DECODERS: dict[Packing, Callable[[str], Decoder]] = {Packing.TAR_GZIP: GzipDecoder, Packing.TAR_ZSTD: ZstdDecoder}


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """A layer to be looked into. `blob` is its position in what the build channel fetches, -1 when it is not among them
    (then its headers are read by ranges).
    """

    descriptor: Descriptor
    packing: Packing
    blob: int
    what: str
    origin: str = ""


class LayerScanner:
    """`on_bytes(layer, done)` hears how many of the blob's bytes have been worked through."""

    def __init__(self, area_fd: int, channel: BuildChannel, on_bytes: Callable[[LayerFacts, int], None]) -> None:
        self._area_fd, self._channel, self._on_bytes = area_fd, channel, on_bytes

    def settle_file(self, layer: LayerFacts, found: MemberTable) -> None:
        """Keep what was taken for the first member of a layer that is a file, to look at again once it is verified."""
        size = layer.descriptor.size_bytes
        kept = LayerIndex(Access.FILE, size, size, found)
        self._channel.keep_index(layer.descriptor, layer_index.dump(kept), spooled=False)

    def scan(self, layer: LayerFacts) -> LayerIndex:
        """The layer's index, kept from now on. Raises: what `tar.scan`, the decoders and the registry raise."""
        found = self._scan_tar(layer) if layer.packing is Packing.TAR else self._scan_compressed(layer)
        if found.access is not Access.SPOOL:
            self._channel.keep_index(layer.descriptor, layer_index.dump(found), spooled=False)
        self._on_bytes(layer, layer.descriptor.size_bytes)
        return found

    def first_member(self, layer: LayerFacts) -> MemberTable:
        """The name of the first member, from the first bytes of the blob; empty when they are no archive. Only of a layer that
        is fetched (`blob` is not -1) are they verified.
        """
        length = min(FIRST_BYTES, layer.descriptor.size_bytes)
        if not length:
            return MemberTable()
        read = self._read_blocks(layer) if layer.blob >= 0 else self._read_range(layer)
        return first_member_in(read(0, length), layer.packing, layer.what)

    def _scan_tar(self, layer: LayerFacts) -> LayerIndex:
        size = layer.descriptor.size_bytes
        cached = open_complete(self._area_fd, layer.descriptor)
        if cached is not None:
            members = tar.members_of(lambda at, length: read_cached(cached, at, length), size, layer.what)
        else:
            window = _Window(self._read_blocks(layer) if layer.blob >= 0 else self._read_range(layer), size)

            def read(offset: int, length: int) -> bytes | memoryview:
                self._on_bytes(layer, offset)
                return window.read(offset, length)

            members = tar.members_of(read, size, layer.what)
        return LayerIndex(Access.DIRECT, size, size, members)

    def _read_range(self, layer: LayerFacts) -> Callable[[int, int], bytes]:
        return lambda offset, length: self._channel.read_range(layer.descriptor, offset, length, layer.origin)

    def _read_blocks(self, layer: LayerFacts) -> Callable[[int, int], bytes]:
        """Through the cache, where a block is only after it was verified."""

        def read(offset: int, length: int) -> bytes:
            for block in blocks.blocks_of(offset, length):
                self._channel.await_block(layer.blob, block, 0)
            reader = BlobReader.open(self._area_fd, layer.descriptor.digest, layer.descriptor.size_bytes)
            try:
                return read_cached(reader, offset, length)
            finally:
                reader.close()

        return read

    def _scan_compressed(self, layer: LayerFacts) -> LayerIndex:
        """Once; a second time, from the cache then, when it turns out that it must be spooled."""
        found = self._decode(layer, spool_fd=None)
        if found is None:
            spool_fd = self._channel.open_spool(layer.descriptor)
            try:
                found = self._decode(layer, spool_fd)
            finally:
                os.close(spool_fd)
            assert found is not None
        self._channel.await_verified(layer.blob)
        if found.access is Access.SPOOL:
            self._channel.keep_index(layer.descriptor, layer_index.dump(found), spooled=True)
        return found

    def _decode(self, layer: LayerFacts, spool_fd: int | None) -> LayerIndex | None:
        """None when there are bytes that could only be reached by decoding too much each time."""
        decoder = _DECODERS[layer.packing](layer.what)
        size = layer.descriptor.size_bytes
        stream = TarStream(layer.what)

        room_bytes = 0

        def sink(data: memoryview) -> None:
            nonlocal room_bytes
            check_ratio(decoder.decoded_bytes, size, layer.what)
            stream.feed(data)
            if spool_fd is not None:
                if room_bytes < len(data):
                    wanted = max(len(data), _SPOOL_STEP_BYTES)
                    self._channel.take_room(wanted)
                    room_bytes += wanted
                room_bytes -= len(data)
                _write_all(spool_fd, data)

        for data in self._whole_blob(layer):
            decoder.feed(data, sink)
            last = decoder.points[-1].decoded if decoder.points else 0
            if spool_fd is None and decoder.decoded_bytes - last > MAX_UNIT_BYTES:
                return None
        decoder.finish()
        members = stream.finish()
        if spool_fd is not None:
            return LayerIndex(Access.SPOOL, size, decoder.decoded_bytes, members)
        points = points_of(decoder)
        return None if points is None else LayerIndex(Access.POINTS, size, decoder.decoded_bytes, members, points)

    def _whole_blob(self, layer: LayerFacts) -> Iterator[memoryview]:
        size = layer.descriptor.size_bytes
        reader: BlobReader | None = None
        buffer = memoryview(bytearray(_LARGEST_WINDOW_BYTES))
        for block in range(blocks.block_count(size)):
            self._channel.await_block(layer.blob, block, _AHEAD_BLOCKS)
            if reader is None:
                reader = BlobReader.open(self._area_fd, layer.descriptor.digest, size)
            at, end = block * blocks.BLOCK_BYTES, block * blocks.BLOCK_BYTES + blocks.block_length(size, block)
            while at < end:
                piece = buffer[: min(len(buffer), end - at)]
                _read_into(reader, piece, at)
                at += len(piece)
                yield piece
            self._on_bytes(layer, end)
        if reader is not None:
            reader.close()


def first_member_in(prefix: bytes, packing: Packing, what: str) -> MemberTable:
    """Of the first bytes of a blob; empty when they are no archive of that packing."""
    table = MemberTable()
    plain = bytearray()
    try:
        if decoder_class := _DECODERS.get(packing):
            decoder_class(what).feed(prefix, plain.extend)
        else:
            plain += prefix
        tar.drive(tar.scan(what, table), lambda offset, length: bytes(plain[offset : offset + length]))
    except ContentError:
        pass  # cut off after the prefix, or no archive at all
    first = MemberTable()
    if len(table):
        first.append(Member(table[0].path, MemberKind.FILE, 0, 0))
    return first


class _Window:
    """Reads ahead a little, more where headers lie close together: a registry answers 64 KiB and 1 MiB alike."""

    def __init__(self, read: Callable[[int, int], bytes], size_bytes: int) -> None:
        self._read, self._size = read, size_bytes
        self._start, self._data = 0, b""
        self._length = FIRST_BYTES

    def read(self, offset: int, length: int) -> memoryview:
        at = offset - self._start
        if not (at >= 0 and at + length <= len(self._data)):
            near = 0 <= at < 2 * self._length and self._data
            self._length = min(self._length * 2, _LARGEST_WINDOW_BYTES) if near else FIRST_BYTES
            self._start = offset
            self._data = self._read(offset, min(max(length, self._length), self._size - offset))
            at = 0
        return memoryview(self._data)[at : at + length]


def points_of(decoder: Decoder) -> list[AccessPoint] | None:
    """Where decoding can start, of a decoder that has finished; None where too much would have to be decoded each time."""
    points = [point for point in decoder.points if point.decoded < decoder.decoded_bytes]
    ends = [*(point.decoded for point in points), decoder.decoded_bytes]
    return None if any(end - start > MAX_UNIT_BYTES for start, end in pairwise(ends)) else points


def open_complete(area_fd: int, descriptor: Descriptor) -> BlobReader | None:
    """The blob's cache when all of it is there and known to be right."""
    try:
        reader = BlobReader.open(area_fd, descriptor.digest, descriptor.size_bytes)
    except CacheError:
        return None
    if reader.state is BlobState.VERIFIED:
        return reader
    reader.close()
    return None


def read_cached(reader: BlobReader, offset: int, length: int) -> bytes:
    """Bytes that are in the cache. Raises: CacheError."""
    data = bytearray(length)
    _read_into(reader, memoryview(data), offset)
    return bytes(data)


def load_index(area_fd: int, descriptor: Descriptor) -> LayerIndex | None:
    """The kept index of a layer, checked; None when there is none that can be used."""
    try:
        path = fmt.layer_index_path(descriptor.digest)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=area_fd)
    except OSError:
        return None
    try:
        data = mmap.mmap(fd, os.fstat(fd).st_size, prot=mmap.PROT_READ)
        found = layer_index.load(memoryview(data), descriptor.size_bytes)
    except (OSError, ValueError, ContentError):
        return None
    finally:
        os.close(fd)
    if found.access is Access.SPOOL:
        try:
            spool_fd = open_spool(area_fd, descriptor)
        except CacheError:
            return None
        try:
            if os.fstat(spool_fd).st_size != found.decoded_bytes:
                return None
        finally:
            os.close(spool_fd)
    return found


def open_spool(area_fd: int, descriptor: Descriptor) -> int:
    """The decoded form of a layer. Raises: CacheError."""
    try:
        path = fmt.spool_path(descriptor.digest)
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=area_fd)
    except OSError as exc:
        raise CacheError(f"the spool of {descriptor.digest.short()} cannot be opened: {exc.strerror}") from exc


def _read_into(reader: BlobReader, buffer: memoryview, offset: int) -> None:
    while buffer:
        wanted = min(len(buffer), blocks.SEGMENT_BYTES - offset % blocks.SEGMENT_BYTES)
        try:
            count = reader.read_into([buffer[:wanted]], offset)
        except OSError as exc:
            raise CacheError(f"cache read failed: {exc.strerror}") from exc
        if count == 0:
            raise CacheError("a cache file is shorter than its blob")
        buffer, offset = buffer[count:], offset + count


def _write_all(fd: int, data: memoryview) -> None:
    try:
        while data:
            data = data[os.write(fd, data) :]
    except OSError as exc:
        raise CacheError(
            f"a spool file cannot be written: {exc.strerror}; make room in the cache's file system"
        ) from exc
