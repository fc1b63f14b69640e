"""`modelmount worker`: started by the supervisor with one socket; everything else arrives over that socket.

    build    a manifest (and those of its parents), the mount's cache area, a channel to the fetcher: work begins (see `csi.worker.build`)
    built    how far that is: a serialised tree, an error, a manifest that is needed, or progress after a while
    provide  that manifest
    load     a tree and the mount's cache area: everything that can go wrong before the connection is ours
    serve    a kept /dev/fuse connection, a channel to the fetcher; answered when requests are being served
    fetcher  another channel, after the fetcher was replaced or the channel lost: `ping` is answered with whether there is one
    backings   which blobs the kernel may read by itself, and by which ids
    no_backing one that it may not any more; answered with whether it still is open so
    release  the last pod is gone: reads that wait for the network fail now, so that no process stays unkillable
    files    a tree: which files it has, each one whole blob, or why it cannot be shown as plain files
    stop     receive nothing any more, finish what was received within a patience, answer, exit; what is left then is its
             successor's

The worker remembers nothing that the tree and the cache do not say, so it may be killed at any time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any, NoReturn

import trio

from csi.cache.ring import BorrowedBlocks
from csi.control import wire
from csi.errors import ControlError, ModelMountError, RegistryUnavailableError, from_wire
from csi.fuse.backings import THROUGH_US, Backings
from csi.fuse.handshake import BackendName
from csi.fuse.port import DEFAULT_DEADLINE_S, Backend, Connection, ContentReader, Namespace
from csi.fuse.pyfuse3_backend import Pyfuse3Backend
from csi.fuse.raw_backend import RawBackend
from csi.jail.confinement import Level, Role, narrow_to
from csi.oci.digest import Digest
from csi.oci.view import View
from csi.stream.scheduler import Priority
from csi.tree.file_format import Tree
from csi.tree.model import Encoding, Entry
from csi.tree.sealing import plain_files
from csi.volume import Verify
from csi.worker.build import Build, BuildRequest, SentManifest
from csi.worker.build_channel import BuildChannel
from csi.worker.decoded import DecodingReader
from csi.worker.reader import READS_AT_ONCE, CachedReader
from csi.worker.recheck import recheck_headers

log = logging.getLogger(__name__)

_MAX_MANIFEST_BYTES = 4 * 1024 * 1024
_MAX_TREE_BYTES = 1 << 30
_MAX_REPORTED_LAYERS = 200
_STOP_PATIENCE_S = 1.5
_EVENT_INTERVAL_S = 10.0


class Worker:
    """The state machine behind the control socket. Runs in one trio task tree."""

    def __init__(self, control: socket.socket, jail: Level) -> None:
        control.setblocking(False)
        self._control = control
        self._jail = jail
        self._nursery: trio.Nursery | None = None
        self._backend: Backend | None = None
        self._raw: RawBackend | None = None
        self._backings: Backings | None = None
        self._reader: CachedReader | None = None
        self._tree: Tree | None = None
        self._area_fd = -1
        self._connection: Connection | None = None
        self._fetcher: socket.socket | None = None
        self._build: Build | None = None
        self._build_moved = trio.Event()
        self._stopping = False
        self._told_failed_at, self._untold_failures = -_EVENT_INTERVAL_S, 0

    async def run(self) -> None:
        """Until `stop`, the end of the control socket or of the connection."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            while True:
                await trio.lowlevel.wait_readable(self._control.fileno())
                try:
                    received = wire.recv(self._control)
                except BlockingIOError:
                    continue
                if received is None:
                    # Supervisor and keeper: nobody knows of this worker any more, and two readers of one connection can
                    # freeze each other.
                    log.warning("supervisor and keeper are gone; this worker ends")
                    await self._stop(_STOP_PATIENCE_S)
                    nursery.cancel_scope.cancel()
                    return
                request, fds = received
                if request.get("op") == "stop":
                    await self._stop(float(request.get("patience_s", _STOP_PATIENCE_S)))
                    self._reply(wire.ok(request))
                    end_now()
                try:
                    self._handle(request, fds)
                except ModelMountError as exc:
                    self._reply(wire.failed(request, exc))
                except Exception as exc:
                    log.exception("%s failed by a bug", request.get("op"))
                    self._reply(wire.failed(request, exc))

    def _handle(self, request: wire.Message, fds: list[int]) -> None:
        match request.get("op"):
            case "ping":
                serving = self._connection is not None
                linked = self._fetcher is not None  # else the supervisor, which asks, sends another channel
                idle_s = self._backend.idle_s if serving and self._backend is not None else 0.0
                said = {"pid": os.getpid(), "serving": serving, "linked": linked, "idle_s": round(idle_s, 1)}
                self._reply(wire.ok(request, jail=self._jail.as_fields(), **said))
            case "build":
                self._start_build(request, fds)
            case "built":
                wire.close_all(fds)
                assert self._nursery is not None
                self._nursery.start_soon(self._answer_built, request)
            case "provide":
                self._provide(request, wire.exactly(fds, 1)[0])
                self._reply(wire.ok(request))
            case "load":
                self._load(request, fds)
                self._reply(wire.ok(request))
            case "serve":
                self._serve(request, fds)
            case "fetcher":
                self._attach_fetcher(wire.exactly(fds, 1)[0])
                self._reply(wire.ok(request))
            case "release":
                if self._reader is not None:
                    self._reader.fail_waiting(RegistryUnavailableError("the volume is being removed"))
                self._reply(wire.ok(request))
            case "backings":
                ids = wire.field(request, "ids", dict)
                if self._backings is not None:
                    if request.get("anew"):
                        self._backings.forget_all()
                    self._backings.use({Digest.parse(digest): int(backing_id) for digest, backing_id in ids.items()})
                self._reply(wire.ok(request))
            case "files":
                self._list_files(request, wire.exactly(fds, 1)[0])
            case "no_backing":
                self._reply(wire.ok(request, open=self._forget_backing(wire.field(request, "digest", str))))
            case "stats":
                counters = self._reader.counters if self._reader else {}
                opens = self._raw.counters if self._raw else {}
                self._reply(wire.ok(request, **counters, **opens))
            case other:
                wire.close_all(fds)
                raise ControlError(f"worker: unknown operation {other!r}")

    def _start_build(self, request: wire.Message, fds: list[int]) -> None:
        parents = request.get("parents", [])
        manifest_fd, area_fd, channel_fd, *parent_fds = wire.exactly(fds, 3 + len(parents))
        if self._build is not None:
            wire.close_all(fds)
            raise ControlError("worker: a model is being built already")
        token = trio.lowlevel.current_trio_token()

        def wake() -> None:
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(self._build_moves)

        self._build = Build(
            BuildRequest(
                _read_manifest(request, manifest_fd),
                View.parse(wire.field(request, "view", dict)),
                Verify(wire.field(request, "verify", str)),
                tuple(
                    (wire.field(parent, "origin", str), _read_manifest(parent, fd))
                    for parent, fd in zip(parents, parent_fds, strict=True)
                ),
            ),
            BuildChannel(socket.socket(fileno=channel_fd)),
            area_fd,
            wake,
        )
        self._build.start()
        self._reply(wire.ok(request))

    def _provide(self, request: wire.Message, manifest_fd: int) -> None:
        manifest = _read_manifest(request, manifest_fd)
        if self._build is None:
            raise ControlError("worker: no model is being built")
        self._build.provide(manifest)

    def _build_moves(self) -> None:
        self._build_moved.set()
        self._build_moved = trio.Event()

    async def _answer_built(self, request: wire.Message) -> None:
        """At once when there is something to say, else after `patience_s`."""
        build = self._build
        if build is None:
            self._reply(wire.failed(request, ControlError("worker: no model is being built")))
            return
        with trio.move_on_after(float(request.get("patience_s", 1.0))):
            while not build.is_done and build.needs is None:
                await self._build_moved.wait()
        if build.error is not None:
            self._reply(wire.failed(request, build.error))
        elif build.tree is not None:
            tree = Tree(build.tree)
            tree_fd = wire.memfd("tree", build.tree)
            summary = {"files": tree.files, "total_bytes": tree.total_bytes, "blobs": len(tree.blobs)}
            try:
                self._reply(wire.ok(request, summary=summary, **_report(build)), [tree_fd])
            finally:
                os.close(tree_fd)
            self._build = None
        else:
            self._reply(wire.ok(request, needs=build.needs, **_report(build)))

    def _load(self, request: wire.Message, fds: list[int]) -> None:
        tree_fd, area_fd = wire.exactly(fds, 2)
        backend_name = BackendName(wire.field(request, "backend", str))
        if os.fstat(tree_fd).st_size > _MAX_TREE_BYTES:
            raise ModelMountError("the tree file is larger than 1 GiB")
        narrow_to(Role.WORKER, area_fd)
        threading.Thread(target=int, name="trial").start()  # limits that allow none show now, not in a read
        tree = self._tree = Tree.from_fd(tree_fd)
        os.close(tree_fd)
        deadline_s = float(request.get("read_deadline_s", DEFAULT_DEADLINE_S))
        reads = int(request.get("reads_at_once", READS_AT_ONCE))
        reader = self._reader = CachedReader(tree, area_fd, self, deadline_s, self._on_failed_read, reads)
        has_encoded = any(blob.encoding is not Encoding.IDENTITY for blob in tree.blobs)
        content: ContentReader = DecodingReader(tree, area_fd, reader) if has_encoded else reader
        self._backend = self._made_backend(backend_name, tree, content, deadline_s)
        self._area_fd = area_fd

    def _serve(self, request: wire.Message, fds: list[int]) -> None:
        fuse_fd, table_fd, channel_fd = wire.exactly(fds, 3)
        if self._backend is None or self._tree is None or self._connection is not None:
            wire.close_all(fds)
            raise ControlError("worker: serve once, after load")
        self._connection = Connection(fuse_fd, bytes.fromhex(wire.field(request, "init", str)), table_fd)
        self._attach_fetcher(channel_fd)
        assert self._nursery is not None
        if request.get("recheck"):
            self._nursery.start_soon(recheck_headers, self._tree, self._area_fd, self._distrust)
        self._nursery.start_soon(
            self._serve_connection,
            self._backend,
            self._connection,
            lambda: self._reply(wire.ok(request, **self._jail.as_fields())),
        )

    def _list_files(self, request: wire.Message, tree_fd: int) -> None:
        try:
            listed = [[path, str(digest), size] for path, digest, size in plain_files(Tree.from_fd(tree_fd))]
        except ValueError as exc:
            self._reply(wire.ok(request, refusal=str(exc)))
            return
        finally:
            os.close(tree_fd)
        files_fd = wire.memfd("files", json.dumps(listed).encode())
        try:
            self._reply(wire.ok(request), [files_fd])
        finally:
            os.close(files_fd)

    def _made_backend(self, name: BackendName, tree: Tree, content: ContentReader, deadline_s: float) -> Backend:
        if name is BackendName.PYFUSE3:
            return Pyfuse3Backend(Namespace(tree), content)
        self._backings = Backings(tree)
        self._raw = RawBackend(Namespace(tree), content, self._backings, deadline_s)
        return self._raw

    def _forget_backing(self, digest: str) -> bool:
        if self._backings is None or self._raw is None:
            return False
        backing_id = self._backings.forget(Digest.parse(digest))
        return backing_id == THROUGH_US or self._raw.is_open_by(backing_id)

    async def _serve_connection(self, backend: Backend, connection: Connection, on_serving: Any) -> None:
        await backend.serve(connection, on_serving)
        assert self._nursery is not None
        if not self._stopping:  # else whoever told us to leave is to hear that we do
            self._nursery.cancel_scope.cancel()

    async def _stop(self, patience_s: float) -> None:
        self._stopping = True
        if self._backend is not None:
            self._backend.stop()
            with trio.move_on_after(patience_s):
                await self._backend.wait_stopped()

    def _attach_fetcher(self, channel_fd: int) -> None:
        """Use a new channel; the old one, if any, ends with its task."""
        channel = socket.socket(fileno=channel_fd)
        channel.setblocking(False)
        self._fetcher = channel
        assert self._tree is not None
        assert self._reader is not None
        assert self._nursery is not None
        specs = [[str(blob.digest), blob.size_bytes, blob.origin] for blob in self._tree.blobs]
        specs_fd = wire.memfd("blobs", json.dumps(specs).encode())
        try:
            wire.send(channel, {"op": "blobs"}, [specs_fd])
        except OSError as exc:
            log.warning("the new fetcher went away at once: %s", exc)
        finally:
            os.close(specs_fd)
        self._nursery.start_soon(self._listen_to_fetcher, channel)
        self._reader.ask_again()

    async def _listen_to_fetcher(self, channel: socket.socket) -> None:
        """Until the channel ends, or another takes its place."""
        try:
            await self._hear_fetcher(channel)
        finally:
            if channel is self._fetcher:
                self._fetcher = None

    async def _hear_fetcher(self, channel: socket.socket) -> None:
        assert self._reader is not None
        with channel:
            while channel is self._fetcher:
                await trio.lowlevel.wait_readable(channel.fileno())
                if channel is not self._fetcher:
                    return  # what a fetcher that is gone has lent lies in its own ring
                try:
                    received = wire.recv(channel)
                except BlockingIOError:
                    continue
                except (OSError, ControlError) as exc:
                    log.warning("fetcher channel: %s", exc)
                    return
                if received is None:
                    return  # the supervisor sends the channel of another fetcher, or hears that we have none
                message, fds = received
                if message.get("op") == "ring":
                    self._reader.use_ring(BorrowedBlocks(wire.exactly(fds, 1)[0]))
                wire.close_all(fds)
                match message:
                    case {"op": "lent", "blob": int(blob), "block": int(block), "slot": int(slot)}:
                        self._reader.block_lent(blob, block, slot)
                    case {"op": "have", "blob": int(blob), "block": int(block)}:
                        self._reader.block_arrived(blob, block)
                    case {"op": "fail", "blob": int(blob), "block": int(block), "error": dict(error)}:
                        self._reader.block_failed(blob, block, from_wire(error))
                    case {"op": "trouble", "error": dict(error), "tries": int(tries)}:
                        self._reader.note_error(from_wire(error), tries)

    def _on_failed_read(self, entry: Entry, error: ModelMountError) -> None:
        """People hear of it, if not of every one: a reader that fails once fails often."""
        now = time.monotonic()
        if now - self._told_failed_at < _EVENT_INTERVAL_S:
            self._untold_failures += 1
            return
        assert self._tree is not None
        text = f"reading {self._tree.path(entry.inode)} failed (EIO): {error}"
        log.error("%s; %d other reads since the last such line", text, self._untold_failures)
        self._told_failed_at, self._untold_failures = now, 0
        self._reply({"op": "event", "reason": "ReadFailed", "message": text})

    def _distrust(self, blob: int) -> None:
        if self._fetcher is not None:
            with contextlib.suppress(OSError):  # the next worker finds out again
                wire.send(self._fetcher, {"op": "distrust", "blob": blob})

    def ask(self, blob: int, first: int, count: int, priority: Priority) -> None:
        """See `FetcherPort`: a waiting read asks again."""
        self._tell_fetcher({"op": "want", "blob": blob, "first": first, "count": count, "class": int(priority)})

    def report_damaged(self, blob: int, block: int) -> None:
        """See `FetcherPort`."""
        self._tell_fetcher({"op": "damaged", "blob": blob, "block": block})

    def give_back(self, slots: list[int]) -> bool:
        """See `FetcherPort`."""
        return self._tell_fetcher({"op": "returned", "slots": slots})

    def _tell_fetcher(self, message: wire.Message) -> bool:
        if self._fetcher is None:
            return False
        try:
            wire.send(self._fetcher, message)
        except OSError as exc:
            log.debug("fetcher not reachable: %s", exc)
            return False
        return True

    def _reply(self, message: wire.Message, fds: Sequence[int] = ()) -> None:
        try:
            wire.send(self._control, message, fds)
        except OSError as exc:
            log.warning("supervisor not reachable: %s", exc)


