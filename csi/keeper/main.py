"""`modelmount keeper`: one thread, one request at a time.

Serial on purpose: every operation takes milliseconds and touches only mount tables, the keeper's own directories
and the parents of targets, so nothing here can wait for a registry, a worker or a mounted file system.

A keeper that is restarted finds its records and mountinfo, but no descriptors. It gets them back from the supervisor
(`restore`), which notices by the end of its `watch` connection; or, started with --take-over, from the keeper that
still runs. What the supervisor does not bring back when it says `settle` is lost: nobody holds that connection.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import re
import selectors
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from csi import heap, mountinfo
from csi.boot import this_boot
from csi.control import endpoint, wire
from csi.control.keeper import SOCKET_NAME
from csi.errors import ControlError, InvalidVolumeError, ModelMountError, MountError, from_wire
from csi.fuse import handshake
from csi.fuse.handshake import BackendName
from csi.jail.privileges import raise_descriptor_limit
from csi.keeper import backing, syscalls
from csi.keeper.records import SuperblockRecords
from csi.keeper.sealed import SealedTrees
from csi.keeper.superblock import FUSE_DEVICE, Slot, Superblock, is_fuse_device, open_root, open_superblock
from csi.keeper.targets import Targets

log = logging.getLogger(__name__)

_RESEND_SINCE = (6, 9)
_MOUNT_ID = re.compile(r"[0-9a-f]{16,64}")
_SLOT = re.compile(r"[a-z]{1,16}")
_MAX_SLOTS, _MAX_SLOT_FDS = 4, 3  # with the connection and the root they fit into one message
_MAX_BACKINGS = 1024  # of one mount; they fit into one message
_IDLE_CLIENT_TIMEOUT_S = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class KeeperSettings:
    """`state_dir` holds the socket, the records and the superblocks' mount points; targets lie below `target_roots`.

    `take_over`: ask the keeper that runs for all it has, instead of refusing to start beside it.
    """

    state_dir: str
    target_roots: Sequence[str] = ("/",)
    allowed_uids: frozenset[int] = frozenset({0})
    backing_uid: int | None = None
    """Whose files a mount may show by passthrough, or as they are; None: nobody's."""
    sealed_dir: str | None = None
    """Where that user puts together models to be shown as plain files; None: none are."""
    take_over: bool = False


