"""One child process and the socket it is driven by. A child outlives its supervisor where somebody else (the keeper)
holds that socket too; the next supervisor goes on with the same one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import select
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakValueDictionary

from csi.control import wire
from csi.control.keeper import KeptSlot
from csi.errors import ControlError, from_wire

log = logging.getLogger(__name__)

_STOP_GRACE_S = 2.0
_START_TIMEOUT_S = 20.0
_ADOPTION_PATIENCE_S = 2.0
_WITH_SPARES = ("worker", "fetcher")
_STATUS_PATIENCE_S = 0.5  # a nursery that lives tells at once how a child ended


@dataclass(frozen=True, slots=True)
class Role:
    """A kind of child: `name` is its sub-command, `flags` go with it; uid and gid None keep ours (a supervisor that is
    not root).
    """

    name: str
    uid: int | None
    gid: int | None
    flags: tuple[str, ...] = ()

    @property
    def arguments(self) -> list[str]:
        """Of `modelmount`, without the socket's."""
        identity = [] if self.uid is None else [f"--uid={self.uid}", f"--gid={self.gid}"]
        return [self.name, *identity, *self.flags]


class Process(Protocol):
    """What is needed of a child's process; asyncio's has it."""

    @property
    def pid(self) -> int:
        """Its process id."""

    @property
    def returncode(self) -> int | None:
        """How it ended; None while it runs."""

    async def wait(self) -> int:
        """Until it has ended: its `returncode`."""

    def send_signal(self, number: int, /) -> None:
        """Raises: ProcessLookupError."""

    def kill(self) -> None:
        """SIGKILL. Raises: ProcessLookupError."""


class Child:
    """A running child. Calls may overlap; replies are matched by id. Use from one event loop only."""

    def __init__(self, name: str, process: Process, sock: socket.socket, *, is_ours: bool = True) -> None:
        self.name = name
        self.process = process
        self.is_ours = is_ours
        """Whether this supervisor had it started."""
        self.on_notification: Callable[[wire.Message], None] = lambda message: None
        self.exited: asyncio.Task[int] = asyncio.create_task(process.wait())
        self._sock = sock
        # The socket may hold answers to a supervisor before us, which counted from elsewhere.
        self._next_id = secrets.randbits(48)
        self._pending: dict[int, asyncio.Future[tuple[wire.Message, list[int]]]] = {}
        self.listen()

    @classmethod
    async def spawn(cls, name: str, flags: Sequence[str]) -> Child:
        """Start `modelmount <name>` with one end of a socket pair. It answers nothing yet: call `ping` to wait."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        command = [sys.executable, "-m", "csi.cli.main", name, "--control-fd", str(theirs.fileno()), *flags]
        try:
            process = await asyncio.create_subprocess_exec(
                *command, pass_fds=[theirs.fileno()], stdin=asyncio.subprocess.DEVNULL, start_new_session=True
            )
        except OSError as exc:
            ours.close()
            raise ControlError(f"cannot start a {name}: {exc}") from exc
        finally:
            theirs.close()
        return cls(name, process, ours)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    @property
    def alive(self) -> bool:
        """Whether it has not exited, as far as we know."""
        return self.process.returncode is None

    async def call(
        self, op: str, timeout_s: float, fds: Sequence[int] = (), **fields: Any
    ) -> tuple[wire.Message, list[int]]:
        """Raises: the child's error; ControlError when it dies or does not answer in time."""
        request_id, self._next_id = self._next_id, self._next_id + 1
        reply: asyncio.Future[tuple[wire.Message, list[int]]] = asyncio.get_running_loop().create_future()
        self._pending[request_id] = reply
        try:
            try:
                wire.send(self._sock, {"id": request_id, "op": op, **fields}, fds)
            except OSError as exc:
                raise ControlError(f"{self.name} {self.pid} is gone") from exc
            async with asyncio.timeout(timeout_s):
                message, received = await reply
        except TimeoutError:
            raise ControlError(f"{self.name} {self.pid}: no answer to {op!r} within {timeout_s:g} s") from None
        finally:
            self._pending.pop(request_id, None)
        if "error" in message:
            wire.close_all(received)
            raise from_wire(message["error"])
        return dict(message.get("ok") or {}), received

    @property
    def handles(self) -> tuple[int, int]:
        """What a later supervisor needs of a forked child: the socket and its process, still ours. Raises: ControlError when
        it has ended.
        """
        assert isinstance(self.process, ForkedProcess)
        if self.process.fd < 0 or self._sock.fileno() < 0:
            raise ControlError(f"{self.name} {self.pid} died")
        return self._sock.fileno(), self.process.fd

    def listen(self) -> None:
        """Read what it says (again, after `pause`)."""
        asyncio.get_running_loop().add_reader(self._sock.fileno(), self._on_readable)

    def pause(self) -> None:
        """Read nothing for now: another supervisor may be doing so."""
        if self._sock.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._sock.fileno())

    def let_go(self) -> None:
        """It is another supervisor's, or has ended."""
        self._close()

    async def stop(self, patience_s: float = 1.5) -> bool:
        """Ask it to finish, within `patience_s` what it holds; close the socket; kill what is left after 2 s. False when it
        lives on, out of our reach.
        """
        if self.alive:
            with contextlib.suppress(ControlError):
                await self.call("stop", _STOP_GRACE_S, patience_s=patience_s)
        self._close()
        try:
            async with asyncio.timeout(_STOP_GRACE_S):
                await asyncio.shield(self.exited)
        except TimeoutError:
            if not self.kill():
                return False
            await self.exited
        return True

    def kill(self) -> bool:
        """SIGKILL. False when it is out of our reach: another container's, which ends with that."""
        try:
            self.process.kill()
        except ProcessLookupError:
            pass
        except OSError as exc:
            log.warning("%s %d cannot be killed: %s", self.name, self.pid, exc.strerror)
            return False
        return True

    def resume(self) -> None:
        """SIGCONT, to one that somebody has stopped; nothing where it is out of our reach."""
        with contextlib.suppress(OSError, ValueError):  # asyncio's: it has ended
            self.process.send_signal(signal.SIGCONT)

    @property
    def visible_pid(self) -> int:
        """Where our /proc shows it; 0 for one that has ended, or that another container's supervisor has started."""
        if isinstance(self.process, ForkedProcess):
            return self.process.visible_pid
        return self.pid if self.alive else 0

    def _on_readable(self) -> None:
        try:
            received = wire.recv(self._sock)
        except BlockingIOError:
            return
        except (OSError, ControlError) as exc:
            log.error("%s %d: %s", self.name, self.pid, exc)
            received = None
        if received is None:
            self._close()
            return
        message, fds = received
        reply = self._pending.get(message["id"]) if isinstance(message.get("id"), int) else None
        if reply is not None and not reply.done():
            reply.set_result((message, fds))
            return
        wire.close_all(fds)
        if "op" in message:
            self.on_notification(message)

    def _close(self) -> None:
        if self._sock.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._sock.fileno())
            self._sock.close()
        for reply in self._pending.values():
            if not reply.done():
                reply.set_exception(ControlError(f"{self.name} {self.pid} died"))


