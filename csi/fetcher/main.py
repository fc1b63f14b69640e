"""`modelmount fetcher`: started by the supervisor with one socket; everything else arrives over that socket.

    resolve      a reference in, the manifest's bytes and digest out, whether the model has a block index, and the
                 reference of the model it builds on (also the access check of a later volume)
    known        the same for a manifest that is on this node already: nobody is asked
    start        where the blobs come from, the mount's cache area, how to verify; from here on the process serves one
                 mount
    prove        whether our registry has the model's blobs, and not only its manifest
    build        a channel to the worker that finds out what is in the model (see `csi.fetcher.build`)
    fill         fetch the whole model from now on
    challenge    blobs that the store has: their blocks that our registry has to show first
    shared       the store has put a proven blob into the area; `fresh`: a copy of ours, made and hashed just now
    grant        how much more may be allocated
    worker       a channel to the mount's (new) worker, which then sends the list of blobs and what it wants
    hosts        which hosts serve which registry (mirrors), for the sources opened from then on
    credentials  where the blobs come from now, and as whom; reads that wait for better credentials go on
    stats        progress and counters
    repeat       say again which blobs are complete: whoever was told before may be gone
    stop         answer, and end

To a worker it sends `ring` (shared memory), and says `lent` (the block is in that slot, until the worker says
`returned`), `have` (the block is marked in the shared map), `fail` (it will not come) and `trouble` (what
readers should be told when their deadline passes). These may be lost; workers ask again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from csi import credentials, registry_hosts
from csi.boot import this_boot
from csi.cache import format as fmt
from csi.cache.allowance import Allowance
from csi.cache.blob import BlobWriter, make_directory
from csi.cache.ring import LendingRing
from csi.control import wire
from csi.errors import (
    CacheError,
    ControlError,
    DigestMismatchError,
    ModelMountError,
    SizeMismatchError,
    UnsupportedModelError,
    to_wire,
)
from csi.fetcher.build import BuildService, blob_specs
from csi.fetcher.engine import EngineSettings, FetchEngine
from csi.fetcher.index_source import has_index, load_index
from csi.fetcher.origins import Origins
from csi.fetcher.parents import parent_of
from csi.fetcher.possession import known_origins, prove_possession, remember_origins
from csi.integrity.index import BlobHashes, BlockIndex
from csi.jail.confinement import Level, Role, narrow_to
from csi.oci.digest import Digest
from csi.oci.formats import index as variants
from csi.oci.manifest import MAX_MANIFEST_BYTES, Manifest, parse_manifest
from csi.oci.reference import Reference
from csi.registry.address_rules import AddressRules
from csi.registry.client import RegistrySource
from csi.registry.sources import SourceSettings, open_source
from csi.registry_hosts import RegistryHost
from csi.stream.ports import ManifestBytes, ModelSource
from csi.stream.scheduler import Priority
from csi.tree.model import BlobSpec
from csi.volume import Verify

if TYPE_CHECKING:
    from csi.fetcher.signed_indexes import SignedIndexes

log = logging.getLogger(__name__)

_MAX_HOSTS_BYTES = 64 * 1024 * 1024
_MAX_SPECS_BYTES = 16 * 1024 * 1024
_MAX_SOURCES_BYTES = 16 * 1024 * 1024
_SHARED_FROM_BYTES = 8 * 1024 * 1024  # below it, fetching costs no more than sharing
_PROOF_PATIENCE_S = 10.0
_MAX_REASON = 1000
_VARIANT_TIMEOUT_S = 20.0
_RING_SLOTS = 16
"""64 MiB, and nothing of it is used while the cache takes what comes."""


class Fetcher:
    """The process's state. The main thread reads sockets; `resolve` and the engine have threads of their own."""

    def __init__(self, control: socket.socket, jail: Level, signed_indexes: SignedIndexes | None = None) -> None:
        # A supervisor that died may leave nobody who reads: then what we say is lost, and nothing here waits for it.
        control.setblocking(False)
        self._control = control
        self._jail = jail
        self._signed_indexes = signed_indexes
        self._send_lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ)
        self._origins = Origins()
        self._area_fd: int | None = None
        self._resolved: ManifestBytes | None = None
        self._manifests: dict[str, list[Manifest]] = {}
        """By origin, until `start`: the model's manifest, also if that took an index, and those of its parents."""
        self._index: BlockIndex | None = None
        self._index_word = "none"
        self._worker: socket.socket | None = None
        self._build: BuildService | None = None
        self._engine: FetchEngine | None = None
        self._engine_settings = EngineSettings()
        self._hosts: dict[str, tuple[RegistryHost, ...]] = {}
        self._ring = LendingRing(_RING_SLOTS)
        self._lent: set[int] = set()
        self._lending = threading.Lock()  # a slot is lent to the worker of now, or to nobody
        self._specs: list[BlobSpec] = []
        self._challenges: dict[Digest, int] = {}
        self._adopted: set[Digest] = set()
        self._allowance = Allowance(lambda: self._notify_supervisor({"op": "grant"}))

    def run(self) -> None:
        """Until `stop`, or until nobody holds the other end of the control socket: supervisor and keeper are gone."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._control:
                    try:
                        received = wire.recv(self._control)
                    except BlockingIOError:
                        continue
                    if received is None:
                        return
                    if received[0].get("op") == "stop":
                        self._reply(wire.ok(received[0]))
                        return
                    self._on_request(*received)
                elif key.fileobj is self._worker:
                    try:
                        self._on_worker_readable()
                    except ModelMountError as exc:  # no engine without a cache: say why, and start again
                        log.error("cannot serve the worker: %s", exc)
                        self._tell_worker({"op": "trouble", "error": to_wire(exc)})
                        self._notify_supervisor({"op": "event", "reason": "CacheFailure", "error": to_wire(exc)})
                        return

    def _on_request(self, request: wire.Message, fds: list[int]) -> None:
        try:
            match request.get("op"):
                case "ping":
                    started = self._area_fd is not None
                    self._reply(wire.ok(request, pid=os.getpid(), jail=self._jail.as_fields(), serving=started))
                case "resolve":
                    # In a thread: a registry that does not answer must not keep credentials or stats waiting.
                    threading.Thread(target=self._resolve, args=(request, fds), daemon=True, name="resolve").start()
                case "known":
                    self._use_known(request, wire.exactly(fds, 1)[0])
                case "start":
                    layers_fds = self._start(request, fds)
                    assert self._area_fd is not None
                    origins = known_origins(self._area_fd)
                    try:
                        self._reply(
                            wire.ok(request, origins=origins, index=self._index_word, **self._jail.as_fields()),
                            layers_fds,
                        )
                    finally:
                        wire.close_all(layers_fds)
                case "prove":
                    threading.Thread(target=self._prove, args=(request,), daemon=True, name="prove").start()
                case "build":
                    self._serve_build(wire.exactly(fds, 1)[0])
                    self._reply(wire.ok(request))
                case "fill":
                    self._fill()
                    self._reply(wire.ok(request))
                case "challenge":
                    self._challenge(wire.exactly(fds, 1)[0])
                    self._reply(wire.ok(request))
                case "shared":
                    self._adopt_shared(
                        Digest.parse(wire.field(request, "digest", str)), fresh=wire.field(request, "fresh", bool)
                    )
                    self._reply(wire.ok(request))
                case "grant":
                    self._allowance.add(wire.field(request, "size_bytes", int))
                    if self._engine is not None:
                        self._engine.write_again()
                    self._reply(wire.ok(request))
                case "hosts":
                    self._use_hosts(wire.exactly(fds, 1)[0])
                    self._reply(wire.ok(request))
                case "worker":
                    self._attach_worker(wire.exactly(fds, 1)[0])
                    self._reply(wire.ok(request))
                case "credentials":
                    if not fds:
                        raise ControlError("fetcher: credentials without the sources they are for")
                    self._use_sources(request, fds)
                    if self._area_fd is not None:
                        remember_origins(self._area_fd, request.get("proven", ()))
                    self._reply(wire.ok(request))
                case "repeat":
                    self._reply(wire.ok(request))
                    self._tell_again()
                case "announce":
                    wire.close_all(fds)
                    self._announce()
                    self._reply(wire.ok(request))
                case "stats":
                    self._send_stats(request)
                case other:
                    wire.close_all(fds)
                    raise ControlError(f"fetcher: unknown operation {other!r}")
        except ModelMountError as exc:
            self._reply(wire.failed(request, exc))
        except Exception as exc:
            log.exception("%s failed by a bug", request.get("op"))
            self._reply(wire.failed(request, exc))

    def _resolve(self, request: wire.Message, fds: list[int]) -> None:
        """Also the access check: the answer shows that these credentials may read that manifest, now, and with `prove`
        that the registry has the model's blobs and not only its manifest.
        """
        try:
            reference = Reference.parse(wire.field(request, "reference", str))
            source = open_source(reference, self._settings_for(reference, request, request.get("credentials"), fds))
            try:
                manifest = source.fetch_manifest(
                    reference.tag, reference.digest, timeout_s=float(request.get("registry_timeout_s", 20.0))
                )
                if request.get("prove"):
                    if self._index is None:
                        raise ControlError("fetcher: nothing to prove without a block index; try again")
                    prove_possession(source, self._index)
                first = not self._origins.own  # later ones are access checks, or the manifest that an index led to
                chosen = _chosen(source, manifest, str(request.get("variant", ""))) if first else None
                parent, indexed, ignored = None, False, ""
                if chosen is not None:
                    parent, indexed = parent_of(chosen[1], source), has_index(chosen[1])
                    if not indexed and self._signed_indexes is not None:
                        search = self._signed_indexes.find(source, chosen[0].digest)
                        indexed, ignored = search.endorsed is not None, search.ignored
            finally:
                source.close()
            found = chosen[1] if chosen is not None else None
            self._say_resolved(request, manifest, reference.origin, found, indexed, ignored, parent)
        except ModelMountError as exc:
            self._reply(wire.failed(request, exc))
        except Exception as exc:
            log.exception("resolve failed by a bug")
            self._reply(wire.failed(request, exc))

    def _use_known(self, request: wire.Message, manifest_fd: int) -> None:
        """Raises: DigestMismatchError for bytes that are not what their digest names."""
        digest = Digest.parse(wire.field(request, "digest", str))
        try:
            data = wire.read_all(manifest_fd, MAX_MANIFEST_BYTES, "manifest")
        finally:
            os.close(manifest_fd)
        if Digest.of(data, digest.algorithm) != digest:
            raise DigestMismatchError(f"kept manifest {digest.short()}: has other bytes", subject=str(digest))
        manifest = ManifestBytes(data, wire.field(request, "media_type", str), digest)
        indexed = wire.field(request, "indexed", bool)
        try:
            chosen = parse_manifest(data, manifest.media_type)
            # That there is a signed index was found out when the manifest was kept; whether it still counts shows at `start`.
            indexed = has_index(chosen) or (self._signed_indexes is not None and indexed)
        except (UnsupportedModelError, SizeMismatchError):  # an index, or what the worker says what is wrong with
            chosen = None
        self._say_resolved(request, manifest, wire.field(request, "origin", str), chosen, indexed)

    def _say_resolved(
        self,
        request: wire.Message,
        manifest: ManifestBytes,
        origin: str,
        chosen: Manifest | None,
        indexed: bool,
        index_ignored: str = "",
        parent: str | None = None,
    ) -> None:
        """`chosen`: what the manifest is or leads to, if it was looked at."""
        if not self._origins.own:
            self._resolved = self._resolved or manifest
        if chosen is not None:
            self._manifests.setdefault(origin, []).append(chosen)
        manifest_fd = wire.memfd("manifest", manifest.data)
        try:
            self._reply(
                wire.ok(
                    request,
                    digest=str(manifest.digest),
                    media_type=manifest.media_type,
                    indexed=indexed,
                    index_ignored=index_ignored[:_MAX_REASON],
                    parent=parent,
                ),
                [manifest_fd],
            )
        finally:
            os.close(manifest_fd)

    def _prove(self, request: wire.Message) -> None:
        """That the mount may show what others have fetched, or will."""
        source, index, area_fd = self._origins.own[0], self._index, self._area_fd
        try:
            if index is None or area_fd is None:
                raise ControlError("fetcher: nothing to prove without a block index")
            prove_possession(source, index)
        except ModelMountError as exc:
            self._reply(wire.failed(request, exc))
            return
        except Exception as exc:
            log.exception("prove failed by a bug")
            self._reply(wire.failed(request, exc))
            return
        remember_origins(area_fd, [source.origin])
        self._reply(wire.ok(request))

    def _start(self, request: wire.Message, fds: list[int]) -> list[int]:
        """Memfds: the layers worth sharing, for the store, which finds a directory for each of them; the model's own, then
        those of every parent.
        """
        if len(fds) < 2 or self._origins.own:
            wire.close_all(fds)
            raise ControlError("fetcher: start needs the sources and the cache area, once")
        sources_fd, self._area_fd = fds[:2]
        narrow_to(Role.FETCHER, self._area_fd)  # before the engine's threads start, which inherit it
        self._engine_settings = EngineSettings(
            threads=wire.field(request, "threads", int), fill=wire.field(request, "fill", bool)
        )
        self._allowance.add(wire.field(request, "allowance", int))
        self._use_sources(request, [sources_fd, *fds[2:]])
        origins = [self._origins.own[0].origin, *self._origins.parents]
        layers = [_shareable(self._manifests.get(origin, ())) for origin in origins]
        if Verify(wire.field(request, "verify", str)) is Verify.CHUNK:
            digest = Digest.parse(wire.field(request, "digest", str))
            resolved = self._resolved
            known = resolved if resolved is not None and resolved.digest == digest else None
            variant = wire.field(request, "variant", str)
            self._index, self._index_word = load_index(
                self._area_fd, self._origins.own[0], digest, known, self._signed_indexes, variant
            )
        self._resolved = None
        self._manifests = {}
        for name in dict.fromkeys(name for blobs in layers for name, _ in blobs):
            with contextlib.suppress(OSError):  # what cannot be shared is fetched
                make_directory(self._area_fd, Digest.parse(name))
        return [wire.memfd("layers", json.dumps(blobs).encode()) for blobs in layers]

    def _challenge(self, challenges_fd: int) -> None:
        try:
            wanted = json.loads(wire.read_all(challenges_fd, _MAX_SPECS_BYTES, "challenges"))
        finally:
            os.close(challenges_fd)
        self._challenges |= {Digest.parse(digest): int(block) for digest, block in wanted}
        self._show_blocks()

    def _show_blocks(self) -> None:
        """Ask for the blocks we are to show; the rest of their blobs waits a little."""
        if self._engine is None:
            return
        for blob, spec in enumerate(self._specs):
            if (block := self._challenges.get(spec.digest)) is not None:
                self._engine.hold(blob, held=True)
                self._engine.want(blob, block, 1, Priority.DEMAND)
                release = threading.Timer(_PROOF_PATIENCE_S, self._engine.hold, (blob,), {"held": False})
                release.daemon = True
                release.start()

    def _adopt_shared(self, digest: Digest, *, fresh: bool) -> None:
        if self._engine is not None:
            for blob, spec in enumerate(self._specs):
                if spec.digest == digest and self._engine.adopt_shared(blob, fresh=fresh):
                    self._adopted.add(digest)
                    self._notify_supervisor({"op": "adopted", "digest": str(digest)})

    def _on_complete(self, blob: int) -> None:
        spec = self._specs[blob]
        if spec.size_bytes >= _SHARED_FROM_BYTES:
            told = {"digest": str(spec.digest), "size_bytes": spec.size_bytes, "origin": spec.origin}
            self._notify_supervisor({"op": "complete", **told})

    def _tell_again(self) -> None:
        told: list[dict[str, Any]] = self._snapshot()["blobs"]
        for blob, progress in enumerate(told):
            if progress["state"] == "verified":
                self._on_complete(blob)

    def _serve_build(self, channel_fd: int) -> None:
        channel = socket.socket(fileno=channel_fd)
        if self._area_fd is None or not self._origins.own:
            channel.close()
            raise ControlError("fetcher: build before start")
        if self._build is not None:
            self._build.stop()
        settings = replace(self._engine_settings, fill=True)
        self._build = BuildService(
            channel, lambda: self._origins, self._area_fd, settings, self._index, self._on_wrong, self._allowance
        )
        self._build.start()

    def _use_hosts(self, hosts_fd: int) -> None:
        try:
            given = json.loads(wire.read_all(hosts_fd, _MAX_HOSTS_BYTES, "registry hosts"))
        finally:
            os.close(hosts_fd)
        self._hosts |= {str(registry): registry_hosts.from_wire(hosts) for registry, hosts in given.items()}

    def _settings_for(
        self, reference: Reference, request: Mapping[str, Any], logins: Any, fds: list[int]
    ) -> SourceSettings:
        return SourceSettings(
            rules=AddressRules(
                frozenset(request.get("plain_http_hosts", ())), frozenset(request.get("allowed_registries", ()))
            ),
            credentials=credentials.from_wire(logins),
            hosts=self._hosts.get(reference.registry, ()),
            layout_fd=fds[0] if fds and reference.is_layout else None,
        )

    def _fill(self) -> None:
        self._engine_settings = replace(self._engine_settings, fill=True)
        if self._engine is not None:
            self._engine.fill()

    def _use_sources(self, request: wire.Message, fds: list[int]) -> None:
        """Fetch from these from now on. A registry that was in use keeps its connections, and gets its credentials. The first
        descriptor has the list, which may be too large for a message.
        """
        try:
            listed = json.loads(wire.read_all(fds[0], _MAX_SOURCES_BYTES, "sources"))
        finally:
            os.close(fds[0])
        before = {source.origin: source for source in self._origins.all()}
        own: list[ModelSource] = []
        parents: dict[str, ModelSource] = {}
        for wanted in listed:
            reference = Reference.parse(wire.field(wanted, "reference", str))
            source = before.pop(reference.origin, None)
            if source is None:
                source = open_source(
                    reference, self._settings_for(reference, request, wanted.get("credentials"), fds[1:])
                )
            elif isinstance(source, RegistrySource):
                newer = credentials.from_wire(wanted.get("credentials"))
                if newer or not wanted.get("keep"):
                    source.replace_credentials(newer)
            if wanted.get("is_parent"):
                parents[source.origin] = source
            else:
                own.append(source)
        self._origins = Origins(own, parents)
        if self._engine is not None:
            self._engine.use_sources(self._origins.for_blobs(self._specs))
        if self._build is not None:
            self._build.use_origins(self._origins)
        for source in before.values():
            source.close()

    def _attach_worker(self, channel_fd: int) -> None:
        worker = socket.socket(fileno=channel_fd)
        worker.setblocking(False)
        with self._lending:
            self._drop_worker()
            self._worker = worker
            self._tell_worker({"op": "ring"}, [self._ring.fd])  # before anything in it is lent
        self._selector.register(worker, selectors.EVENT_READ)

    def _on_worker_readable(self) -> None:
        worker = self._worker
        assert worker is not None
        try:
            received = wire.recv(worker)
        except BlockingIOError:
            return
        except (OSError, ControlError) as exc:
            log.warning("worker channel: %s", exc)
            received = None
        if received is None:  # a worker died; the supervisor will send the channel of its successor
            with self._lending:
                self._drop_worker()
            return
        message, fds = received
        match message:
            case {"op": "blobs"}:
                self._start_engine(wire.exactly(fds, 1)[0])
            case {"op": "want", "blob": int(blob), "first": int(first), "count": int(count), "class": int(cls)}:
                wire.close_all(fds)
                self._want(blob, first, count, cls)
            case {"op": "returned", "slots": list(slots)}:
                wire.close_all(fds)
                with self._lending:
                    for slot in self._lent.intersection(slots):
                        self._lent.discard(slot)
                        self._ring.release(slot)
                if self._engine is not None:
                    self._engine.room_again()
            case {"op": "damaged", "blob": int(blob), "block": int(block)}:
                wire.close_all(fds)
                if self._engine is not None and 0 <= blob < self._engine.blob_count:
                    self._engine.damaged(blob, block)
            case {"op": "distrust", "blob": int(blob)}:
                wire.close_all(fds)
                self._distrust(blob)
            case _:
                wire.close_all(fds)
                log.warning("worker channel: unknown message %r", message.get("op"))

    def _start_engine(self, specs_fd: int) -> None:
        """The first worker's list starts the engine; a successor's is the same list."""
        try:
            specs = blob_specs(wire.read_all(specs_fd, _MAX_SPECS_BYTES, "blob list"))
        finally:
            os.close(specs_fd)
        if self._engine is not None:
            return
        if not self._origins.own or self._area_fd is None:
            raise ControlError("fetcher: a worker was attached before resolve and start")
        hashes: list[BlobHashes | None] = [None] * len(specs)
        if self._index is not None:
            if missing := [spec.digest.short() for spec in specs if spec.digest not in self._index]:
                raise ControlError(f"fetcher: the worker asks for {missing[0]}, which the block index does not have")
            hashes = [self._index[spec.digest] for spec in specs]
        boot_id = this_boot()
        area_fd = self._area_fd
        writers: list[BlobWriter] = []
        adopted: list[Digest] = []
        trouble: CacheError | None = None
        for spec in specs:
            try:
                writer = BlobWriter.open(
                    area_fd,
                    spec.digest,
                    spec.size_bytes,
                    boot_id,
                    recheck=self._index is not None,
                    allowance=self._allowance,
                )
            except CacheError as exc:
                trouble = exc
                writer = BlobWriter.without_disk(area_fd, spec.digest, spec.size_bytes)
            known = hashes[len(writers)]
            if known is None and writer.hashes is not None:
                known = hashes[len(writers)] = BlobHashes(spec.digest, spec.size_bytes, writer.hashes)
            if known is not None and known.hashes == writer.hashes:
                adopted.append(spec.digest)
            writers.append(writer)
        if trouble is not None:
            log.error("%s; what readers want goes to them without the cache", trouble)
            self._notify_supervisor({"op": "event", "reason": "CacheFailure", "error": to_wire(trouble)})
        self._engine = FetchEngine(
            self._origins.for_blobs(specs),
            specs,
            writers,
            self._engine_settings,
            on_block=self._on_block,
            on_failed=self._on_failed,
            on_wrong=self._on_wrong,
            on_lent=self._on_lent,
            on_complete=self._on_complete,
            on_damaged=self._on_damaged,
            ring=self._ring,
            hashes=hashes,
        )
        self._specs = specs
        self._show_blocks()  # before the threads look for work
        self._engine.start()
        self._adopted = set(adopted)
        self._announce()

    def _distrust(self, blob: int) -> None:
        engine = self._engine
        if engine is None or self._area_fd is None or not 0 <= blob < engine.blob_count:
            return
        digest = engine.specs[blob].digest
        with contextlib.suppress(OSError):
            os.unlink(fmt.layer_index_path(digest), dir_fd=self._area_fd)
        engine.distrust(
            blob,
            DigestMismatchError(
                f"layer {digest.short()}: the registry sent other tar headers before the mount than the layer has; reads of "
                "it fail from now on; check the registry and what is in between",
                subject=str(digest),
            ),
        )

    def _want(self, blob: int, first: int, count: int, cls: int) -> None:
        engine = self._engine
        if engine is not None and 0 <= blob < engine.blob_count and first >= 0 and count > 0:
            engine.want(blob, first, count, Priority.DEMAND if cls == Priority.DEMAND else Priority.AHEAD)

    def _on_failed(self, blob: int, block: int, error: ModelMountError) -> None:
        self._tell_worker({"op": "fail", "blob": blob, "block": block, "error": to_wire(error)})

    def _on_wrong(self, error: ModelMountError) -> None:
        log.error("%s", error)
        reason = "CacheDamaged" if isinstance(error, CacheError) else "IntegrityFailure"
        self._tell_worker({"op": "trouble", "error": to_wire(error)})
        self._notify_supervisor({"op": "event", "reason": reason, "error": to_wire(error)})

    def _announce(self) -> None:
        for digest in list(self._adopted):
            self._notify_supervisor({"op": "adopted", "digest": str(digest)})

    def _on_damaged(self, blob: int) -> None:
        self._adopted.discard(self._specs[blob].digest)
        self._notify_supervisor({"op": "damaged", "digest": str(self._specs[blob].digest)})

    def _on_block(self, blob: int, block: int) -> None:
        self._tell_worker({"op": "have", "blob": blob, "block": block})
        spec = self._specs[blob]
        if self._challenges.get(spec.digest) == block:
            del self._challenges[spec.digest]
            told = {"digest": str(spec.digest), "block": block, "origin": spec.origin}
            self._notify_supervisor({"op": "proof", **told})

    def _on_lent(self, blob: int, block: int, slot: int) -> bool:
        with self._lending:  # a worker that is replaced in between would be lent what was taken back already
            if not self._tell_worker({"op": "lent", "blob": blob, "block": block, "slot": slot}):
                return False
            self._lent.add(slot)
            return True

    def _drop_worker(self) -> None:
        """That worker is gone, and what it was lent comes back. Call with `_lending`."""
        if self._worker is not None:
            self._selector.unregister(self._worker)
            self._worker.close()
            self._worker = None
        while self._lent:
            self._ring.release(self._lent.pop())

    def _tell_worker(self, message: wire.Message, fds: Sequence[int] = ()) -> bool:
        worker = self._worker
        if worker is None:
            return False
        try:
            wire.send(worker, message, fds)
        except OSError as exc:
            log.debug("worker not reachable: %s", exc)
            return False
        return True

    def _snapshot(self) -> dict[str, Any]:
        return self._engine.snapshot() if self._engine else {"blobs": []}

    def _send_stats(self, request: wire.Message) -> None:
        snapshot = self._snapshot()
        snapshot["origins"] = [source.origin for source in self._origins.all()]
        stats_fd = wire.memfd("stats", json.dumps(snapshot).encode())
        try:
            self._reply(wire.ok(request), [stats_fd])
        finally:
            os.close(stats_fd)

    def _notify_supervisor(self, message: wire.Message) -> None:
        self._reply(message)

    def _reply(self, message: wire.Message, fds: Sequence[int] = ()) -> None:
        with self._send_lock:
            try:
                wire.send(self._control, message, fds)
            except OSError as exc:
                log.warning("supervisor not reachable: %s", exc)


def _shareable(manifests: Sequence[Manifest]) -> list[tuple[str, int]]:
    """Digest and size of every layer that is worth the store's work. None after a restart: they are shared by then."""
    layers = (layer for manifest in manifests for layer in manifest.layers)
    return [(str(layer.digest), layer.size_bytes) for layer in layers if layer.size_bytes >= _SHARED_FROM_BYTES]


def _chosen(source: ModelSource, root: ManifestBytes, variant: str) -> tuple[ManifestBytes, Manifest] | None:
    """The manifest of the model; None for what cannot be mounted: the worker says what is wrong with it.

    Raises: what the registry answers about a manifest that an index leads to.
    """
    try:
        return variants.chosen(root, variant, lambda digest: source.fetch_manifest(None, digest, _VARIANT_TIMEOUT_S))
    except (UnsupportedModelError, SizeMismatchError):
        return None


def run(control_fd: int, jail: Level, signed_indexes: SignedIndexes | None = None) -> int:
    """The process, in its jail. Returns the exit status."""
    os.umask(0o002)  # the store's group may link and remove
    Fetcher(socket.socket(fileno=control_fd), jail, signed_indexes).run()
    # Threads may be in a read that stalls; nothing they hold needs an orderly end.
    sys.stderr.flush()
    os._exit(0)