class Keeper:
    """The table of superblocks and the operations on it. Not thread-safe."""

    def __init__(self, settings: KeeperSettings) -> None:
        state_dir = os.path.realpath(settings.state_dir)
        self._mounts_dir = os.path.join(state_dir, "mounts")
        os.makedirs(self._mounts_dir, mode=0o700, exist_ok=True)
        self._records = SuperblockRecords(os.path.join(state_dir, "superblocks"), this_boot().hex())
        self._targets = Targets(settings.target_roots)
        self._backing_uid = settings.backing_uid
        self._sealed = SealedTrees(settings.sealed_dir, settings.backing_uid)
        self._superblocks: dict[str, Superblock] = {}

    def recover(self) -> None:
        """After a start: what mountinfo and the records agree on is there (without a descriptor yet), the rest goes."""
        records = self._records.load()
        entries = mountinfo.read()
        self._sealed.keep_shown(entries)
        for mount_id in sorted(set(records) | set(os.listdir(self._mounts_dir))):
            mount_point = self._mount_point(mount_id)
            record = records.get(mount_id)
            stacked = mountinfo.at(entries, mount_point)
            if record is None or not record.complete or not stacked or stacked[-1].device != record.device:
                log.warning("mount %s has %s; it is removed", mount_id, "no whole record" if stacked else "no mount")
                self._remove(mount_id)
                continue
            init = handshake.parse_init(bytes.fromhex(record.init))
            self._superblocks[mount_id] = Superblock(
                init, BackendName(record.backend), record.device, mount_point, open_root(mount_point), -1, -1
            )
        if self._superblocks:
            log.info("%d mounts found; waiting for a supervisor to bring their connections", len(self._superblocks))

    def handle(self, request: wire.Message, fds: list[int]) -> tuple[wire.Message, list[int]]:
        """The reply to one request and the descriptors to send with it (still ours).

        What it keeps of `fds` it takes out of the list; the caller closes the rest.
        """
        match request.get("op"):
            case "ping":
                return {
                    "pid": os.getpid(),
                    "kernel": platform.release(),
                    "init_set_version": handshake.INIT_SET_VERSION,
                }, []
            case "mount":
                mount_id = _mount_id(request)
                before = self._superblocks.get(mount_id)
                superblock = self._mount(mount_id, wire.field(request, "read_ahead_kb", int), _backend(request))
                return self._collected(mount_id, superblock, existed=superblock is before)
            case "collect":
                mount_id = _mount_id(request)
                return self._collected(mount_id, self._live(mount_id), existed=True)
            case "restore":
                self._restore(_mount_id(request), fds, _backings(request))
                return {}, []
            case "back":
                return self._back(_mount_id(request), fds), []
            case "unback":
                self._unback(_mount_id(request), wire.field(request, "backing_id", int))
                return {}, []
            case "settle":
                self._settle()
                return {}, []
            case "keep":
                self._keep(request, fds)
                return {}, []
            case "drop":
                held = self._superblocks.get(_mount_id(request))
                if held is not None and (slot := held.slots.pop(wire.field(request, "slot", str), None)):
                    slot.close()
                return {}, []
            case "bind":
                mount_id = _mount_id(request)
                target_path = wire.field(request, "target_path", str)
                held = self._superblocks.get(mount_id)
                if held is None:
                    raise MountError(f"target {target_path}: its mount is gone; publish again", target_path=target_path)
                return self._bind(mount_id, held, target_path, sealed=bool(request.get("sealed"))), []
            case "unbind":
                self._targets.unbind(wire.field(request, "target_path", str))
                if self._sealed.locked:
                    self._sealed.keep_shown(mountinfo.read())
                return {}, []
            case "unmount":
                self._remove(_mount_id(request))
                return {}, []
            case "list":
                held_all = self._superblocks.items()
                return {"mounts": [_describe(mount_id, one, existed=True) for mount_id, one in held_all]}, []
            case other:
                raise ControlError(f"keeper: unknown operation {other!r}")

    def hand_over(self, connection: socket.socket, listener: socket.socket) -> None:
        """Everything to the keeper at the other end: one message per mount, the listening socket last.

        Returns when the successor says that it has it all. Raises: ControlError otherwise; then we go on.
        """
        if lost := [mount_id for mount_id, held in self._superblocks.items() if not held.connected]:
            raise ControlError(f"keeper: {len(lost)} mounts wait for their supervisor; take over when they are back")
        for mount_id, held in self._superblocks.items():
            fields, fds = self._collected(mount_id, held, existed=True)
            wire.send(connection, {"op": "superblock", **fields}, fds)
        wire.send(connection, {"op": "listener"}, [listener.fileno()])
        received = wire.recv(connection)
        if received is None or received[0].get("op") != "taken":
            raise ControlError("the keeper that wanted to take over went away; this one goes on")

    def take_over(self, connection: socket.socket) -> socket.socket:
        """The other side of `hand_over`: the listening socket. Raises: ControlError, TimeoutError, OSError."""
        wire.send(connection, {"id": 1, "op": "hand_over"})
        while True:
            received = wire.recv(connection)
            if received is None:
                raise ControlError("the keeper that runs closed the connection during the hand-over")
            message, fds = received
            if "error" in message:
                raise from_wire(message["error"])
            if message.get("op") == "listener":
                listener = socket.socket(fileno=wire.exactly(fds, 1)[0])
                wire.send(connection, {"op": "taken"})
                self._sealed.keep_shown(mountinfo.read())
                log.info("took over %d mounts", len(self._superblocks))
                return listener
            mount_id = _mount_id(message)
            init = handshake.parse_init(bytes.fromhex(wire.field(message, "init", str)))
            notes = wire.field(message, "slots", list)
            wire.exactly(fds, 3 + sum(int(note["fds"]) for note in notes))
            device, mount_point = wire.field(message, "device", str), self._mount_point(mount_id)
            held = Superblock(init, _backend(message), device, mount_point, fds[2], fds[0], fds[1])
            held.backings = _backings(message)
            rest = fds[3:]
            for note in notes:
                held.slots[str(note["slot"])], rest = Slot(dict(note["note"]), rest[: note["fds"]]), rest[note["fds"] :]
            self._superblocks[mount_id] = held

    def _mount(self, mount_id: str, read_ahead_kb: int, backend: BackendName) -> Superblock:
        if held := self._superblocks.get(mount_id):
            if held.connected and _mounted(held):
                return held
            reason = "lost its connection" if not held.connected else "was unmounted from outside"
            log.warning("mount %s %s; it is made anew", mount_id, reason)
        self._remove(mount_id)  # first: a dead mount of a keeper that was killed answers no stat
        mount_point = self._mount_point(mount_id)
        self._records.put(mount_id, handshake.INIT_SET_VERSION, backend)
        try:
            os.makedirs(mount_point, mode=0o700, exist_ok=True)
            superblock = open_superblock(
                mount_point,
                read_ahead_kb,
                backend,
                lambda device, init: self._records.put(mount_id, handshake.INIT_SET_VERSION, backend, device, init.raw),
            )
        except BaseException:
            with contextlib.suppress(OSError):
                os.rmdir(mount_point)
            self._records.remove(mount_id)
            raise
        self._superblocks[mount_id] = superblock
        log.info("mounted %s as device %s for %s", mount_id, superblock.device, backend)
        return superblock

    def _bind(self, mount_id: str, held: Superblock, target_path: str, *, sealed: bool) -> wire.Message:
        """As plain files if it is wished and can be, else the superblock."""
        live = {one.device for one in self._superblocks.values()}  # a dead one was removed when it was made anew
        if sealed:
            try:
                root_fd = self._sealed.open(mount_id)
                try:
                    return {"bound": self._targets.bind(root_fd, mount_id, held.device, target_path, live)}
                finally:
                    self._sealed.keep_shown(mountinfo.read())
            except MountError as exc:
                log.warning("target %s: not shown as plain files: %s", target_path, exc)
        return {"bound": self._targets.bind(held.root_fd, mount_id, held.device, target_path, live)}

    def _remove(self, mount_id: str) -> None:
        mount_point = self._mount_point(mount_id)
        _detach_all(mount_point)
        if held := self._superblocks.pop(mount_id, None):
            held.close()
            log.info("unmounted %s", mount_id)
        try:
            os.rmdir(mount_point)
        except FileNotFoundError:
            pass
        except OSError as exc:
            raise MountError(f"mount {mount_id}: mount point not removed: {exc.strerror}", errno=exc.errno) from exc
        self._records.remove(mount_id)

    def _back(self, mount_id: str, fds: list[int]) -> wire.Message:
        """A file has one id for as long as the mount lives: the kernel allows an inode no other while it is open."""
        if (found := self._superblocks.get(mount_id)) is not None and not found.connected:
            raise ControlError(f"mount {mount_id}: its connection is on its way back to this keeper; try again")
        held = self._live(mount_id)
        if len(fds) != 1 or self._backing_uid is None:
            raise MountError(
                "passthrough: the keeper was given no descriptor, or no --backing-uid whose files it takes"
            )
        if refusal := backing.refusal_of(fds[0], self._backing_uid):
            raise MountError(f"passthrough: {refusal}")
        name = backing.name_of(fds[0])
        if name not in held.backings:
            if len(held.backings) >= _MAX_BACKINGS:
                raise MountError(f"passthrough: a mount has at most {_MAX_BACKINGS} files of the cache")
            held.backings[name] = backing.register(held.fd, fds[0])
        return {"file": name, "backing_id": held.backings[name]}

    def _unback(self, mount_id: str, backing_id: int) -> None:
        held = self._live(mount_id)
        for name in [name for name, known in held.backings.items() if known == backing_id]:
            del held.backings[name]
            with contextlib.suppress(OSError):
                backing.unregister(held.fd, backing_id)

    def _restore(self, mount_id: str, fds: list[int], backings: dict[str, int]) -> None:
        """A supervisor brings the descriptor of a mount back. One that is here already is kept."""
        held = self._superblocks.get(mount_id)
        if held is None or not _mounted(held):
            raise MountError(f"mount {mount_id}: is not among the mounts of this node")
        if len(fds) != 2 or not is_fuse_device(fds[0]):
            raise ControlError(f"keeper: restore of {mount_id} needs the descriptors of its connection and its table")
        if not held.connected:
            held.table_fd, held.fd = fds.pop(), fds.pop()
            held.backings = backings
            log.info("connection of mount %s is back", mount_id)

    def _settle(self) -> None:
        for mount_id in [mount_id for mount_id, held in self._superblocks.items() if not held.connected]:
            log.warning("nobody holds the connection of mount %s any more; it is removed", mount_id)
            self._remove(mount_id)

    def _keep(self, request: wire.Message, fds: list[int]) -> None:
        held = self._live(_mount_id(request))
        name, note = wire.field(request, "slot", str), wire.field(request, "note", dict)
        if not _SLOT.fullmatch(name) or len(held.slots) >= _MAX_SLOTS or not 1 <= len(fds) <= _MAX_SLOT_FDS:
            raise ControlError(f"keeper: slot {name[:40]!r} with {len(fds)} descriptors is not kept")
        if before := held.slots.pop(name, None):
            before.close()
        held.slots[name] = Slot(note, list(fds))
        fds.clear()

    def _live(self, mount_id: str) -> Superblock:
        held = self._superblocks.get(mount_id)
        if held is None or not held.connected:
            raise MountError(f"mount {mount_id}: nobody brought its connection to this keeper")
        return held

    def _collected(self, mount_id: str, held: Superblock, *, existed: bool) -> tuple[wire.Message, list[int]]:
        fds = [held.fd, held.table_fd, held.root_fd]
        slots = []
        for name, slot in held.slots.items():
            slots.append({"slot": name, "note": slot.note, "fds": len(slot.fds)})
            fds += slot.fds
        fields = _describe(mount_id, held, existed=existed)
        return fields | {"init": held.init.raw.hex(), "slots": slots, "backings": held.backings}, fds

    def _mount_point(self, mount_id: str) -> str:
        return os.path.join(self._mounts_dir, mount_id)