class ForkedProcess:
    """A process that a nursery has forked. Takes over `process_fd`. `is_ours`: it was our nursery, which tells how it
    ended.
    """

    def __init__(self, pid: int, process_fd: int, *, is_ours: bool = True) -> None:
        self._pid, self._fd, self._is_ours = pid, process_fd, is_ours
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int] = self._loop.create_future()
        self._loop.add_reader(process_fd, self._on_end)

    @property
    def pid(self) -> int:
        """See `Process.pid`."""
        return self._pid

    @property
    def fd(self) -> int:
        """Of the process, as long as it lives; else -1."""
        return self._fd

    @property
    def returncode(self) -> int | None:
        """See `Process.returncode`; -1 when nobody is left who could tell."""
        return self._ended.result() if self._ended.done() else None

    async def wait(self) -> int:
        """See `Process.wait`."""
        return await asyncio.shield(self._ended)

    @property
    def visible_pid(self) -> int:
        """See `Child.visible_pid`. `pid` may be a number of another name space."""
        with contextlib.suppress(OSError, ValueError, StopIteration):
            fields = Path(f"/proc/self/fdinfo/{self._fd}").read_text(encoding="ascii").splitlines()
            return max(0, next(int(line.partition(":")[2]) for line in fields if line.startswith("Pid:")))
        return 0

    def send_signal(self, number: int) -> None:
        """See `Process.send_signal`."""
        if self._fd < 0:
            raise ProcessLookupError(self._pid)
        signal.pidfd_send_signal(self._fd, number)

    def kill(self) -> None:
        """See `Process.kill`."""
        self.send_signal(signal.SIGKILL)

    def ended(self, status: int) -> None:
        """It has, the nursery says."""
        if not self._ended.done():
            self._ended.set_result(status)

    def _on_end(self) -> None:
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
        self._fd = -1
        self._loop.call_later(_STATUS_PATIENCE_S if self._is_ours else 0, self.ended, -1)


