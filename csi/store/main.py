"""`modelmount store`: started by the supervisor with one socket; parses nothing that came from a registry.

    start    the domain's cache directory, that of all domains, the limits; directories of other layouts, which are emptied
    attach   a mount begins: what is proven is linked into its area; answers what its registry has to show first
    prove    a mount's registry has delivered the block it was asked for
    promote  a mount has a blob complete: hash it, share it. Answered at once; `shared` or `wrong` is said later
    backing  a descriptor of a proven blob that a mount has, for the kernel to read from; without one it is hashed first, and
             `proven` is said later
    seal     a mount's files, each one whole blob: put together a directory of them, to be shown as it is
    doubt    a mount has found a block of a proven blob damaged: it has to be hashed again before it is `backing`
    grant    what a mount may still allocate, and wants beyond it: how much more it may have, after eviction where it is needed
    ls, df, prune, verify, pin, unpin   what `modelmount cache` shows and does

One thread reads the socket; another does what takes long (hashing, copying, verifying), at the lowest priority, and the
most urgent of it first (`csi.store.work`).
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from csi.control import wire
from csi.errors import CacheError, ControlError, DigestMismatchError, ModelMountError, to_wire
from csi.jail.confinement import Level
from csi.oci.digest import Digest
from csi.store import leftovers
from csi.store.eviction import Entry, Kind, Limits, evict_for, room
from csi.store.reserves import Reserves, share_of
from csi.store.sealing import parse_files
from csi.store.shelf import Shelf, parse_blobs
from csi.store.work import Urgency, WorkQueue

log = logging.getLogger(__name__)

_MAX_LIST_BYTES = 16 * 1024 * 1024


class Store:
    """The process's state."""

    def __init__(self, control: socket.socket, jail: Level) -> None:
        self._control = control
        self._jail = jail
        self._send_lock = threading.Lock()
        self._shelf: Shelf | None = None
        self._limits = Limits()
        self._reserves = Reserves()
        self._evicted_bytes = 0
        self._admission = threading.Lock()
        self._work = WorkQueue()

    def run(self) -> None:
        """Until the supervisor closes the control socket."""
        threading.Thread(target=self._work_loop, daemon=True, name="work").start()
        while (received := wire.recv(self._control)) is not None:
            request, fds = received
            try:
                reply = self._handle(request, fds)
                if reply is not None:
                    self._send(wire.ok(request, **reply))
            except ModelMountError as exc:
                self._send(wire.failed(request, exc))
            except Exception as exc:
                log.exception("%s failed by a bug", request.get("op"))
                self._send(wire.failed(request, exc))

    def _handle(self, request: wire.Message, fds: list[int]) -> dict[str, Any] | None:
        """The reply, None when it was sent or will be."""
        match request.get("op"):
            case "ping":
                wire.close_all(fds)
                return {"pid": os.getpid(), "jail": self._jail.as_fields()}
            case "start":
                if len(fds) < 2:
                    raise ControlError("store: start needs the domain's directory, and that of all domains")
                self._shelf = Shelf(fds[0], wire.field(request, "boot", str), fds[1])
                for directory_fd in fds[2:]:
                    self._work.put(Urgency.CLEAN_UP, functools.partial(_remove_old, directory_fd))
                self._limits = Limits(
                    max_bytes=wire.field(request, "max_bytes", int), min_free=wire.field(request, "min_free", float)
                )
                return {}
            case "attach":
                return self._attach(request, wire.exactly(fds, 1)[0])
            case "seal":
                self._seal(request, wire.exactly(fds, 1)[0])
                return {}
        wire.close_all(fds)
        match request.get("op"):
            case "prove":
                digest = Digest.parse(wire.field(request, "digest", str))
                block = wire.field(request, "block", int)
                return {"shared": self._ready().prove(_mount_id(request), digest, block, _origins(request))}
            case "promote":
                self._work.put(Urgency.PROMOTE, lambda: self._promote(request))
                return {}
            case "backing":
                self._send_backing(request)
                return None
            case "doubt":
                self._ready().doubt(_mount_id(request), Digest.parse(wire.field(request, "digest", str)))
                return {}
            case "grant":
                return {"size_bytes": self._grant(request)}
            case "verify":
                self._verify(request)
                return None
            case "ls" | "df" | "prune" | "pin" | "unpin":
                self._answer(request, lambda: self._administered(request))
                return None
            case other:
                raise ControlError(f"store: unknown operation {other!r}")

    def _ready(self) -> Shelf:
        if self._shelf is None:
            raise ControlError("store: not started yet")
        return self._shelf

    def _attach(self, request: wire.Message, blobs_fd: int) -> dict[str, Any] | None:
        try:
            wanted = parse_blobs(json.loads(wire.read_all(blobs_fd, _MAX_LIST_BYTES, "layers")))
        finally:
            os.close(blobs_fd)
        attached = self._ready().attach(_mount_id(request), _origins(request), wanted)
        challenges_fd = wire.memfd(
            "challenges", json.dumps([[str(digest), block] for digest, block in attached.challenges]).encode()
        )
        try:
            fields = {"shared": len(attached.shared), "challenges": len(attached.challenges)}
            self._send(wire.ok(request, **fields), [challenges_fd])
        finally:
            os.close(challenges_fd)
        return None

    def _seal(self, request: wire.Message, files_fd: int) -> None:
        try:
            files = parse_files(json.loads(wire.read_all(files_fd, _MAX_LIST_BYTES, "files")))
        except (ValueError, TypeError) as exc:
            raise ControlError(f"store: the files of a mount are not as they should be: {exc}") from exc
        finally:
            os.close(files_fd)
        mount_id = _mount_id(request)
        if unproven := self._ready().seal(mount_id, files):
            for digest in unproven:
                self._work.put(Urgency.PROVE_AGAIN, functools.partial(self._prove_again, mount_id, digest))
            raise CacheError(
                f"{len(unproven)} of its blobs were not hashed since the machine started; that is done now"
            )

    def _promote(self, request: wire.Message) -> None:
        digest, mount_id = Digest.parse(wire.field(request, "digest", str)), _mount_id(request)
        size_bytes = wire.field(request, "size_bytes", int)
        try:
            if self._ready().size_of(digest) is None and self._make_room(size_bytes) < size_bytes:
                raise CacheError(f"blob {digest.short()}: no room for a copy that mounts can share")
            fresh = self._ready().promote(mount_id, digest, size_bytes, _origins(request))
        except DigestMismatchError as exc:
            log.error("%s", exc)
            self._send({"op": "wrong", "mount_id": mount_id, "error": to_wire(exc)})
        except CacheError as exc:
            log.warning("%s", exc)
        else:
            self._send({"op": "shared", "mount_id": mount_id, "digest": str(digest), "fresh": fresh})

    def _send_backing(self, request: wire.Message) -> None:
        mount_id, digest = _mount_id(request), Digest.parse(wire.field(request, "digest", str))
        file_fd = self._ready().open_proven(mount_id, digest)
        if file_fd is None:
            self._work.put(Urgency.PROVE_AGAIN, lambda: self._prove_again(mount_id, digest))
            self._send(wire.ok(request))
            return
        try:
            self._send(wire.ok(request), [file_fd])
        finally:
            os.close(file_fd)

    def _prove_again(self, mount_id: str, digest: Digest) -> None:
        with contextlib.suppress(CacheError):  # it may have been for another mount
            file_fd = self._ready().open_proven(mount_id, digest)
            if file_fd is not None:
                os.close(file_fd)
            elif not self._ready().prove_again(digest):
                log.warning("blob %s: its proven copy is damaged; 'modelmount cache verify' removes it", digest.short())
                return
            self._send({"op": "proven", "mount_id": mount_id, "digest": str(digest)})

    def _grant(self, request: wire.Message) -> int:
        mount_id = _mount_id(request)
        left, wanted = wire.field(request, "left_bytes", int), wire.field(request, "wanted_bytes", int)
        with self._admission:
            self._reserves.tell(mount_id, max(0, left), self._ready().entries())
            given = share_of(self._room_for(wanted), wanted) if wanted > 0 else 0
            self._reserves.give(mount_id, given)
        return given

    def _make_room(self, wanted_bytes: int) -> int:
        """Evict what need not stay, if it must; how much may come now."""
        with self._admission:
            return self._room_for(wanted_bytes)

    def _room_for(self, wanted_bytes: int) -> int:
        shelf = self._ready()
        entries = shelf.entries()
        reserved = self._reserves.total(entries)
        used = sum(entry.size_bytes for entry in entries) + reserved
        for entry in evict_for(self._limits, shelf.disk().less(reserved), used, wanted_bytes, entries):
            if self._evict(entry):
                used -= entry.size_bytes
        return room(self._limits, shelf.disk().less(reserved), used)

    def _evict(self, entry: Entry) -> bool:
        try:
            removed = self._ready().remove(entry)
        except OSError as exc:
            log.warning("%s %s cannot be removed: %s", entry.kind, entry.name, exc.strerror)
            return False
        if removed:
            self._evicted_bytes += entry.size_bytes
            log.info("evicted %s %s: %d bytes", entry.kind, entry.name, entry.size_bytes)
        return removed

    def _verify(self, request: wire.Message) -> None:
        """One blob after the other, and answer after the last."""
        shelf = self._ready()
        names = [entry.name for entry in shelf.entries() if entry.kind is Kind.BLOB]
        digests = iter([Digest.parse(name.replace("-", ":", 1)) for name in names])
        found: list[dict[str, Any]] = []

        def check_next() -> None:
            digest = next(digests, None)
            if digest is None:
                self._answer(request, lambda: {"blobs": found})
                return
            try:
                found.append({"digest": str(digest), "right": shelf.verify(digest)})
            except Exception as exc:
                log.exception("blob %s: checking it failed", digest.short())
                self._send(wire.failed(request, exc))
                return
            self._work.put(Urgency.VERIFY, check_next)

        self._work.put(Urgency.VERIFY, check_next)

    def _answer(self, request: wire.Message, ask: Callable[[], dict[str, Any]]) -> None:
        try:
            result = ask()
        except ModelMountError as exc:
            self._send(wire.failed(request, exc))
            return
        except Exception as exc:
            log.exception("%s failed by a bug", request.get("op"))
            self._send(wire.failed(request, exc))
            return
        result_fd = wire.memfd("result", json.dumps(result).encode())
        try:
            self._send(wire.ok(request), [result_fd])
        finally:
            os.close(result_fd)

    def _administered(self, request: wire.Message) -> dict[str, Any]:
        shelf = self._ready()
        match request["op"]:
            case "pin" | "unpin":
                digests = [str(Digest.parse(str(digest))) for digest in wire.field(request, "digests", list)]
                pins = {digest: label for digest, label in shelf.pins().items() if digest not in digests}
                if request["op"] == "pin":
                    pins |= dict.fromkeys(digests, str(request.get("label", "")))
                try:
                    shelf.set_pins(pins)
                except OSError as exc:
                    raise CacheError(f"the pins cannot be written: {exc.strerror}") from exc
                return {"pins": pins}
            case "prune":
                unused = [entry for entry in shelf.entries() if not entry.in_use and not entry.pinned]
                removed = [entry for entry in unused if self._evict(entry)]
                return {"removed": [_described(entry) for entry in removed]}
        entries = shelf.entries()
        disk = shelf.disk()
        with self._admission:
            reserved = self._reserves.total(entries)
        used = sum(entry.size_bytes for entry in entries)
        return {
            "entries": [_described(entry) for entry in entries],
            "used_bytes": used,
            "reserved_bytes": reserved,
            "room_bytes": room(self._limits, disk.less(reserved), used + reserved),
            "limit_bytes": self._limits.max_bytes,
            "floor_bytes": int(disk.total_bytes * self._limits.min_free),
            "free_bytes": disk.free_bytes,
            "total_bytes": disk.total_bytes,
            "evicted_bytes": self._evicted_bytes,
        }

    def _work_loop(self) -> None:
        # A reader's bytes come first. Not SCHED_IDLE: on a busy machine it would hold our locks for minutes.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        while True:
            work = self._work.get()
            try:
                work()
            except Exception:
                log.exception("work in the cache failed by a bug")

    def _send(self, message: wire.Message, fds: Sequence[int] = ()) -> None:
        with self._send_lock:
            try:
                wire.send(self._control, message, fds)
            except OSError as exc:
                log.warning("supervisor not reachable: %s", exc)


def _remove_old(directory_fd: int) -> None:
    try:
        if freed := leftovers.remove(directory_fd):
            log.info("removed %d bytes of a cache in another layout", freed)
    finally:
        os.close(directory_fd)


def _described(entry: Entry) -> dict[str, Any]:
    return {
        "kind": str(entry.kind),
        "name": entry.name.replace("-", ":", 1) if entry.kind is Kind.BLOB else entry.name,
        "domain": entry.domain,
        "size_bytes": entry.size_bytes,
        "last_used": entry.last_used,
        "in_use": entry.in_use,
        "pinned": entry.pinned,
    }


def _mount_id(request: wire.Message) -> str:
    mount_id: str = wire.field(request, "mount_id", str)
    if not mount_id.isalnum():
        raise ControlError("store: a mount id is 32 hexadecimal digits")
    return mount_id


def _origins(request: wire.Message) -> list[str]:
    return [str(origin) for origin in wire.field(request, "origins", list)]


def run(control_fd: int, jail: Level) -> int:
    """The process, in its jail. Returns the exit status."""
    os.umask(0o022)
    Store(socket.socket(fileno=control_fd), jail).run()
    sys.stderr.flush()
    os._exit(0)  # the worker thread may be copying; what it leaves half done is removed at the next start