def kernel_version(release: str) -> tuple[int, int]:
    """`6.1.0-23-amd64` → (6, 1); (0, 0) for anything else."""
    match = re.match(r"(\d{1,4})\.(\d{1,4})", release)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _mounted(superblock: Superblock) -> bool:
    entries = mountinfo.at(mountinfo.read(), superblock.mount_point)
    return bool(entries) and entries[-1].device == superblock.device


def _detach_all(mount_point: str) -> None:
    while mountinfo.at(mountinfo.read(), mount_point):
        try:
            syscalls.detach(mount_point)
        except OSError as exc:
            raise MountError(f"unmount of {mount_point} failed: {exc.strerror}", errno=exc.errno) from exc


def _describe(mount_id: str, superblock: Superblock, *, existed: bool) -> wire.Message:
    return {
        "existed": existed,
        "mount_id": mount_id,
        "device": superblock.device,
        "init_set_version": handshake.INIT_SET_VERSION,
        "can_resend": handshake.can_resend(superblock.init),
        "backend": superblock.backend,
        "connected": superblock.connected,
    }


def _mount_id(request: wire.Message) -> str:
    mount_id = wire.field(request, "mount_id", str)
    if not _MOUNT_ID.fullmatch(mount_id):
        raise InvalidVolumeError(f"mount id {mount_id[:80]!r} is not hexadecimal", field="mount_id")
    return str(mount_id)


