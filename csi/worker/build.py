"""From a manifest to a serialised tree, in a thread of the worker: every parser of registry content runs here.

A model of raw files needs its manifest only. Others need their config, the headers of their archives, or whole layers,
and ask the fetcher (`csi.worker.build_channel`). An index needs another manifest, that of the chosen variant, which the
supervisor gets: it knows whose credentials may be used for what.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from csi.errors import ControlError, ModelMountError, UnsupportedModelError
from csi.oci.archive.layer_index import Access, LayerIndex
from csi.oci.archive.member import Member
from csi.oci.digest import Digest
from csi.oci.formats import index as variants
from csi.oci.formats import kitops
from csi.oci.formats.detect import MAX_CONFIG_BYTES, needs_config, plan_of
from csi.oci.formats.plan import LayerPlan, ModelPlan, Packing
from csi.oci.manifest import Manifest, parse
from csi.oci.view import View
from csi.tree import file_format
from csi.tree.assemble import assemble
from csi.volume import Verify
from csi.worker.build_channel import BuildChannel
from csi.worker.layers import LayerFacts, LayerScanner, load_index

log = logging.getLogger(__name__)

_MODES = {Access.DIRECT: "streamed", Access.POINTS: "indexed", Access.SPOOL: "spooled"}
_MAX_WARNINGS, _MAX_WARNING_LENGTH = 20, 300
_WORKING = {Packing.TAR: "streamed", Packing.TAR_GZIP: "indexing", Packing.TAR_ZSTD: "spooling"}


@dataclass(frozen=True, slots=True)
class SentManifest:
    """Manifest bytes, checked by the fetcher against their digest."""

    data: bytes
    media_type: str


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """What to build. `verify`: the mount's; it decides which bytes may be used before there is a tree."""

    manifest: SentManifest
    view: View
    verify: Verify
    parents: tuple[tuple[str, SentManifest], ...] = ()
    """What the model builds on, the nearest first: origin (empty for the model's own) and manifest."""


@dataclass(slots=True)
class LayerProgress:
    """One archive, for people. `done_bytes` of `size_bytes` of the blob have been worked through."""

    size_bytes: int
    mode: str
    done_bytes: int = 0


