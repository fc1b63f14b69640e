"""A model looked at from the command line: its manifest, plan and tree, read in this process, nothing kept.

The decisions are those of a mount (`csi.oci.formats`, `csi.tree.assemble`); only the reading is simpler: one thread, no
cache. Of archives that are not compressed the headers are read by small ranges; compressed ones can only be read whole.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

from csi.cli import login
from csi.cli.sizes import size_text
from csi.credentials import Credentials
from csi.errors import ContentError, DigestMismatchError, InvalidVolumeError, SizeMismatchError, UnsupportedModelError
from csi.oci.archive import tar
from csi.oci.archive.gzip import GzipDecoder
from csi.oci.archive.points import Decoder, check_ratio
from csi.oci.archive.stream import TarStream
from csi.oci.archive.table import MemberTable
from csi.oci.archive.zstd import ZstdDecoder
from csi.oci.descriptor import Descriptor
from csi.oci.digest import Digest
from csi.oci.formats import index, kitops
from csi.oci.formats.detect import MAX_CONFIG_BYTES, needs_config, plan_of
from csi.oci.formats.plan import LayerPlan, ModelPlan, Packing
from csi.oci.manifest import Index, IndexEntry, Manifest, parse
from csi.oci.reference import Reference
from csi.oci.view import View
from csi.registry.address_rules import AddressRules
from csi.registry.sources import SourceSettings, open_source
from csi.stream.ports import ManifestBytes, ModelSource
from csi.tree.assemble import assemble
from csi.tree.model import TreeContent

_TIMEOUT_S = 30.0
READ_LIMIT_BYTES = 1_000_000_000
"""Of compressed layers, for a list; a minute at a usual connection's speed."""
_READ_BYTES = 256 * 1024  # one request for headers that lie close together
_PIECE_BYTES = 256 * 1024
_FIRST_BYTES = 64 * 1024  # the first header, after whatever extended headers it has
_MAX_SHOWN = 8
_DECODERS: dict[Packing, Callable[[str], Decoder]] = {Packing.TAR_GZIP: GzipDecoder, Packing.TAR_ZSTD: ZstdDecoder}


