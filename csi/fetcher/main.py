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
    announce     say again which proven blobs are in place
    stop         answer, and end

Here is who is asked what; the work is done elsewhere:

    resolving      what a reference names            `csi.fetcher.resolving`
    sources        where bytes come from             `csi.fetcher.mount_sources`
    serving        the engine and who talks to it    `csi.fetcher.serving`
    worker         the channel to it                 `csi.fetcher.worker_link`

To a worker it sends `ring` (shared memory; again when it has taken new), and says `lent` (the block is in that slot,
until the worker says `returned`), `have` (the block is marked in the shared map), `fail` (it will not come) and
`trouble` (what readers should be told when their deadline passes). These may be lost; workers ask again.
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
from dataclasses import replace
from typing import TYPE_CHECKING

from csi.cache.allowance import Allowance
from csi.cache.blob import make_directory
from csi.control import wire
from csi.errors import ControlError, ModelMountError
from csi.fetcher.answers import Answers
from csi.fetcher.build import BuildService
from csi.fetcher.engine import MOST_THREADS, EngineSettings
from csi.fetcher.index_source import load_index
from csi.fetcher.mount_sources import MountSources
from csi.fetcher.possession import known_origins, prove_possession, remember_origins
from csi.fetcher.resolving import Resolver, shareable
from csi.fetcher.serving import MountStart, ServedMount, Surroundings
from csi.fetcher.worker_link import RING_SLOTS, WorkerLink
from csi.jail.confinement import Level, Role, narrow_to
from csi.oci.digest import Digest
from csi.volume import Verify

if TYPE_CHECKING:
    from csi.fetcher.signed_indexes import SignedIndexes

log = logging.getLogger(__name__)