async def adopted(name: str, slot: KeptSlot | None) -> Child | None:
    """The child that an earlier supervisor left with the keeper, where it lives and serves its mount. Takes over the
    descriptors; one that does not answer, or serves nothing yet, is ended.
    """
    if slot is None:
        return None
    sock_fd, process_fd = wire.exactly(slot.fds, 2)
    poll = select.poll()
    poll.register(process_fd, select.POLLIN)
    if poll.poll(0):
        wire.close_all(slot.fds)
        return None
    process = ForkedProcess(int(slot.note.get("pid", 0)), process_fd, is_ours=False)
    child = Child(name, process, socket.socket(fileno=sock_fd), is_ours=False)
    try:
        if (await child.call("ping", _ADOPTION_PATIENCE_S))[0].get("serving"):
            return child
    except ControlError as exc:
        log.warning("%s of the supervisor before: %s", name, exc)
    child.kill()
    child.let_go()
    return None


class Nursery:
    """Children of these roles, forked from a process that has imported what they need. Started when first needed, and again
    when it has died.
    """

    def __init__(self, roles: Sequence[Role]) -> None:
        self._roles = roles
        self._child: Child | None = None
        self._starting = asyncio.Lock()
        self._forked: WeakValueDictionary[int, ForkedProcess] = WeakValueDictionary()

    async def fork(self, name: str) -> Child:
        """A child of that role, which answers once it is in its jail. Raises: ControlError."""
        nursery_child = await self._running()
        try:
            return await self._fork_from(nursery_child, name)
        except ControlError as exc:
            log.warning("no %s from the nursery: %s; it is started anew", name, exc)
        return await self._fork_from(await self._running(failed=nursery_child), name)

    async def close(self) -> None:
        """End the nursery; its children go on."""
        if self._child is not None:
            await self._child.stop()

    async def _fork_from(self, nursery_child: Child, name: str) -> Child:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        try:
            fields, fds = await nursery_child.call("fork", _START_TIMEOUT_S, [theirs.fileno()], kind=name)
            process = ForkedProcess(wire.field(fields, "pid", int), wire.exactly(fds, 1)[0])
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._forked[process.pid] = process
        return Child(name, process, ours)

    async def _running(self, failed: Child | None = None) -> Child:
        """The nursery; another one than `failed`."""
        async with self._starting:
            if self._child is not None and self._child is failed:
                self._child.kill()
                self._child = None
            if self._child is None or not self._child.alive:
                kinds = [f"--child={shlex.join(role.arguments)}" for role in self._roles]
                self._child = await Child.spawn("nursery", kinds)
                self._child.on_notification = self._on_exit
                await self._child.call("ping", _START_TIMEOUT_S)
            return self._child

    def _on_exit(self, message: wire.Message) -> None:
        process = self._forked.get(int(message.get("pid", 0)))
        if message.get("op") == "exited" and process is not None:
            process.ended(int(message.get("status", -1)))


class ChildPool:
    """Keeps `spares` workers and fetchers ready, so that a publish (or a crash) does not wait even for a fork. A spare knows
    nothing of any mount.
    """

    _REFILL_DELAY_S = 2.0  # leave the cores to the reader that has just got its mount

    def __init__(self, roles: Sequence[Role], spares: int) -> None:
        self._nursery = Nursery(roles)
        self._spares = spares
        self._idle: dict[str, list[Child]] = {name: [] for name in _WITH_SPARES}
        self._refills: set[asyncio.Task[None]] = set()
        self._closed = False

    async def fill(self) -> None:
        """Start the spares now."""
        await asyncio.gather(*(self._refill(name, 0) for name in self._idle))

    async def fork(self, name: str) -> Child:
        """A new child, no spare. Raises: ControlError."""
        return await self._nursery.fork(name)

    async def take(self, name: str) -> Child:
        """A live child that nobody else has. Raises: ControlError."""
        idle = self._idle[name]
        while idle:
            child = idle.pop()
            if child.alive:
                break
        else:
            child = await self.fork(name)
        if self._spares and not self._closed:
            task = asyncio.create_task(self._refill(name, self._REFILL_DELAY_S))
            self._refills.add(task)
            task.add_done_callback(self._refills.discard)
        return child

    async def close(self) -> None:
        """Stop the spares, and what they are forked from."""
        self._closed = True
        for task in self._refills:
            task.cancel()
        await asyncio.gather(*(child.stop() for idle in self._idle.values() for child in idle))
        await self._nursery.close()

    async def _refill(self, name: str, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        idle = self._idle[name]
        idle[:] = [child for child in idle if child.alive]
        while len(idle) < self._spares and not self._closed:
            try:
                child = await self.fork(name)
                await child.call("ping", _START_TIMEOUT_S)
            except ControlError as exc:
                log.error("no spare %s: %s", name, exc)
                return
            idle.append(child)
