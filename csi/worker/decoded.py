"""Answers reads of files that lie in compressed layers; all others go on to the `CachedReader` as they are.

A layer is decoded by units of a few MiB. The ones used last stay in memory, so that the many small reads of one place cost
one decoding; the kernel's read-ahead asks for several at once, which are decoded side by side. A spooled layer is read from
its spool like any file.
"""

from __future__ import annotations

import logging
import mmap
import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import trio

from csi.errors import CacheError, ModelMountError
from csi.oci.archive import gzip, points, zstd
from csi.oci.archive.layer_index import Access, LayerIndex
from csi.oci.archive.points import Decoder, Unit
from csi.oci.archive.table import MemberTable
from csi.oci.descriptor import Descriptor
from csi.stream import blocks
from csi.tree.file_format import Tree
from csi.tree.model import Encoding, Entry
from csi.worker.layers import load_index, open_spool, points_of
from csi.worker.reader import CachedReader

_KEPT_BYTES = 96 * 1024 * 1024
"""Of decoded units: what 16 MiB of read-ahead need twice over, and the largest unit."""
_LARGEST_READ = 16 * 1024 * 1024
_DECODE_UNIT: dict[Encoding, Callable[[Unit, bytes, str], bytearray]] = {
    Encoding.GZIP: gzip.decode_unit,
    Encoding.ZSTD: zstd.decode_unit,
}


_DECODERS: dict[Encoding, Callable[[str], Decoder]] = {
    Encoding.GZIP: gzip.GzipDecoder,
    Encoding.ZSTD: zstd.ZstdDecoder,
}

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Layer:
    blob: int
    encoding: Encoding
    index: LayerIndex
    spool_fd: int  # -1: decoded by units