def add_source_flags(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """The reference, and how to reach its registry."""
    parser.add_argument(
        "reference",
        metavar="REFERENCE",
        nargs="?" if optional else None,
        help="registry/repository:tag, …@sha256:…, or oci-layout:/directory[:tag]",
    )
    parser.add_argument("--plain-http", action="store_true", help="speak plain HTTP (loopback registries need no flag)")
    login.add_flags(parser)
    login.add_hosts_flag(parser)


@dataclass(slots=True)
class FoundModel:
    """What a reference names. `manifest` is None while an index leaves open which of its entries is the model; then
    `undecided` says why.
    """

    reference: Reference
    root: ManifestBytes
    index: Index | None = None
    chosen: IndexEntry | None = None
    undecided: UnsupportedModelError | None = None
    manifest_bytes: ManifestBytes | None = None
    manifest: Manifest | None = None
    parents: list[str] = field(default_factory=list)


class ModelFinder:
    """Reads one reference. Use `open_finder`."""

    def __init__(self, args: argparse.Namespace, reference: Reference) -> None:
        self._args = args
        self.credentials = login.credentials_of(args, reference)
        self._reference = reference
        self._sources: dict[str, ModelSource] = {}
        self.source = self._source(reference)

    def find(self, variant: str) -> FoundModel:
        """The manifest, through an index where there is one.

        Raises: what the registry answers; UnsupportedModelError for what is no model.
        """
        root = self.source.fetch_manifest(self._reference.tag, self._reference.digest, _TIMEOUT_S)
        found = FoundModel(self._reference, root)
        here, parsed = root, parse(root.data, root.media_type)
        if variant and isinstance(parsed, Manifest):
            raise UnsupportedModelError(f"{self._reference}: is a single model, not an index; leave out the variant")
        for _ in range(index.MAX_DEPTH):
            if isinstance(parsed, Manifest):
                found.manifest_bytes, found.manifest = here, parsed
                return found
            found.index = found.index or parsed
            try:
                entry = index.pick(parsed, variant, index.platform_of(platform.system(), platform.machine()))
            except UnsupportedModelError as exc:
                found.undecided = exc
                return found
            found.chosen = found.chosen or entry
            here = self.source.fetch_manifest(None, entry.descriptor.digest, _TIMEOUT_S)
            parsed, variant = parse(here.data, here.media_type), ""
        raise UnsupportedModelError(f"{self._reference}: more than {index.MAX_DEPTH} indexes lie in each other")

    def plan(self, found: FoundModel) -> ModelPlan:
        """What the model's manifest gives to a tree, its parents' layers included; fills in `found.parents`."""
        assert found.manifest is not None
        plan = self._plan_of(found.manifest, self.source)
        chain = [str(found.reference)]
        while plan.parent is not None:
            chain.append(plan.parent)
            kitops.check_chain(chain)
            reference = Reference.parse(plan.parent)
            source = self._source(reference)
            manifest_bytes = source.fetch_manifest(reference.tag, reference.digest, _TIMEOUT_S)
            parent = parse(manifest_bytes.data, manifest_bytes.media_type)
            if isinstance(parent, Index):
                raise UnsupportedModelError(
                    f"parent kit {reference}: is an index; the kit must name one manifest of it"
                )
            found.parents.append(str(reference.with_digest(manifest_bytes.digest)))
            plan = kitops.with_parent(plan, self._plan_of(parent, source), reference.origin)
        return plan

    def tree(self, plan: ModelPlan, view: View, warnings: list[str], *, read_all: bool = False) -> TreeContent:
        """The tree a volume would show.

        Raises: UnsupportedModelError also for compressed layers of more than READ_LIMIT_BYTES together, which nobody can
        list without reading all of them, unless `read_all`.
        """
        compressed = {
            f"layers[{position}] ({layer.packing}, {size_text(layer.descriptor.size_bytes)})": layer.descriptor.size_bytes
            for position, layer in enumerate(plan.layers)
            if layer.packing in _DECODERS and not layer.maybe_file
        }
        if sum(compressed.values()) > READ_LIMIT_BYTES and not read_all:
            shown = ", ".join(list(compressed)[:_MAX_SHOWN]) + (", …" if len(compressed) > _MAX_SHOWN else "")
            raise UnsupportedModelError(
                f"{self._reference}: {shown} can only be listed by reading all of it; do that with --read-all, or see what is "
                "known without with 'modelmount inspect'"
            )
        layers = list(plan.layers)
        members: dict[int, MemberTable] = {}
        decoded_bytes: dict[int, int] = {}
        for position, layer in enumerate(layers):
            what = f"layers[{position}]"
            if layer.maybe_file:
                layers[position] = layer = layer.settle(self._first_member(layer, what))
            if layer.packing is Packing.TAR:
                members[position] = self._members(layer, what)
            elif layer.packing in _DECODERS:
                members[position], decoded_bytes[position] = self._decoded_members(layer, what)
        settled = replace(plan, layers=tuple(layers))
        return assemble(settled, members, decoded_bytes=decoded_bytes, view=view, warn=warnings.append)

    def close(self) -> None:
        """Close every connection."""
        for source in self._sources.values():
            source.close()

    def _source(self, reference: Reference) -> ModelSource:
        source = self._sources.get(reference.origin)
        if source is not None:
            return source
        layout_fd = None
        if reference.is_layout:
            try:
                layout_fd = os.open(reference.layout_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError as exc:
                raise InvalidVolumeError(
                    f"{reference}: {exc.strerror}; is it an OCI image-layout directory?", field="reference"
                ) from exc
        plain = (
            {reference.registry} if self._args.plain_http and reference.registry == self._reference.registry else set()
        )
        settings = SourceSettings(
            rules=AddressRules(frozenset(plain)),
            credentials=self._credentials_for(reference),
            hosts=login.hosts_of(self._args, reference),
            layout_fd=layout_fd,
        )
        source = self._sources[reference.origin] = open_source(reference, settings)
        return source

    def _plan_of(self, manifest: Manifest, source: ModelSource) -> ModelPlan:
        config = _read_blob(source, manifest.config, MAX_CONFIG_BYTES) if needs_config(manifest) else None
        return plan_of(manifest, config)

    def _members(self, layer: LayerPlan, what: str) -> MemberTable:
        source = self._source_of(layer)
        window = _Window(source, layer.descriptor)
        return tar.members_of(window.read, layer.descriptor.size_bytes, what)

    def _decoded_members(self, layer: LayerPlan, what: str) -> tuple[MemberTable, int]:
        """Reads and checks the whole layer."""
        blob = layer.descriptor
        decoder, stream, hasher = _DECODERS[layer.packing](what), TarStream(what), blob.digest.hasher()
        for data in _pieces(self._source_of(layer), blob):
            hasher.update(data)
            decoder.feed(data, stream.feed)
            check_ratio(decoder.decoded_bytes, blob.size_bytes, what)
        _check_digest(blob.digest, hasher.hexdigest())
        decoder.finish()
        return stream.finish(), decoder.decoded_bytes

    def _first_member(self, layer: LayerPlan, what: str) -> str | None:
        """None when its first bytes are no archive."""
        size_bytes = min(layer.descriptor.size_bytes, _FIRST_BYTES)
        data = _read_range(self._source_of(layer), layer.descriptor, 0, size_bytes) if size_bytes else b""
        plain, table = bytearray(), MemberTable()
        with suppress(ContentError):  # no archive at all, or more of it than the first bytes
            _DECODERS[layer.packing](what).feed(data, plain.extend)
            tar.drive(tar.scan(what, table), lambda offset, length: bytes(plain[offset : offset + length]))
        return table[0].path if len(table) else None

    def _source_of(self, layer: LayerPlan) -> ModelSource:
        return self._sources[layer.origin] if layer.origin else self.source

    def _credentials_for(self, reference: Reference) -> Credentials:
        """A login given by hand is for the registry that was named by hand; docker's logins are each for their own."""
        if reference == self._reference:
            return self.credentials
        if self._args.username:
            return self.credentials if reference.registry == self._reference.registry else ()
        return login.credentials_of(self._args, reference)


class _Window:
    """Reads a blob forwards, more than was asked for, because the next header is often near."""

    def __init__(self, source: ModelSource, blob: Descriptor) -> None:
        self._source = source
        self._blob = blob
        self._start = 0
        self._data = b""

    def read(self, offset: int, length: int) -> bytes:
        end = self._start + len(self._data)
        if not self._start <= offset <= offset + length <= end:
            wanted = min(max(length, _READ_BYTES), self._blob.size_bytes - offset)
            self._data = _read_range(self._source, self._blob, offset, wanted) if wanted else b""
            self._start = offset
        return self._data[offset - self._start : offset - self._start + length]


def _read_range(source: ModelSource, blob: Descriptor, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    reader = source.open_range(blob.digest, blob.size_bytes, offset, length)
    try:
        reader.readinto(memoryview(buffer))
    finally:
        reader.close()
    return bytes(buffer)


def _read_blob(source: ModelSource, blob: Descriptor, limit_bytes: int) -> bytes:
    """A small blob, whole and verified. Raises: SizeMismatchError, DigestMismatchError, what the registry answers."""
    if blob.size_bytes > limit_bytes:
        raise SizeMismatchError(
            f"blob {blob.digest.short()}: {blob.size_bytes} bytes, the limit is {limit_bytes}",
            expected=limit_bytes,
            actual=blob.size_bytes,
            subject=str(blob.digest),
        )
    data = _read_range(source, blob, 0, blob.size_bytes) if blob.size_bytes else b""
    _check_digest(blob.digest, Digest.of(data, blob.digest.algorithm).hex)
    return data


def _pieces(source: ModelSource, blob: Descriptor) -> Iterator[memoryview]:
    """The whole blob, in order; a piece is good until the next."""
    buffer = memoryview(bytearray(_PIECE_BYTES))
    if not blob.size_bytes:
        return
    reader = source.open_range(blob.digest, blob.size_bytes, 0, blob.size_bytes)
    try:
        for offset in range(0, blob.size_bytes, _PIECE_BYTES):
            piece = buffer[: min(_PIECE_BYTES, blob.size_bytes - offset)]
            reader.readinto(piece)
            yield piece
    finally:
        reader.close()


def _check_digest(expected: Digest, actual_hex: str) -> None:
    if actual_hex != expected.hex:
        actual = Digest(expected.algorithm, actual_hex)
        raise DigestMismatchError(
            f"blob {expected.short()}: its bytes have digest {actual.short()}; the registry's storage is damaged",
            expected=str(expected),
            actual=str(actual),
            subject=str(expected),
        )


@contextmanager
def open_finder(args: argparse.Namespace) -> Iterator[ModelFinder]:
    """For `args` of `add_source_flags`. Raises: InvalidVolumeError for a reference or login that cannot be used."""
    finder = ModelFinder(args, Reference.parse(args.reference))
    try:
        yield finder
    finally:
        finder.close()