class Build:
    """One build. Made and asked on the trio side; works in a thread of its own. `wake` is called from that thread
    whenever `state` has changed.
    """

    def __init__(self, request: BuildRequest, channel: BuildChannel, area_fd: int, wake: Callable[[], None]) -> None:
        self._request, self._channel, self._area_fd, self._wake = request, channel, area_fd, wake
        self._manifests: queue.SimpleQueue[SentManifest | None] = queue.SimpleQueue()
        self._scanner = LayerScanner(area_fd, channel, self._on_bytes)
        self.layers: dict[Digest, LayerProgress] = {}
        self.started_at = time.monotonic()
        """When the layers began to be read; for rates."""
        self.needs: str | None = None
        """The digest of a manifest of the same repository that `provide` is to bring."""
        self.chosen: str | None = None
        """The digest of the manifest that was picked from an index."""
        self.warnings: list[str] = []
        """For people: what was left out or looks odd."""
        self.tree: bytes | None = None
        self.error: ModelMountError | None = None

    def start(self) -> None:
        """Work in a thread."""
        threading.Thread(target=self._run, daemon=True, name="build").start()

    def provide(self, manifest: SentManifest) -> None:
        """What was needed."""
        self.needs = None
        self._manifests.put(manifest)

    def stop(self) -> None:
        """Give up: the thread ends at its next wait."""
        self._manifests.put(None)
        self._channel.close()

    @property
    def is_done(self) -> bool:
        """Whether there is a tree or an error."""
        return self.tree is not None or self.error is not None

    def _run(self) -> None:
        try:
            self.tree = self._build()
        except ModelMountError as exc:
            self.error = exc
        except MemoryError:
            self.error = ModelMountError("the model needs more memory to be read than a worker may use")
        except Exception as exc:
            log.exception("build failed by a bug")
            self.error = ModelMountError(f"internal error while reading the model: {type(exc).__name__}")
        finally:
            self._channel.close()
            os.close(self._area_fd)
            self._wake()

    def _build(self) -> bytes:
        _, manifest = variants.chosen(self._request.manifest, self._request.view.variant, self._need_chosen)
        plan = self._whole_plan(manifest)
        if self._request.verify is Verify.WHOLE:  # by small ranges, which are looked at again once the blob is verified
            plan = self._settled_plan(plan, {})
            blobs = self._fetched(plan)
        else:
            blobs = self._fetched(plan)
            plan = self._settled_plan(plan, blobs)
        members: dict[int, Iterable[Member]] = {}
        decoded_bytes: dict[int, int] = {}
        for position, found in self._indexes(plan, blobs).items():
            members[position] = found.members
            if plan.layers[position].packing is not Packing.TAR:
                decoded_bytes[position] = found.decoded_bytes
        content = assemble(plan, members, decoded_bytes=decoded_bytes, view=self._request.view, warn=self._warn)
        return file_format.dump(content)

    def _need_chosen(self, digest: Digest) -> SentManifest:
        self.chosen = self.needs = str(digest)
        self._wake()
        sent = self._manifests.get()
        if sent is None:
            raise ControlError("the preparation of the model was ended")
        return sent

    def _whole_plan(self, manifest: Manifest) -> ModelPlan:
        """With everything that the model inherits."""
        plan = self._plan(manifest)
        for origin, sent in self._request.parents:
            if plan.parent is None:
                raise ControlError("worker: a parent was given of a model that builds on none")
            parent = parse(sent.data, sent.media_type)
            if not isinstance(parent, Manifest):
                raise UnsupportedModelError(
                    f"parent kit {plan.parent}: is an index; the kit must name one manifest of it"
                )
            plan = kitops.with_parent(plan, self._plan(parent, origin), origin)
        if plan.parent is not None:
            raise ControlError(f"worker: the kit builds on {plan.parent}, whose manifest was not given")
        return plan

    def _plan(self, manifest: Manifest, origin: str = "") -> ModelPlan:
        config = None
        if needs_config(manifest):
            if manifest.config.size_bytes > MAX_CONFIG_BYTES:
                raise UnsupportedModelError(f"config: {manifest.config.size_bytes} bytes, limit {MAX_CONFIG_BYTES}")
            config = self._channel.read_whole(manifest.config, origin)
        return plan_of(manifest, config)

    def _warn(self, text: str) -> None:
        log.warning("%s", text)
        if len(self.warnings) < _MAX_WARNINGS:
            self.warnings.append(text[:_MAX_WARNING_LENGTH])

    def _fetched(self, plan: ModelPlan) -> Mapping[Digest, int]:
        """Begin to fetch the layers that are read through the cache, where bytes are verified first; by digest, their place
        among what is fetched. A layer that is listed twice is read once.
        """
        by_ranges = self._request.verify is Verify.WHOLE
        wanted: dict[Digest, LayerPlan] = {}
        for layer in plan.layers:
            if not layer.packing.is_archive or (by_ranges and layer.packing is Packing.TAR):
                continue
            kept = load_index(self._area_fd, layer.descriptor)
            if kept is None or (kept.access is Access.FILE and not layer.maybe_file):
                wanted.setdefault(layer.descriptor.digest, layer)
        if wanted:
            self._channel.fetch([(layer.descriptor, layer.origin) for layer in wanted.values()])
        return {digest: position for position, digest in enumerate(wanted)}

    def _settled_plan(self, plan: ModelPlan, blobs: Mapping[Digest, int]) -> ModelPlan:
        return replace(plan, layers=tuple(self._settled(layer, blobs) for layer in plan.layers))

    def _settled(self, layer: LayerPlan, blobs: Mapping[Digest, int]) -> LayerPlan:
        if not layer.maybe_file:
            return layer
        facts = _facts(layer, blobs)
        kept = load_index(self._area_fd, layer.descriptor)
        first = kept.members if kept is not None else self._scanner.first_member(facts)
        settled = layer.settle(first[0].path if len(first) else None)
        if kept is None and settled.packing is Packing.RAW:
            self._scanner.settle_file(facts, first)
        return settled

    def _indexes(self, plan: ModelPlan, blobs: Mapping[Digest, int]) -> Mapping[int, LayerIndex]:
        """By layer position."""
        found: dict[Digest, LayerIndex] = {}
        missing: dict[Digest, LayerPlan] = {}
        for position in plan.archives:
            layer = plan.layers[position]
            digest = layer.descriptor.digest
            if digest in found or digest in missing:
                continue
            kept = load_index(self._area_fd, layer.descriptor)
            self.layers[digest] = progress = LayerProgress(layer.descriptor.size_bytes, _WORKING[layer.packing])
            if kept is not None and kept.access is not Access.FILE:
                found[digest] = kept
                progress.done_bytes, progress.mode = progress.size_bytes, _MODES[kept.access]
            else:
                missing[digest] = layer
        self.started_at = time.monotonic()
        for digest, layer in missing.items():
            found[digest] = self._scanner.scan(_facts(layer, blobs))
            self.layers[digest].mode = _MODES[found[digest].access]
        return {position: found[plan.layers[position].descriptor.digest] for position in plan.archives}

    def _on_bytes(self, layer: LayerFacts, done: int) -> None:
        self.layers[layer.descriptor.digest].done_bytes = done


def _facts(layer: LayerPlan, blobs: Mapping[Digest, int]) -> LayerFacts:
    digest = layer.descriptor.digest
    return LayerFacts(layer.descriptor, layer.packing, blobs.get(digest, -1), f"layer {digest.short()}", layer.origin)
