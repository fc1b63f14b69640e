"""Which channel to its fetcher a worker ends up with. What the two answer is scripted; process, sockets and calls are real."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from typing import Any, cast

from csi.control import wire
from csi.control.keeper import CollectedMount, KeptMount
from csi.fuse.handshake import BackendName
from csi.supervisor.child import Child, ChildPool, ForkedProcess
from csi.supervisor.kept import KeptMounts
from csi.supervisor.memory import MOST
from csi.supervisor.serving import Serving
from csi.supervisor.settings import SupervisorSettings


class ScriptedFetcher:
    """As the real one: a channel takes the place of the one before, whose end it closes."""

    def __init__(self) -> None:
        self._end: socket.socket | None = None

    async def channel(self) -> socket.socket:
        self.close()
        theirs, self._end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return theirs

    def close(self) -> None:
        if self._end is not None:
            self._end.close()


class ScriptedWorker:
    """As the real one: a channel takes the place of the one before. `serve` is answered when it is let."""

    def __init__(self) -> None:
        ours, self._control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._process = subprocess.Popen(["sleep", "1000"])
        self.child = Child("worker", ForkedProcess(self._process.pid, os.pidfd_open(self._process.pid)), ours)
        self.channel: socket.socket | None = None
        self.asked_to_serve, self.may_serve = asyncio.Event(), asyncio.Event()
        self._answering = asyncio.create_task(self._answer())

    async def _answer(self) -> None:
        while (received := await asyncio.to_thread(wire.recv, self._control)) is not None:
            request, fds = received
            if request["op"] in ("serve", "fetcher"):
                if self.channel is not None:
                    self.channel.close()
                self.channel = socket.socket(fileno=fds.pop())
            wire.close_all(fds)
            if request["op"] == "serve":
                self.asked_to_serve.set()
                await self.may_serve.wait()
            wire.send(self._control, wire.ok(request))

    @property
    def is_linked(self) -> bool:
        """Whether what it says to the fetcher arrives."""
        assert self.channel is not None
        try:
            wire.send(self.channel, {"op": "want"})
        except OSError:
            return False
        return True

    async def close(self) -> None:
        self._process.kill()
        self._process.wait()
        await self.child.exited
        self.child.let_go()
        await self._answering
        self._control.close()
        if self.channel is not None:
            self.channel.close()


class Keeper:
    """Keeps nothing: no supervisor comes after this one."""

    async def keep(self, *_: Any) -> None:
        return


def serving_with(fetcher: ScriptedFetcher) -> Serving:
    serving = Serving(
        cast(KeptMounts, Keeper()),
        cast(ChildPool, None),
        SupervisorSettings(state_dir="/nowhere", data_dir="/nowhere"),
        fetcher.channel,
        lambda: True,
        lambda reason, text: None,
        lambda: MOST,
        recheck=False,
    )
    mount = KeptMount("0" * 64, "0:1", 0, can_resend=False, existed=True, backend=BackendName.RAW, connected=True)
    fuse_fd, table_fd, root_fd = (os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC) for _ in range(3))
    serving.connect(CollectedMount(mount, fuse_fd, table_fd, root_fd, b"", {}, {}), fuse_fd, table_fd)
    return serving


def test_a_fetcher_that_is_replaced_while_a_worker_begins_to_serve_does_not_take_its_channel() -> None:
    async def run() -> None:
        fetcher, worker = ScriptedFetcher(), ScriptedWorker()
        serving = serving_with(fetcher)
        try:
            starting = asyncio.create_task(serving.start(worker.child))
            await worker.asked_to_serve.wait()
            replaced = asyncio.create_task(serving.use_new_fetcher())
            await asyncio.wait([replaced], timeout=0.2)
            worker.may_serve.set()
            await asyncio.gather(starting, replaced)
            assert worker.is_linked
        finally:
            await worker.close()
            fetcher.close()
            await serving.stop()

    asyncio.run(run())


def test_a_new_fetcher_keeps_its_channel_for_the_worker_to_come() -> None:
    """Nobody serves: a channel that is made now has no other end."""

    async def run() -> None:
        fetcher, worker = ScriptedFetcher(), ScriptedWorker()
        serving = serving_with(fetcher)
        worker.may_serve.set()
        try:
            theirs = await fetcher.channel()
            with theirs:
                await serving.use_new_fetcher()
                wire.send(theirs, {"op": "want"})
            await serving.start(worker.child)
            assert worker.is_linked
        finally:
            await worker.close()
            fetcher.close()
            await serving.stop()

    asyncio.run(run())
