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
        plan = self._plan(self._chosen(self._request.manifest))
        plan = replace(plan, layers=tuple(self._settled(layer) for layer in plan.layers))
        members: dict[int, Iterable[Member]] = {}
        decoded_bytes: dict[int, int] = {}
        for position, found in self._indexes(plan).items():
            members[position] = found.members
            if plan.layers[position].packing is not Packing.TAR:
                decoded_bytes[position] = found.decoded_bytes
        content = assemble(plan, members, decoded_bytes=decoded_bytes, view=self._request.view, warn=log.warning)
        return file_format.dump(content)

    def _chosen(self, sent: SentManifest) -> Manifest:
        """The manifest, or the one that its index and the view's selector lead to."""
        platform = variants.platform_of(os.uname().sysname, os.uname().machine)
        for depth in range(variants.MAX_DEPTH + 1):
            parsed = parse(sent.data, sent.media_type)
            if isinstance(parsed, Manifest):
                if self._request.view.variant and not depth:
                    raise UnsupportedModelError("manifest: a single model, not an index; leave out 'variant'")
                return parsed
            entry = variants.pick(parsed, self._request.view.variant if not depth else "", platform)
            self.chosen = str(entry.descriptor.digest)
            sent = self._need(self.chosen)
        raise UnsupportedModelError(
            f"more than {variants.MAX_DEPTH} indexes lie in each other; name the model by digest"
        )

    def _need(self, digest: str) -> SentManifest:
        self.needs = digest
        self._wake()
        sent = self._manifests.get()
        if sent is None:
            raise ControlError("the preparation of the model was ended")
        return sent

    def _plan(self, manifest: Manifest) -> ModelPlan:
        config = None
        if needs_config(manifest):
            if manifest.config.size_bytes > MAX_CONFIG_BYTES:
                raise UnsupportedModelError(f"config: {manifest.config.size_bytes} bytes, limit {MAX_CONFIG_BYTES}")
            config = self._channel.read_whole(manifest.config)
        plan = plan_of(manifest, config)
        if plan.parent is not None:
            raise UnsupportedModelError(
                f"the kit builds on {plan.parent[:200]!r}, and parents are not read by this version; pack the whole model "
                "into one kit"
            )
        return plan

    def _settled(self, layer: LayerPlan) -> LayerPlan:
        if not layer.maybe_file:
            return layer
        facts = LayerFacts(layer.descriptor, layer.packing, -1, f"layer {layer.descriptor.digest.short()}")
        return layer.settle(self._scanner.first_member(facts))

    def _indexes(self, plan: ModelPlan) -> Mapping[int, LayerIndex]:
        """By layer position. A layer that is listed twice is read once."""
        found: dict[Digest, LayerIndex] = {}
        missing: dict[Digest, LayerPlan] = {}
        for position in plan.archives:
            layer = plan.layers[position]
            digest = layer.descriptor.digest
            if digest in found or digest in missing:
                continue
            kept = load_index(self._area_fd, layer.descriptor)
            self.layers[digest] = progress = LayerProgress(layer.descriptor.size_bytes, _WORKING[layer.packing])
            if kept is not None:
                found[digest] = kept
                progress.done_bytes, progress.mode = progress.size_bytes, _MODES[kept.access]
            else:
                missing[digest] = layer
        # Without block hashes the ranges with a tar's headers are checked later, when the whole blob is known to be right.
        by_ranges = self._request.verify is Verify.WHOLE
        whole = [layer for layer in missing.values() if layer.packing is not Packing.TAR or not by_ranges]
        if whole:
            self._channel.fetch([layer.descriptor for layer in whole])
        self.started_at = time.monotonic()
        for digest, layer in missing.items():
            blob = whole.index(layer) if layer in whole else -1
            facts = LayerFacts(layer.descriptor, layer.packing, blob, f"layer {digest.short()}")
            found[digest] = self._scanner.scan(facts)
            self.layers[digest].mode = _MODES[found[digest].access]
        return {position: found[plan.layers[position].descriptor.digest] for position in plan.archives}

    def _on_bytes(self, layer: LayerFacts, done: int) -> None:
        self.layers[layer.descriptor.digest].done_bytes = done
