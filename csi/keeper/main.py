"""`modelmount keeper`: one thread, one request at a time.

Serial on purpose: every operation takes milliseconds and touches only mount tables, the keeper's own directories
and the parents of targets, so nothing here can wait for a registry, a worker or a mounted file system.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import selectors
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from csi import mountinfo
from csi.control import endpoint, wire
from csi.control.keeper import SOCKET_NAME
from csi.errors import ControlError, InvalidVolumeError, ModelMountError, MountError
from csi.fuse import handshake
from csi.fuse.handshake import BackendName
from csi.keeper import syscalls
from csi.keeper.superblock import FUSE_DEVICE, Superblock, open_superblock
from csi.keeper.targets import Targets

log = logging.getLogger(__name__)

_RESEND_SINCE = (6, 9)
_MOUNT_ID = re.compile(r"[0-9a-f]{16,64}")
_IDLE_CLIENT_TIMEOUT_S = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class KeeperSettings:
    """`state_dir` holds the socket and the superblocks' mount points; targets lie below `target_roots`."""

    state_dir: str
    target_roots: Sequence[str] = ("/",)
    allowed_uids: frozenset[int] = frozenset({0})


class Keeper:
    """The table of superblocks and the operations on it. Not thread-safe."""

    def __init__(self, settings: KeeperSettings) -> None:
        self._mounts_dir = os.path.join(os.path.realpath(settings.state_dir), "mounts")
        os.makedirs(self._mounts_dir, mode=0o700, exist_ok=True)
        self._targets = Targets(settings.target_roots)
        self._superblocks: dict[str, Superblock] = {}

    def handle(self, request: wire.Message) -> tuple[wire.Message, list[int]]:
        """The reply to one request and the descriptors to send with it (still ours)."""
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
                fields = _describe(mount_id, superblock, existed=superblock is before)
                return fields | {"init": superblock.init.raw.hex()}, [superblock.fd, superblock.table_fd]
            case "bind":
                mount_id = _mount_id(request)
                target_path = wire.field(request, "target_path", str)
                held = self._superblocks.get(mount_id)
                if held is None:
                    raise MountError(f"target {target_path}: its mount is gone; publish again", target_path=target_path)
                return {"bound": self._targets.bind(held.mount_point, held.device, target_path)}, []
            case "unbind":
                self._targets.unbind(wire.field(request, "target_path", str))
                return {}, []
            case "unmount":
                self._unmount(_mount_id(request))
                return {}, []
            case "list":
                held_all = self._superblocks.items()
                return {"mounts": [_describe(mount_id, one, existed=True) for mount_id, one in held_all]}, []
            case other:
                raise ControlError(f"keeper: unknown operation {other!r}")

    def _mount(self, mount_id: str, read_ahead_kb: int, backend: BackendName) -> Superblock:
        if held := self._superblocks.get(mount_id):
            if _mounted(held):
                return held
            log.warning("mount %s was unmounted from outside; it is made anew", mount_id)
            self._unmount(mount_id)
        mount_point = os.path.join(self._mounts_dir, mount_id)
        _detach_all(mount_point)  # first: a dead mount of a keeper that was killed answers no stat
        os.makedirs(mount_point, mode=0o700, exist_ok=True)
        try:
            superblock = open_superblock(mount_point, read_ahead_kb, backend)
        except BaseException:
            os.rmdir(mount_point)
            raise
        self._superblocks[mount_id] = superblock
        log.info("mounted %s as device %s for %s", mount_id, superblock.device, backend)
        return superblock

    def _unmount(self, mount_id: str) -> None:
        mount_point = os.path.join(self._mounts_dir, mount_id)
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
    }


def _mount_id(request: wire.Message) -> str:
    mount_id = wire.field(request, "mount_id", str)
    if not _MOUNT_ID.fullmatch(mount_id):
        raise InvalidVolumeError(f"mount id {mount_id[:80]!r} is not hexadecimal", field="mount_id")
    return str(mount_id)


def _backend(request: wire.Message) -> BackendName:
    try:
        return BackendName(wire.field(request, "backend", str))
    except ValueError as exc:
        raise InvalidVolumeError(f"{exc}; finish the upgrade of keeper and supervisor", field="backend") from None


def serve(settings: KeeperSettings) -> None:
    """Serve until SIGTERM or SIGINT. Mounts stay; their descriptors go with this process unless another holds them.

    Raises: MountError when /dev/fuse is missing, ControlError when another keeper runs.
    """
    if not os.path.exists(FUSE_DEVICE):
        raise MountError(f"{FUSE_DEVICE} is missing; load the kernel's fuse module (modprobe fuse) and start again")
    keeper = Keeper(settings)
    path = os.path.join(settings.state_dir, SOCKET_NAME)
    listener = endpoint.listen(path)
    stop_read, stop_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(stop_write)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(stop_read, selectors.EVENT_READ)
    log.info("keeper serves at %s", path)
    if kernel_version(platform.release()) < _RESEND_SINCE:
        log.warning(
            "Linux %s has no FUSE_NOTIFY_RESEND (6.9): of a mount served by pyfuse3, requests a worker holds when it "
            "crashes stay unanswered until the mount is unpublished; the raw backend needs no RESEND",
            platform.release(),
        )
    try:
        while True:
            for key, _ in selector.select():
                if key.fd == stop_read:
                    return
                connection, _ = listener.accept()
                with connection:
                    _serve_one(keeper, connection, settings.allowed_uids)
    finally:
        listener.close()
        os.unlink(path)


def _serve_one(keeper: Keeper, connection: socket.socket, allowed_uids: frozenset[int]) -> None:
    peer = endpoint.peer_of(connection)
    connection.settimeout(_IDLE_CLIENT_TIMEOUT_S)
    request: wire.Message = {}
    try:
        received = wire.recv(connection)
        if received is None:
            return
        request, fds = received
        wire.close_all(fds)
        if peer.uid not in allowed_uids:
            raise ControlError(f"keeper: uid {peer.uid} may not ask for mounts")
        fields, reply_fds = keeper.handle(request)
        reply = wire.ok(request, **fields)
    except TimeoutError:
        log.warning("pid %d connected to the keeper and sent nothing", peer.pid)
        return
    except ModelMountError as exc:
        log.info("refused %s: %s", request.get("op"), exc)
        reply, reply_fds = wire.failed(request, exc), []
    except Exception as exc:  # a bug must not take every mount of the node with it
        log.exception("operation %s failed", request.get("op"))
        reply, reply_fds = wire.failed(request, exc), []
    try:
        wire.send(connection, reply, reply_fds)
    except OSError as exc:
        log.warning("could not answer %s to pid %d: %s", request.get("op"), peer.pid, exc)