def _backings(message: wire.Message) -> dict[str, int]:
    return {str(name): int(backing_id) for name, backing_id in dict(message.get("backings", {})).items()}


def _backend(request: wire.Message) -> BackendName:
    try:
        return BackendName(wire.field(request, "backend", str))
    except ValueError as exc:
        raise InvalidVolumeError(f"{exc}; finish the upgrade of keeper and supervisor", field="backend") from None


def serve(settings: KeeperSettings) -> None:
    """Serve until SIGTERM, SIGINT or a hand-over. Mounts stay; their descriptors go with this process unless another
    holds them.

    Raises: MountError when /dev/fuse is missing, ControlError when another keeper runs (and is not to be taken over).
    """
    if not os.path.exists(FUSE_DEVICE):
        raise MountError(f"{FUSE_DEVICE} is missing; load the kernel's fuse module (modprobe fuse) and start again")
    raise_descriptor_limit()
    keeper = Keeper(settings)
    path = os.path.join(settings.state_dir, SOCKET_NAME)
    listener = _take_over(keeper, path) if settings.take_over else None
    if listener is None:
        listener = endpoint.listen(path)
        keeper.recover()
    log.info("keeper serves at %s", path)
    heap.give_back()
    if kernel_version(platform.release()) < _RESEND_SINCE:
        log.warning(
            "Linux %s has no FUSE_NOTIFY_RESEND (6.9): of a mount served by pyfuse3, requests a worker holds when it "
            "crashes stay unanswered until the mount is unpublished; the raw backend needs no RESEND",
            platform.release(),
        )
    with listener:
        if _Server(keeper, listener, settings.allowed_uids).run():
            os.unlink(path)


