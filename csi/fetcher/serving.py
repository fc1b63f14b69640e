"""The mount that this process fetches for: its engine, what the worker asks of it, what the store shares with it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from dataclasses import dataclass, field, replace
from typing import Any

from csi.cache import format as fmt
from csi.cache.allowance import Allowance
from csi.control import wire
from csi.errors import CacheError, DigestMismatchError, ModelMountError, to_wire
from csi.fetcher.answers import Answers, read_and_close
from csi.fetcher.engine import EngineSettings, FetchEngine
from csi.fetcher.mount_sources import MountSources
from csi.fetcher.opening import open_blobs, read_specs
from csi.fetcher.resolving import is_shareable
from csi.fetcher.worker_link import WorkerLink
from csi.integrity.index import BlockIndex
from csi.oci.digest import Digest
from csi.stream.scheduler import Priority
from csi.tree.model import BlobSpec

log = logging.getLogger(__name__)

_MAX_CHALLENGES_BYTES = 16 * 1024 * 1024
_PROOF_PATIENCE_S = 10.0


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Who the mount deals with: the supervisor, the worker, and what was there before the mount started."""

    supervisor: Answers
    worker: WorkerLink
    sources: MountSources
    allowance: Allowance


@dataclass(frozen=True, slots=True)
class MountStart:
    """`index` are the hashes of the mount's blocks; None where bytes are checked blob by blob. `index_word`: where it came
    from. `settings` are the engine's.
    """

    area_fd: int
    index: BlockIndex | None
    index_word: str
    settings: EngineSettings = field(default_factory=EngineSettings)


