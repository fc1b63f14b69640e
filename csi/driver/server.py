"""The gRPC servers on the CSI sockets. The socket first, recovery after: kubelet's registrar waits one second."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import grpc

from csi import heap
from csi.boot import this_boot
from csi.control.keeper import KeeperClient
from csi.control.supervisor import SupervisorClient
from csi.driver.announcer import Announcer
from csi.driver.controller import ControllerService
from csi.driver.dependencies import KeeperWatch
from csi.driver.identity import IdentityService
from csi.driver.node import NodePolicy, NodeService
from csi.driver.provisioner import Provisioner
from csi.driver.publisher import Publisher
from csi.driver.records import Pins, Publications
from csi.driver.registration import Registration
from csi.driver.sockets import clear_socket, endpoint_path
from csi.driver.token_login import TokenLogin
from csi.errors import ControlError
from csi.pods import Events
from csi.volume import Sharing
from csi.wire import csi_pb2_grpc

log = logging.getLogger(__name__)

_STOP_GRACE_S = 1.5


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeSettings:
    """`endpoint` is `unix:///path.sock`; the other directories are those of keeper and supervisor.

    `registration_dir` is kubelet's plugins_registry, None to leave registration to a sidecar; `kubelet_endpoint` is the
    CSI socket's path as kubelet sees it, None when that is ours.
    """

    endpoint: str
    node_id: str
    state_dir: str
    data_dir: str
    version: str
    registration_dir: str | None = None
    kubelet_endpoint: str | None = None
    sharing: Sharing = Sharing.SHARED
    token_logins: Mapping[str, TokenLogin] = field(default_factory=dict)
    metrics_address: str | None = None
    """`host:port` for Prometheus and kubelet's probe; None for no endpoint."""


def open_publisher(state_dir: str, data_dir: str) -> Publisher:
    """A publisher over the keeper and supervisor of `state_dir`."""
    boot_id = this_boot().hex()
    return Publisher(
        KeeperClient(state_dir),
        SupervisorClient(state_dir),
        Publications(os.path.join(state_dir, "publications"), boot_id),
        Pins(os.path.join(data_dir, "pins")),
        boot_id,
    )


async def serve(
    settings: NodeSettings,
    provisioner: Provisioner | None = None,
    remove_startup_taint: Callable[[], bool] | None = None,
    events: Events | None = None,
) -> None:
    """Serve Identity and Node, and Controller where there is a provisioner, until SIGTERM or SIGINT. Publications stay.

    `remove_startup_taint` is called, in a thread, until it says that the node has none. `events` None: outside a
    cluster.
    """
    path = endpoint_path(settings.endpoint)
    clear_socket(path)
    publisher = open_publisher(settings.state_dir, settings.data_dir)
    announcer = Announcer(events, publisher) if events is not None else None
    recovered = asyncio.Event()
    server = grpc.aio.server()
    keeper = KeeperWatch(KeeperClient(settings.state_dir).ping)
    identity = IdentityService(
        settings.version, recovered.is_set, lambda: keeper.problem, with_controller=provisioner is not None
    )
    csi_pb2_grpc.add_IdentityServicer_to_server(identity, server)
    csi_pb2_grpc.add_NodeServicer_to_server(
        NodeService(settings.node_id, publisher, NodePolicy(settings.sharing, settings.token_logins), announcer), server
    )
    if provisioner is not None:
        csi_pb2_grpc.add_ControllerServicer_to_server(ControllerService(provisioner), server)
    exporter = None
    if settings.metrics_address is not None:
        from csi.driver.exporter import Exporter, NodeCollector

        collector = NodeCollector(settings.state_dir, settings.data_dir, settings.version)
        exporter = Exporter(settings.metrics_address, collector)
        exporter.start()
    await _listen(server, path)
    log.info("CSI node service at %s", path)
    registration = None
    if settings.registration_dir is not None:
        registration = Registration(settings.registration_dir, settings.kubelet_endpoint or path)
        await registration.start()
    background = [
        asyncio.create_task(_recover(publisher, recovered)),
        asyncio.create_task(publisher.give_back_leases()),
        asyncio.create_task(keeper.run()),
    ]
    if remove_startup_taint is not None:
        background.append(asyncio.create_task(_until_taint_is_gone(remove_startup_taint)))
    if announcer is not None:
        background.append(asyncio.create_task(announcer.run()))
    try:
        await _told_to_stop()
    finally:
        for task in background:
            task.cancel()
        if registration is not None:
            await registration.stop()
        await _stop(server, path)
        if exporter is not None:
            await asyncio.to_thread(exporter.stop)


async def serve_controller(endpoint: str, version: str, provisioner: Provisioner) -> None:
    """Serve Identity and Controller until SIGTERM or SIGINT."""
    path = endpoint_path(endpoint)
    clear_socket(path)
    server = grpc.aio.server()
    csi_pb2_grpc.add_IdentityServicer_to_server(IdentityService(version, lambda: True, with_controller=True), server)
    csi_pb2_grpc.add_ControllerServicer_to_server(ControllerService(provisioner), server)
    await _listen(server, path)
    log.info("CSI controller service at %s", path)
    try:
        await _told_to_stop()
    finally:
        await _stop(server, path)


async def _listen(server: grpc.aio.Server, path: str) -> None:
    old_umask = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{path}")
        await server.start()
    finally:
        os.umask(old_umask)


async def _told_to_stop() -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()


async def _stop(server: grpc.aio.Server, path: str) -> None:
    await server.stop(_STOP_GRACE_S)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


async def _until_taint_is_gone(remove_startup_taint: Callable[[], bool]) -> None:
    delay_s = 0.5
    while True:
        try:
            if await asyncio.to_thread(remove_startup_taint):
                log.info("the node has no startup taint (any more)")
                return
        except ControlError as exc:
            log.warning("the startup taint stays for now: %s", exc)
            delay_s = min(30.0, delay_s * 2)
        except Exception:
            log.exception("removing the startup taint failed by a bug")
            return
        await asyncio.sleep(delay_s)


async def _recover(publisher: Publisher, recovered: asyncio.Event) -> None:
    while True:
        try:
            await publisher.recover()
        except ControlError as exc:
            log.warning("waiting for the supervisor: %s", exc)
            await asyncio.sleep(0.5)
            continue
        recovered.set()
        heap.give_back()
        return