def end_now() -> NoReturn:
    """From here on the connection is another worker's: no read that is still in a thread may answer, or free its slot."""
    logging.shutdown()
    os._exit(0)


def _read_manifest(request: wire.Message, manifest_fd: int) -> SentManifest:
    try:
        data = wire.read_all(manifest_fd, _MAX_MANIFEST_BYTES, "manifest")
    finally:
        os.close(manifest_fd)
    return SentManifest(data, wire.field(request, "media_type", str))


def _report(build: Build) -> dict[str, Any]:
    """What people want to know of a build. At most as many layers as a message takes."""
    layers = [
        {"digest": str(digest), **dataclasses.asdict(progress)}
        for digest, progress in list(build.layers.items())[:_MAX_REPORTED_LAYERS]
    ]
    return {
        "layers": layers,
        "more_layers": len(build.layers) - len(layers),
        "done_bytes": sum(layer.done_bytes for layer in build.layers.values()),
        "size_bytes": sum(layer.size_bytes for layer in build.layers.values()),
        "seconds": time.monotonic() - build.started_at,
        "chosen": build.chosen,
        "warnings": build.warnings,
    }


def run(control_fd: int, jail: Level) -> int:
    """The process, in its jail. Returns the exit status."""
    trio.run(Worker(socket.socket(fileno=control_fd), jail).run)
    return 0
