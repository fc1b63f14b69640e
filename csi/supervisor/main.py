"""`modelmount supervisor`: the server around `supervise.Supervisor`, and how one follows another.

crash      nobody listens: the new one takes the socket's path, and goes on with what keeper and records have
hand-over  somebody listens: `hand_over` is asked of it. It stops accepting, and sends the volumes' credentials and
           its listening socket, so that no call is refused; when the new one says `taken`, it only waits for its
           end. Should that connection end first, it goes on as if nothing had been; should it end later (the new
           one died, or was rolled back), it takes the mounts again
SIGTERM    the mounts go on without us, unless `end_mounts` says that nobody will come
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import signal
import socket
from typing import Any

from csi import heap
from csi.control import endpoint, wire
from csi.control.supervisor import SOCKET_NAME
from csi.credentials import Keyring, from_wire, keyring_from_wire
from csi.errors import ControlError, ModelMountError
from csi.errors import from_wire as error_from_wire
from csi.oci.digest import Digest
from csi.oci.reference import Reference
from csi.oci.view import View
from csi.supervisor.lease import Logins
from csi.supervisor.settings import SupervisorSettings
from csi.supervisor.supervise import KnownCredentials, Supervisor
from csi.volume import Prefetch, Verify

log = logging.getLogger(__name__)

_REQUEST_PATIENCE_S = 10.0
_HAND_OVER_PATIENCE_S = 30.0
_IN_FLIGHT_PATIENCE_S = 1.0
_ASK_AGAIN_S = 1.0
_MAX_KEYRING_BYTES = 4 * 1024 * 1024
_MAX_HANDED_BYTES = 256 * 1024 * 1024


async def serve(settings: SupervisorSettings) -> None:
    """Serve until SIGTERM or SIGINT."""
    for directory in (settings.state_dir, settings.data_dir):
        os.makedirs(directory, mode=0o711, exist_ok=True)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    server = _Server(settings)
    serving = asyncio.create_task(server.run())
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        serving.result()
    serving.cancel()
    await asyncio.wait([serving])
    await server.end()


class _Server:
    """The socket, and the supervisor behind it while there is one."""

    def __init__(self, settings: SupervisorSettings) -> None:
        self._settings = settings
        self._path = os.path.join(settings.state_dir, SOCKET_NAME)
        self._supervisor = Supervisor(settings)
        self._ready = asyncio.Event()
        self._listener: socket.socket | None = None
        self._renewal: asyncio.Task[None] | None = None
        self._serving: set[asyncio.Task[None]] = set()
        self._predecessor: socket.socket | None = None
        """Open as long as we live: its other end takes the mounts again when it closes."""
        self._successor: socket.socket | None = None
        self._handed_over = asyncio.Event()
        self._handing_over = self._has_handed_over = False
        self._handed: KnownCredentials = {}

    async def run(self) -> None:
        """Supervise, hand over, and supervise again when that was in vain. Never returns."""
        while True:
            await self._begin()
            self._renewal = asyncio.create_task(self._renew())
            await self._handed_over.wait()
            await self._end_of_successor()
            log.warning("the supervisor that had taken over is gone; its mounts are ours again")
            self._handed_over.clear()
            self._ready.clear()
            self._supervisor = Supervisor(self._settings)

    async def _renew(self) -> None:
        await self._supervisor.renew_all()
        heap.give_back()
        if self._settings.ready_file is not None:
            with open(self._settings.ready_file, "w", encoding="ascii"):
                pass

    async def _stop_renewal(self) -> None:
        if self._renewal is not None:
            self._renewal.cancel()
            await asyncio.wait([self._renewal])

    async def end(self) -> None:
        """The process ends: with its mounts, or leaving them to the next one."""
        if self._handed_over.is_set() or self._handing_over:
            return
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener.fileno())
            # In this order: whoever finds no path makes one of its own, which is not ours to remove.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
            self._listener.close()
        await self._drain(0.0)
        await self._stop_renewal()
        if self._settings.end_mounts:
            await self._supervisor.close()
        else:
            await self._supervisor.pause()
            log.info("ended; the mounts go on and wait for the next supervisor")

    async def _begin(self) -> None:
        while True:
            try:
                predecessor = await asyncio.to_thread(endpoint.connect, self._path, 5.0)
            except ControlError:
                with contextlib.suppress(ControlError):  # another one was quicker
                    self._accept(endpoint.listen(self._path))
                    await self._supervisor.start(self._handed, alone=True)
                    break
            else:
                with predecessor:
                    # One that took over from us and died has a successor already: that one is no older than we are.
                    if not self._has_handed_over and await self._take_over(predecessor):
                        break
            await asyncio.sleep(_ASK_AGAIN_S)
        self._ready.set()
        log.info("supervisor serves at %s", self._path)

    def _accept(self, listener: socket.socket) -> None:
        listener.setblocking(False)
        self._listener = listener

        def accept() -> None:
            with contextlib.suppress(BlockingIOError):
                connection, _ = listener.accept()
                task = asyncio.create_task(self._serve_connection(connection))
                self._serving.add(task)
                task.add_done_callback(self._serving.discard)

        asyncio.get_running_loop().add_reader(listener.fileno(), accept)

    async def _take_over(self, predecessor: socket.socket) -> bool:
        """False when the supervisor that runs does not hand over (yet)."""
        await self._supervisor.start_spares()
        predecessor.setblocking(False)
        fds: list[int] = []
        try:
            wire.send(predecessor, {"id": 1, "op": "hand_over"})
            received = await _receive(predecessor, _HAND_OVER_PATIENCE_S)
            if received is None:
                raise ControlError("the supervisor that runs closed the connection")
            message, fds = received
            if "error" in message:
                raise error_from_wire(message["error"])
            handed_fd, listener_fd = wire.exactly(fds, 2)
            handed = _handed(wire.read_all(handed_fd, _MAX_HANDED_BYTES, "credentials"))
        except (OSError, ModelMountError) as exc:
            log.warning("the supervisor that runs does not hand over: %s", exc)
            wire.close_all(fds)
            return False
        os.close(handed_fd)
        await self._supervisor.start(handed, alone=False)
        wire.send(predecessor, {"op": "taken"})
        self._predecessor = socket.socket(fileno=os.dup(predecessor.fileno()))
        self._accept(socket.socket(fileno=listener_fd))
        log.info("took over %d mounts", len(handed))
        return True

    async def _hand_over(self, connection: socket.socket, request: wire.Message) -> None:
        """Everything to the supervisor at the other end. Raises: ControlError, OSError; then we go on."""
        assert self._listener is not None
        loop = asyncio.get_running_loop()
        log.info("another supervisor takes over")
        loop.remove_reader(self._listener.fileno())
        self._ready.clear()
        self._handing_over = True
        await self._drain(_IN_FLIGHT_PATIENCE_S)
        await self._stop_renewal()
        self._handed = await self._supervisor.pause()
        handed_fd = wire.memfd("credentials", _to_hand(self._handed))
        try:
            wire.send(connection, wire.ok(request), [handed_fd, self._listener.fileno()])
            received = await _receive(connection, _HAND_OVER_PATIENCE_S)
            if received is None or received[0].get("op") != "taken":
                raise ControlError("the supervisor that wanted to take over went away; this one goes on")
        except (OSError, ModelMountError):
            await self._supervisor.resume()
            self._renewal = asyncio.create_task(self._renew())
            self._accept(self._listener)
            self._ready.set()
            self._handing_over = False
            raise
        finally:
            os.close(handed_fd)
        await self._supervisor.let_go()
        self._listener.close()
        self._listener = None
        self._successor = socket.socket(fileno=os.dup(connection.fileno()))
        self._handing_over, self._has_handed_over = False, True
        self._handed_over.set()
        log.info("handed over %d mounts", len(self._handed))

    async def _end_of_successor(self) -> None:
        assert self._successor is not None
        with self._successor as successor, contextlib.suppress(OSError, ControlError):
            await _receive(successor, None)
        self._successor = None

    async def _drain(self, patience_s: float) -> None:
        """What is being answered is answered, or its caller hears that it must call again."""
        others = self._serving - {asyncio.current_task()}
        if others and patience_s:
            await asyncio.wait(others, timeout=patience_s)
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve_connection(self, connection: socket.socket) -> None:
        """One request, one reply. The work goes on when the client stops waiting: its next call finds it done."""
        connection.setblocking(False)
        request: wire.Message = {}
        reply_fds: list[int] = []
        with connection:
            try:
                received = await _receive(connection, _REQUEST_PATIENCE_S)
                if received is None:
                    return
                request, fds = received
                keyring = _keyring(fds)
                if endpoint.peer_of(connection).uid not in self._settings.allowed_uids:
                    raise ControlError("supervisor: this user may not ask for mounts")
                if request.get("op") != "ping":
                    await self._ready.wait()
                if request.get("op") == "hand_over":
                    await self._hand_over(connection, request)
                    return
                fields, reply_fds = await _handle(self._supervisor, request, keyring)
                reply = wire.ok(request, **fields)
            except asyncio.CancelledError:
                reply = wire.failed(request, ControlError("another supervisor takes over; try again"))
            except ModelMountError as exc:
                log.info("refused %s: %s", request.get("op"), exc)
                reply = wire.failed(request, exc)
            except Exception as exc:
                log.exception("%s failed by a bug", request.get("op"))
                reply = wire.failed(request, exc)
            try:
                wire.send(connection, reply, reply_fds)
            except OSError as exc:
                log.info("could not answer %s: %s", request.get("op"), exc)
            finally:
                wire.close_all(reply_fds)


def _to_hand(known: KnownCredentials) -> bytes:
    wired = {
        mount_id: {path: None if one is None else one.to_json() for path, one in targets.items()}
        for mount_id, targets in known.items()
    }
    return json.dumps(wired).encode()


def _handed(content: bytes) -> KnownCredentials:
    """Raises: ControlError for what `_to_hand` did not write."""
    try:
        return {
            str(mount_id): {str(path): None if one is None else Logins.of_json(one) for path, one in targets.items()}
            for mount_id, targets in json.loads(content).items()
        }
    except (ValueError, AttributeError, KeyError, TypeError) as exc:
        raise ControlError(f"the supervisor that runs hands over something else: {exc}") from exc


async def _receive(connection: socket.socket, patience_s: float | None) -> tuple[wire.Message, list[int]] | None:
    """None at the end of the connection. Raises: ControlError when nothing comes in time, or something malformed."""
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[None] = loop.create_future()

    def on_readable() -> None:
        if not readable.done():
            readable.set_result(None)

    loop.add_reader(connection.fileno(), on_readable)
    try:
        async with asyncio.timeout(patience_s):
            await readable
    except TimeoutError:
        raise ControlError(f"supervisor: nothing came for {patience_s:g} s") from None
    finally:
        loop.remove_reader(connection.fileno())
    return wire.recv(connection)


def _keyring(fds: list[int]) -> Keyring:
    """What the request brought beside its message; the descriptors are closed."""
    try:
        return keyring_from_wire(json.loads(wire.read_all(fds[0], _MAX_KEYRING_BYTES, "keyring"))) if fds else Keyring()
    except (OSError, ValueError) as exc:
        raise ControlError("supervisor: the keyring cannot be read") from exc
    finally:
        wire.close_all(fds)


async def _handle(supervisor: Supervisor, request: wire.Message, keyring: Keyring) -> tuple[dict[str, Any], list[int]]:
    match request.get("op"):
        case "ping":
            return {"pid": os.getpid()}, []
        case "ensure":
            pinned, verify = request.get("pinned"), request.get("verify")
            work = asyncio.create_task(
                supervisor.ensure(
                    target_path=wire.field(request, "target_path", str),
                    volume_id=wire.field(request, "volume_id", str),
                    reference=Reference.parse(wire.field(request, "reference", str)),
                    pinned=Digest.parse(pinned) if pinned else None,
                    verify=Verify(verify) if verify else None,
                    prefetch=Prefetch(wire.field(request, "prefetch", str)),
                    view=View.parse(wire.field(request, "view", dict)),
                    credentials=from_wire(request.get("credentials")),
                    domain=wire.field(request, "domain", str),
                    service_account=wire.field(request, "service_account", str),
                    keyring=keyring,
                    pinned_parents=[Reference.parse(str(parent)) for parent in request.get("pinned_parents", ())],
                )
            )
            return await asyncio.shield(work), []
        case "renew":
            renewed = await supervisor.renew(
                wire.field(request, "target_path", str), from_wire(request.get("credentials")), keyring
            )
            return {"mount": renewed}, []
        case "release":
            await asyncio.shield(asyncio.create_task(supervisor.release(wire.field(request, "target_path", str))))
            return {}, []
        case "reconcile":
            targets = {str(path) for path in wire.field(request, "target_paths", list)}
            await supervisor.reconcile(targets, float(request.get("before", math.inf)))
            return {}, []
        case "status":
            target_path = request.get("target_path")
            mounts = await supervisor.status(str(target_path) if target_path else None)
            return {}, [wire.memfd("status", json.dumps(mounts).encode())]
        case "cache":
            verb = wire.field(request, "verb", str)
            fields: dict[str, Any] = {name: request[name] for name in ("digests", "label") if name in request}
            return {}, await supervisor.cache(verb, fields)
        case other:
            raise ControlError(f"supervisor: unknown operation {other!r}")