class DecodingReader:
    """Implements `csi.fuse.port.ContentReader` around a `CachedReader`, whose counters it shares."""

    def __init__(self, tree: Tree, area_fd: int, cached: CachedReader) -> None:
        self._tree, self._area_fd, self._cached = tree, area_fd, cached
        self._encoded = {position for position, blob in enumerate(tree.blobs) if blob.encoding is not Encoding.IDENTITY}
        self._layers: dict[int, _Layer] = {}
        self._opening = trio.Lock()
        self._units: OrderedDict[tuple[int, int], bytearray] = OrderedDict()
        self._kept_bytes = 0
        self._decoding: dict[tuple[int, int], trio.Event] = {}
        self._limit = trio.CapacityLimiter(max(1, len(os.sched_getaffinity(0))))

    def read_now(self, entry: Entry, offset: int, size: int) -> memoryview | None:
        """See `ContentReader.read_now`. What has to be decoded waits."""
        return None if entry.blob in self._encoded else self._cached.read_now(entry, offset, size)

    def refuse(self, entry: Entry, offset: int, size: int, error: ModelMountError) -> None:
        """See `ContentReader.refuse`."""
        if entry.blob in self._encoded:
            self._cached.note_failed(entry, error)
        else:
            self._cached.refuse(entry, offset, size, error)

    async def read(self, entry: Entry, offset: int, size: int) -> memoryview:
        """See `ContentReader.read`."""
        if entry.blob not in self._encoded:
            return await self._cached.read(entry, offset, size)
        length = min(size, entry.size_bytes - offset, _LARGEST_READ)
        if length <= 0:
            return memoryview(b"")
        counters = self._cached.counters
        counters["reads"] += 1
        try:
            layer = self._layers.get(entry.blob) or await self._open(entry.blob)
            view = await self._read_layer(layer, entry.blob_offset + offset, length)
        except ModelMountError as exc:
            self._cached.note_failed(entry, exc)
            raise
        counters["read_bytes"] += length
        return view

    async def _read_layer(self, layer: _Layer, start: int, length: int) -> memoryview:
        if layer.spool_fd >= 0:
            return await trio.to_thread.run_sync(_read_spool, layer.spool_fd, start, length)
        index = layer.index
        number = points.unit_at(index.points, start)
        unit = self._unit(layer, number)
        content = await self._content(layer, number, unit)
        at = start - unit.point.decoded
        if at + length <= unit.length:
            return memoryview(content)[at : at + length]
        whole = bytearray(memoryview(content)[at:])
        while len(whole) < length:
            number += 1
            unit = self._unit(layer, number)
            content = await self._content(layer, number, unit)
            whole += memoryview(content)[: length - len(whole)]
        return memoryview(whole)

    def _unit(self, layer: _Layer, number: int) -> Unit:
        index = layer.index
        return points.unit(index.points, number, index.decoded_bytes, index.encoded_bytes)

    async def _content(self, layer: _Layer, number: int, unit: Unit) -> bytearray:
        key = (layer.blob, number)
        while key in self._decoding:
            await self._decoding[key].wait()
        if (kept := self._units.get(key)) is not None:
            self._units.move_to_end(key)
            return kept
        self._decoding[key] = trio.Event()
        try:
            encoded = await self._cached.read_stored(layer.blob, unit.start, unit.end - unit.start)
            what = f"layer {self._tree.blobs[layer.blob].digest.short()}"
            content = await trio.to_thread.run_sync(
                _DECODE_UNIT[layer.encoding], unit, encoded, what, limiter=self._limit
            )
        finally:
            self._decoding.pop(key).set()
        self._units[key] = content
        self._kept_bytes += len(content)
        while self._kept_bytes > _KEPT_BYTES and len(self._units) > 1:
            self._kept_bytes -= len(self._units.popitem(last=False)[1])
        return content

    async def _open(self, blob: int) -> _Layer:
        async with self._opening:
            if blob not in self._layers:
                layer = await trio.to_thread.run_sync(self._load, blob)
                self._layers[blob] = layer if layer is not None else await self._rebuilt(blob)
            return self._layers[blob]

    async def _rebuilt(self, blob: int) -> _Layer:
        """The index is gone: made anew from the whole layer, in memory, as this process may write nothing.

        Raises: CacheError for a layer that needs a spool: only another publish makes that.
        """
        spec = self._tree.blobs[blob]
        what = f"layer {spec.digest.short()}"
        log.warning("%s: its index is missing from the cache or damaged; the layer is read once more", what)
        decoder = _DECODERS[spec.encoding](what)
        for at in range(0, spec.size_bytes, blocks.BLOCK_BYTES):
            piece = await self._cached.read_stored(blob, at, min(blocks.BLOCK_BYTES, spec.size_bytes - at))
            await trio.to_thread.run_sync(decoder.feed, memoryview(piece), _ignore, limiter=self._limit)
        decoder.finish()
        points = points_of(decoder)
        if points is None or decoder.decoded_bytes != spec.decoded_bytes:
            raise CacheError(
                f"{what}: its decoded copy is missing from the cache or damaged; unpublish the volume and publish it again"
            )
        index = LayerIndex(Access.POINTS, spec.size_bytes, decoder.decoded_bytes, MemberTable(), points)
        return _Layer(blob, spec.encoding, index, -1)

    def _load(self, blob: int) -> _Layer | None:
        """None when the layer's index is gone."""
        spec = self._tree.blobs[blob]
        descriptor = Descriptor("", spec.digest, spec.size_bytes)
        index = load_index(self._area_fd, descriptor)
        usable = index is not None and index.access in (Access.POINTS, Access.SPOOL)
        if index is None or not usable or index.decoded_bytes != spec.decoded_bytes:
            return None
        spool_fd = open_spool(self._area_fd, descriptor) if index.access is Access.SPOOL else -1
        return _Layer(blob, spec.encoding, index, spool_fd)


def _ignore(data: memoryview) -> None:
    """Only the places to start at are wanted."""


def _read_spool(fd: int, start: int, length: int) -> memoryview:
    """In a thread: a page fault must not hold up the other readers."""
    buffer = memoryview(mmap.mmap(-1, length))
    done = 0
    while done < length:
        try:
            count = os.preadv(fd, [buffer[done:]], start + done)
        except OSError as exc:
            raise CacheError(f"spool read failed: {exc.strerror}") from exc
        if count == 0:
            raise CacheError("a spool is shorter than its layer; unpublish the volume and publish it again")
        done += count
    return buffer
