"""`modelmount supervisor`: the server around `supervise.Supervisor`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
from typing import Any

from csi.control import endpoint, wire
from csi.control.supervisor import SOCKET_NAME
from csi.credentials import Keyring, from_wire, keyring_from_wire
from csi.errors import ControlError, ModelMountError
from csi.oci.digest import Digest
from csi.oci.reference import Reference
from csi.oci.view import View
from csi.supervisor.settings import SupervisorSettings
from csi.supervisor.supervise import Supervisor
from csi.volume import Prefetch, Verify

log = logging.getLogger(__name__)

_MAX_KEYRING_BYTES = 4 * 1024 * 1024


async def serve(settings: SupervisorSettings) -> None:
    """Serve until SIGTERM or SIGINT, then end every mount."""
    for directory in (settings.state_dir, settings.data_dir):
        os.makedirs(directory, mode=0o711, exist_ok=True)
    supervisor = Supervisor(settings)
    listener = endpoint.listen(os.path.join(settings.state_dir, SOCKET_NAME))
    listener.setblocking(False)
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    serving: set[asyncio.Task[None]] = set()

    def accept() -> None:
        with contextlib.suppress(BlockingIOError):
            connection, _ = listener.accept()
            task = asyncio.create_task(_serve_connection(supervisor, connection, settings.allowed_uids))
            serving.add(task)
            task.add_done_callback(serving.discard)

    loop.add_reader(listener.fileno(), accept)
    log.info("supervisor serves at %s", os.path.join(settings.state_dir, SOCKET_NAME))
    try:
        await supervisor.start()
        await stop.wait()
    finally:
        loop.remove_reader(listener.fileno())
        listener.close()
        os.unlink(os.path.join(settings.state_dir, SOCKET_NAME))
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
        await supervisor.close()


async def _serve_connection(supervisor: Supervisor, connection: socket.socket, allowed_uids: frozenset[int]) -> None:
    """One request, one reply. The work goes on when the client stops waiting: its next call finds it done."""
    connection.setblocking(False)
    request: wire.Message = {}
    with connection:
        try:
            received = await _receive(connection)
            if received is None:
                return
            request, fds = received
            keyring = _keyring(fds)
            if endpoint.peer_of(connection).uid not in allowed_uids:
                raise ControlError("supervisor: this user may not ask for mounts")
            fields, reply_fds = await _handle(supervisor, request, keyring)
            reply = wire.ok(request, **fields)
        except ModelMountError as exc:
            log.info("refused %s: %s", request.get("op"), exc)
            reply, reply_fds = wire.failed(request, exc), []
        except Exception as exc:
            log.exception("%s failed by a bug", request.get("op"))
            reply, reply_fds = wire.failed(request, exc), []
        try:
            wire.send(connection, reply, reply_fds)
        except OSError as exc:
            log.info("could not answer %s: %s", request.get("op"), exc)
        finally:
            wire.close_all(reply_fds)


async def _receive(connection: socket.socket) -> tuple[wire.Message, list[int]] | None:
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[None] = loop.create_future()

    def on_readable() -> None:
        if not readable.done():
            readable.set_result(None)

    loop.add_reader(connection.fileno(), on_readable)
    try:
        async with asyncio.timeout(10.0):
            await readable
    except TimeoutError:
        raise ControlError("supervisor: a client connected and sent nothing") from None
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
            await supervisor.reconcile({str(path) for path in wire.field(request, "target_paths", list)})
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