class ServedMount:
    """There is no engine before a worker has sent its list of blobs. Everything but what the engine calls is for the main
    thread.
    """

    def __init__(self, start: MountStart, around: Surroundings) -> None:
        self.start = start
        self._supervisor, self._worker = around.supervisor, around.worker
        self._sources, self._allowance = around.sources, around.allowance
        self._settings = start.settings
        self._engine: FetchEngine | None = None
        self._specs: list[BlobSpec] = []
        self._challenges: dict[Digest, int] = {}
        self._in_place: set[Digest] = set()

    @property
    def settings(self) -> EngineSettings:
        """Of the engine, as they are now."""
        return self._settings

    def snapshot(self) -> dict[str, Any]:
        """Counters and progress of every blob, and who is asked."""
        counted: dict[str, Any] = self._engine.snapshot() if self._engine is not None else {"blobs": []}
        return {**counted, "origins": [source.origin for source in self._sources.origins.all()]}

    def use_origins(self) -> None:
        """Other sources, or the same with other credentials."""
        if self._engine is not None:
            self._engine.use_sources(self._sources.origins.for_blobs(self._specs))

    def fill(self) -> None:
        """Fetch the whole model from now on."""
        self._settings = replace(self._settings, fill=True)
        if self._engine is not None:
            self._engine.fill()

    def write_again(self) -> None:
        """There is room in the cache (again)."""
        if self._engine is not None:
            self._engine.write_again()

    def needed_bytes(self) -> int | None:
        """How much of the disk the rest of the model takes. None before a worker has said what it consists of."""
        return self._engine.unallocated_bytes() if self._engine is not None else None

    def challenge(self, challenges_fd: int) -> None:
        """The store has blobs of this mount, and wants our registry to show these blocks of them first."""
        wanted = json.loads(read_and_close(challenges_fd, _MAX_CHALLENGES_BYTES, "challenges"))
        self._challenges |= {Digest.parse(digest): int(block) for digest, block in wanted}
        self._show_blocks()

    def adopt_shared(self, digest: Digest, *, fresh: bool) -> None:
        """The store has put a proven blob into the area; `fresh`: a copy of ours."""
        if self._engine is not None:
            for blob, spec in enumerate(self._specs):
                if spec.digest == digest and self._engine.adopt_shared(blob, fresh=fresh):
                    self._in_place.add(digest)
                    self._say_in_place(digest)
            self._tell_when_all_is_here()

    def announce(self) -> None:
        """Say (again) which proven blobs are in place."""
        for digest in list(self._in_place):
            self._say_in_place(digest)

    def tell_complete_again(self) -> None:
        """Say again which blobs are complete."""
        for blob, progress in enumerate(self.snapshot()["blobs"]):
            if progress["state"] == "verified":
                self._on_complete(blob)

    def on_worker(self, message: wire.Message, fds: list[int]) -> None:
        """What the worker said. Raises: ModelMountError when there can be no engine."""
        match message:
            case {"op": "blobs"}:
                self._start_engine(wire.exactly(fds, 1)[0])
                return
            case {"op": "want", "blob": int(blob), "first": int(first), "count": int(count), "class": int(cls)}:
                self._want(blob, first, count, cls)
            case {"op": "returned", "slots": list(slots)}:
                self._worker.returned(slots)
                if self._engine is not None:
                    self._engine.room_again()
            case {"op": "damaged", "blob": int(blob), "block": int(block)}:
                if self._engine is not None and 0 <= blob < self._engine.blob_count:
                    self._engine.damaged(blob, block)
            case {"op": "distrust", "blob": int(blob)}:
                self._distrust(blob)
            case _:
                log.warning("worker channel: unknown message %r", message.get("op"))
        wire.close_all(fds)

    def on_wrong(self, error: ModelMountError) -> None:
        """Bytes were found wrong, received or stored ones."""
        log.error("%s", error)
        self.say_trouble("CacheDamaged" if isinstance(error, CacheError) else "IntegrityFailure", error)

    def say_trouble(self, reason: str, error: ModelMountError) -> None:
        """To whoever publishes, as an event, and to readers, when their deadline passes."""
        self._on_trouble(error, 1)
        self._supervisor.say({"op": "event", "reason": reason, "error": to_wire(error)})

    def _start_engine(self, specs_fd: int) -> None:
        """The first worker's list starts the engine; a successor's is the same list."""
        specs = read_specs(specs_fd)
        if self._engine is not None:
            return
        opened = open_blobs(self.start.area_fd, specs, self.start.index, self._allowance)
        if opened.trouble is not None:
            log.error("%s; what readers want goes to them without the cache", opened.trouble)
            self._supervisor.say({"op": "event", "reason": "CacheFailure", "error": to_wire(opened.trouble)})
        self._engine = FetchEngine(
            self._sources.origins.for_blobs(specs),
            specs,
            opened.writers,
            self._settings,
            on_block=self._on_block,
            on_failed=self._on_failed,
            on_wrong=self.on_wrong,
            on_lent=self._worker.lend,
            is_lent=self._worker.is_lent,
            on_complete=self._on_complete,
            on_damaged=self._on_damaged,
            on_trouble=self._on_trouble,
            ring=self._worker.ring,
            hashes=opened.hashes,
        )
        self._specs = specs
        self._show_blocks()  # before the threads look for work
        self._allowance.tell()
        self._engine.start()
        self._in_place = opened.in_place
        self.announce()

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

    def _want(self, blob: int, first: int, count: int, cls: int) -> None:
        engine = self._engine
        if engine is not None and 0 <= blob < engine.blob_count and first >= 0 and count > 0:
            engine.want(blob, first, count, Priority.DEMAND if cls == Priority.DEMAND else Priority.AHEAD)

    def _distrust(self, blob: int) -> None:
        engine = self._engine
        if engine is None or not 0 <= blob < engine.blob_count:
            return
        digest = engine.specs[blob].digest
        with contextlib.suppress(OSError):
            os.unlink(fmt.layer_index_path(digest), dir_fd=self.start.area_fd)
        engine.distrust(
            blob,
            DigestMismatchError(
                f"layer {digest.short()}: the registry sent other tar headers before the mount than the layer has; reads of "
                "it fail from now on; check the registry and what is in between",
                subject=str(digest),
            ),
        )

    def _say_in_place(self, digest: Digest) -> None:
        self._supervisor.say({"op": "adopted", "digest": str(digest)})

    def _on_block(self, blob: int, block: int) -> None:
        self._worker.tell({"op": "have", "blob": blob, "block": block})
        spec = self._specs[blob]
        if self._challenges.get(spec.digest) == block:
            del self._challenges[spec.digest]
            told = {"digest": str(spec.digest), "block": block, "origin": spec.origin}
            self._supervisor.say({"op": "proof", **told})

    def _on_failed(self, blob: int, block: int, error: ModelMountError) -> None:
        self._worker.tell({"op": "fail", "blob": blob, "block": block, "error": to_wire(error)})

    def _on_trouble(self, error: ModelMountError, tries: int) -> None:
        self._worker.tell({"op": "trouble", "error": to_wire(error), "tries": tries})

    def _on_complete(self, blob: int) -> None:
        spec = self._specs[blob]
        if is_shareable(spec.size_bytes):
            told = {"digest": str(spec.digest), "size_bytes": spec.size_bytes, "origin": spec.origin}
            self._supervisor.say({"op": "complete", **told})
        self._tell_when_all_is_here()

    def _tell_when_all_is_here(self) -> None:
        """Others may have the room that we do not need."""
        if self.needed_bytes() == 0:
            self._allowance.tell()

    def _on_damaged(self, blob: int) -> None:
        self._in_place.discard(self._specs[blob].digest)
        self._supervisor.say({"op": "damaged", "digest": str(self._specs[blob].digest)})