class Fetcher:
    """The process's state. The main thread reads sockets; `resolve`, `prove`, the build and the engine have threads of their
    own.
    """

    def __init__(self, control: socket.socket, jail: Level, signed_indexes: SignedIndexes | None = None) -> None:
        # A supervisor that died may leave nobody who reads: then what we say is lost, and nothing here waits for it.
        control.setblocking(False)
        self._control = control
        self._jail = jail
        self._signed_indexes = signed_indexes
        self._answers = Answers(control, "supervisor", logging.WARNING)
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ)
        self._sources = MountSources()
        self._resolver = Resolver(self._answers, self._sources, signed_indexes)
        self._worker = WorkerLink(self._selector)
        self._allowance = Allowance(self._say_room)
        self._mount: ServedMount | None = None
        self._build: BuildService | None = None

    def run(self) -> None:
        """Until `stop`, or until nobody holds the other end of the control socket: supervisor and keeper are gone."""
        while True:
            for key, _ in self._selector.select(self._worker.give_memory_back()):
                if key.fileobj is self._control:
                    try:
                        received = wire.recv(self._control)
                    except BlockingIOError:
                        continue
                    if received is None or received[0].get("op") == "stop":
                        if self._build is not None:
                            self._build.stop()
                        if received is not None:
                            self._answers.ok(received[0])
                        return
                    self._on_request(*received)
                elif self._worker.is_of(key.fileobj) and (said := self._worker.receive()) is not None:
                    mount = self._ready()  # a worker comes after it
                    try:
                        mount.on_worker(*said)
                    except ModelMountError as exc:  # no engine without a cache: say why, and start again
                        log.error("cannot serve the worker: %s", exc)
                        mount.say_trouble("CacheFailure", exc)
                        return

    def _on_request(self, request: wire.Message, fds: list[int]) -> None:
        answer = self._answers
        with answer.failures_of(request):
            match request.get("op"):
                case "ping":
                    serving = self._mount is not None
                    answer.ok(request, pid=os.getpid(), jail=self._jail.as_fields(), serving=serving)
                case "resolve":
                    # In a thread: a registry that does not answer must not keep credentials or stats waiting.
                    index = self._mount.start.index if self._mount is not None else None
                    arguments = (request, fds, index)
                    threading.Thread(target=self._resolver.resolve, args=arguments, daemon=True, name="resolve").start()
                case "known":
                    self._resolver.use_known(request, wire.exactly(fds, 1)[0])
                case "start":
                    self._start(request, fds)
                case "prove":
                    threading.Thread(target=self._prove, args=(request,), daemon=True, name="prove").start()
                case "build":
                    self._serve_build(wire.exactly(fds, 1)[0])
                    answer.ok(request)
                case "fill":
                    self._ready().fill()
                    answer.ok(request)
                case "challenge":
                    (challenges_fd,) = wire.exactly(fds, 1)
                    self._ready().challenge(challenges_fd)
                    answer.ok(request)
                case "shared":
                    digest = Digest.parse(wire.field(request, "digest", str))
                    self._ready().adopt_shared(digest, fresh=wire.field(request, "fresh", bool))
                    answer.ok(request)
                case "grant":
                    self._allowance.add(wire.field(request, "size_bytes", int))
                    self._ready().write_again()
                    answer.ok(request)
                case "hosts":
                    self._sources.use_hosts(wire.exactly(fds, 1)[0])
                    answer.ok(request)
                case "worker":
                    self._attach_worker(wire.exactly(fds, 1)[0])
                    answer.ok(request)
                case "credentials":
                    self._use_sources(request, fds)
                    if self._mount is not None:
                        remember_origins(self._mount.start.area_fd, request.get("proven", ()))
                    answer.ok(request)
                case "repeat":
                    answer.ok(request)
                    self._ready().tell_complete_again()
                    self._allowance.tell()
                case "announce":
                    wire.close_all(fds)
                    self._ready().announce()
                    answer.ok(request)
                case "stats":
                    answer.ok_with(request, "stats", json.dumps(self._ready().snapshot()).encode())
                case other:
                    wire.close_all(fds)
                    raise ControlError(f"fetcher: unknown operation {other!r}")

    def _ready(self) -> ServedMount:
        if self._mount is None:
            raise ControlError("fetcher: it serves no mount yet; start it first")
        return self._mount

    def _start(self, request: wire.Message, fds: list[int]) -> None:
        """Answers with memfds: the layers worth sharing, for the store, which finds a directory for each of them; the model's
        own, then those of every parent.
        """
        if len(fds) < 2 or self._mount is not None:
            wire.close_all(fds)
            raise ControlError("fetcher: start needs the sources and the cache area, once")
        sources_fd, area_fd = fds[:2]
        narrow_to(Role.FETCHER, area_fd)  # before the engine's threads start, which inherit it
        threads = wire.field(request, "threads", int)
        settings = EngineSettings(
            threads=threads,
            most_threads=max(threads, int(request.get("most_threads", MOST_THREADS))),
            fill=wire.field(request, "fill", bool),
        )
        self._worker.make_ring(int(request.get("lent_blocks", RING_SLOTS)))
        self._allowance.add(wire.field(request, "allowance", int))
        self._use_sources(request, [sources_fd, *fds[2:]])
        origins = self._sources.origins
        root, manifests = self._resolver.take()
        layers = [shareable(manifests.get(origin, ())) for origin in (origins.own[0].origin, *origins.parents)]
        index, index_word = None, "none"
        if Verify(wire.field(request, "verify", str)) is Verify.CHUNK:
            digest = Digest.parse(wire.field(request, "digest", str))
            index, index_word = load_index(
                area_fd,
                origins.own[0],
                digest,
                root if root is not None and root.digest == digest else None,
                self._signed_indexes,
                wire.field(request, "variant", str),
            )
        for name in dict.fromkeys(name for blobs in layers for name, _ in blobs):
            with contextlib.suppress(OSError):  # what cannot be shared is fetched
                make_directory(area_fd, Digest.parse(name))
        around = Surroundings(self._answers, self._worker, self._sources, self._allowance)
        self._mount = ServedMount(MountStart(area_fd, index, index_word, settings), around)
        self._answers.ok_with(
            request,
            "layers",
            *(json.dumps(blobs).encode() for blobs in layers),
            origins=known_origins(area_fd),
            index=index_word,
            **self._jail.as_fields(),
        )

    def _prove(self, request: wire.Message) -> None:
        """That the mount may show what others have fetched, or will."""
        with self._answers.failures_of(request):
            start, source = self._ready().start, self._sources.origins.own[0]
            if start.index is None:
                raise ControlError("fetcher: nothing to prove without a block index")
            prove_possession(source, start.index)
            remember_origins(start.area_fd, [source.origin])
            self._answers.ok(request)

    def _attach_worker(self, channel_fd: int) -> None:
        if self._mount is None:
            os.close(channel_fd)
            raise ControlError("fetcher: a worker was attached before resolve and start")
        self._worker.attach(channel_fd)

    def _serve_build(self, channel_fd: int) -> None:
        channel = socket.socket(fileno=channel_fd)
        if self._mount is None:
            channel.close()
            raise ControlError("fetcher: build before start")
        if self._build is not None:
            self._build.stop()
        self._build = BuildService(
            channel,
            lambda: self._sources.origins,
            self._mount.start.area_fd,
            replace(self._mount.settings, fill=True),
            self._mount.start.index,
            self._mount.on_wrong,
            self._allowance,
        )
        self._build.start()

    def _say_room(self) -> None:
        """What the cache keeps free for us, and how much more we want. What a build will make of a layer is not known."""
        building = self._build is not None and self._build.is_running
        needed = None if self._mount is None or building else self._mount.needed_bytes()
        left, wanted = self._allowance.settle(needed)
        self._answers.say({"op": "grant", "left_bytes": left, "wanted_bytes": wanted})

    def _use_sources(self, request: wire.Message, fds: list[int]) -> None:
        """Fetch from these from now on. The first descriptor has the list, which may be too large for a message; a second is
        the directory of a layout.
        """
        if not fds:
            raise ControlError("fetcher: credentials without the sources they are for")
        unused = self._sources.use(request, fds[0], fds[1:])
        if self._mount is not None:
            self._mount.use_origins()
        if self._build is not None:
            self._build.use_origins(self._sources.origins)
        for source in unused:
            source.close()


def run(control_fd: int, jail: Level, signed_indexes: SignedIndexes | None = None) -> int:
    """The process, in its jail. Returns the exit status."""
    os.umask(0o002)  # the store's group may link and remove
    Fetcher(socket.socket(fileno=control_fd), jail, signed_indexes).run()
    # Threads may be in a read that stalls; nothing they hold needs an orderly end.
    sys.stderr.flush()
    os._exit(0)