def _take_over(keeper: Keeper, path: str) -> socket.socket | None:
    """The listening socket of the keeper that runs, and its mounts; None when none runs."""
    try:
        connection = endpoint.connect(path, _IDLE_CLIENT_TIMEOUT_S)
    except ControlError:
        return None
    with connection:
        return keeper.take_over(connection)


class _Server:
    """The loop around a keeper."""

    def __init__(self, keeper: Keeper, listener: socket.socket, allowed_uids: frozenset[int]) -> None:
        self._keeper, self._listener, self._allowed_uids = keeper, listener, allowed_uids
        self._selector = selectors.DefaultSelector()
        self._handed_over = False

    def run(self) -> bool:
        """True when the socket's path is still ours to remove: False after a hand-over."""
        stop_read, stop_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(stop_write)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(stop_read, selectors.EVENT_READ)
        while not self._handed_over:
            for key, _ in self._selector.select():
                if key.fd == stop_read:
                    return True
                if key.fileobj is self._listener:
                    connection, _ = self._listener.accept()
                    if not self._serve_one(connection):
                        connection.close()
                elif isinstance(key.fileobj, socket.socket):  # a watcher says nothing, so this is its end
                    self._selector.unregister(key.fileobj)
                    key.fileobj.close()
        return False

    def _serve_one(self, connection: socket.socket) -> bool:
        """Answer one request. True when the connection stays open (`watch`)."""
        peer = endpoint.peer_of(connection)
        connection.settimeout(_IDLE_CLIENT_TIMEOUT_S)
        request: wire.Message = {}
        fds: list[int] = []
        reply_fds: list[int] = []
        try:
            received = wire.recv(connection)
            if received is None:
                return False
            request, fds = received
            if peer.uid not in self._allowed_uids:
                raise ControlError(f"keeper: uid {peer.uid} may not ask for mounts")
            if request.get("op") == "hand_over":
                self._keeper.hand_over(connection, self._listener)
                log.info("handed over to pid %d", peer.pid)
                self._handed_over = True
                return False
            if request.get("op") == "watch":
                self._selector.register(connection, selectors.EVENT_READ)
            fields, reply_fds = ({}, []) if request.get("op") == "watch" else self._keeper.handle(request, fds)
            reply = wire.ok(request, **fields)
        except TimeoutError:
            log.warning("pid %d connected to the keeper and sent nothing", peer.pid)
            return False
        except ModelMountError as exc:
            log.info("refused %s: %s", request.get("op"), exc)
            reply = wire.failed(request, exc)
        except Exception as exc:  # a bug must not take every mount of the node with it
            log.exception("operation %s failed", request.get("op"))
            reply = wire.failed(request, exc)
        finally:
            wire.close_all(fds)
        try:
            wire.send(connection, reply, reply_fds)
        except OSError as exc:
            log.warning("could not answer %s to pid %d: %s", request.get("op"), peer.pid, exc)
        return request.get("op") == "watch" and "ok" in reply
