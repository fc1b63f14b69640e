"""The keeper's operations, as its clients call them. The server side is `csi.keeper.main`."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from csi.control import endpoint, wire
from csi.errors import ControlError

SOCKET_NAME = "keeper.sock"
_TIMEOUT_S = 20.0  # mounts and binds take milliseconds; only a stuck host takes longer


@dataclass(frozen=True, slots=True)
class KeptMount:
    """A superblock the keeper knows. `can_resend`: the kernel repeats requests a dead worker had taken. `existed`: it was
    there before this call. `backend`: who serves it, as its first `mount` said. `connected`: the keeper holds its connection.
    """

    mount_id: str
    device: str
    init_set_version: int
    can_resend: bool
    existed: bool
    backend: str
    connected: bool


@dataclass(frozen=True, slots=True)
class KeptSlot:
    """What was left with the keeper under one name: a note and descriptors (now the caller's)."""

    note: dict[str, Any]
    fds: list[int]


@dataclass(frozen=True, slots=True)
class CollectedMount:
    """A superblock with its descriptors (now the caller's): the connection, the table of requests taken, and O_PATH
    the root of the mount. `backings`: the backing ids it has, by the names of their files.
    """

    mount: KeptMount
    fuse_fd: int
    table_fd: int
    root_fd: int
    init: bytes
    slots: dict[str, KeptSlot]
    backings: dict[str, int]

    def close(self) -> None:
        """Let go of every descriptor."""
        wire.close_all(
            [self.fuse_fd, self.table_fd, self.root_fd, *(fd for slot in self.slots.values() for fd in slot.fds)]
        )


class KeeperClient:
    """Blocking calls; each uses a connection of its own, so any number of threads may share a client."""

    def __init__(self, state_dir: str) -> None:
        self._path = os.path.join(state_dir, SOCKET_NAME)

    def ping(self) -> dict[str, object]:
        """What the keeper says of itself: pid, kernel, init_set_version."""
        return self._call("ping")[0]

    def watch(self, timeout_s: float) -> socket.socket:
        """A connection that ends with the keeper. Raises: ControlError when none answers."""
        sock = endpoint.connect(self._path, timeout_s)
        try:
            wire.send(sock, {"id": 1, "op": "watch"})
            if (received := wire.recv(sock)) is None or "ok" not in received[0]:
                raise ControlError("keeper: does not let itself be watched")
        except OSError as exc:
            sock.close()
            raise ControlError(f"keeper: no answer to 'watch': {exc}") from exc
        except ControlError:
            sock.close()
            raise
        return sock

    def mount(self, mount_id: str, read_ahead_kb: int, backend: str) -> CollectedMount:
        """The superblock of `mount_id`, made if there is none. `backend` is for one that is made; one that exists keeps
        its own.
        """
        return _collected(*self._call("mount", mount_id=mount_id, read_ahead_kb=read_ahead_kb, backend=backend))

    def collect(self, mount_id: str) -> CollectedMount:
        """The superblock of `mount_id` and what was left with it. Raises: MountError when its connection is lost."""
        return _collected(*self._call("collect", mount_id=mount_id))

    def restore(self, mount_id: str, fuse_fd: int, table_fd: int, backings: Mapping[str, int] | None = None) -> None:
        """Give a keeper that was restarted the connection back. Raises: MountError when that mount is gone."""
        self._call("restore", (fuse_fd, table_fd), mount_id=mount_id, backings=dict(backings or {}))

    def back(self, mount_id: str, file_fd: int) -> tuple[str, int]:
        """Let the mount's files be read from a proven file by passthrough. The file's name and its backing id, the same again
        for a file that has one. Raises: MountError with the reason why that cannot be.
        """
        fields, _ = self._call("back", (file_fd,), mount_id=mount_id)
        return wire.field(fields, "file", str), wire.field(fields, "backing_id", int)

    def unback(self, mount_id: str, backing_id: int) -> None:
        """Nothing is opened by that id any more."""
        self._call("unback", mount_id=mount_id, backing_id=backing_id)

    def settle(self) -> None:
        """Everything was brought back: mounts without a connection are lost, and removed."""
        self._call("settle")

    def keep(self, mount_id: str, slot: str, note: dict[str, Any], fds: tuple[int, ...]) -> None:
        """Leave descriptors and a note under the mount, for `collect` by whoever supervises it next."""
        self._call("keep", fds, mount_id=mount_id, slot=slot, note=note)

    def drop(self, mount_id: str, slot: str) -> None:
        """Close what was left in that slot. Nothing there is fine."""
        self._call("drop", mount_id=mount_id, slot=slot)

    def bind(self, mount_id: str, target_path: str, *, sealed: bool = False) -> bool:
        """Show the mount read-only at `target_path`, with `sealed` as plain files where that can be; False when it was there
        already, in either way.
        """
        return bool(self._call("bind", mount_id=mount_id, target_path=target_path, sealed=sealed)[0]["bound"])

    def unbind(self, target_path: str) -> None:
        """Detach what is ours at `target_path` and remove the directory. Nothing there is fine."""
        self._call("unbind", target_path=target_path)

    def unmount(self, mount_id: str) -> None:
        """Detach the superblock and let go of its connection. Unknown is fine."""
        self._call("unmount", mount_id=mount_id)

    def mounts(self) -> list[KeptMount]:
        """The superblocks the keeper knows."""
        return [_kept(entry) for entry in self._call("list")[0]["mounts"]]

    def _call(self, op: str, fds: tuple[int, ...] = (), **fields: Any) -> tuple[wire.Message, list[int]]:
        return endpoint.call(self._path, op, _TIMEOUT_S, fds, **fields)


def _collected(fields: wire.Message, fds: list[int]) -> CollectedMount:
    try:
        counts = [int(note["fds"]) for note in wire.field(fields, "slots", list)]
        wire.exactly(fds, 3 + sum(counts))
        slots, rest = {}, fds[3:]
        for note, count in zip(fields["slots"], counts, strict=True):
            slots[str(note["slot"])], rest = KeptSlot(dict(note["note"]), rest[:count]), rest[count:]
        init = bytes.fromhex(wire.field(fields, "init", str))
        backings = {str(name): int(backing_id) for name, backing_id in dict(fields.get("backings", {})).items()}
        return CollectedMount(_kept(fields), fds[0], fds[1], fds[2], init, slots, backings)
    except (KeyError, TypeError, ValueError) as exc:
        wire.close_all(fds)
        raise ControlError(f"keeper: malformed answer: {exc}") from exc


def _kept(fields: wire.Message) -> KeptMount:
    return KeptMount(
        mount_id=wire.field(fields, "mount_id", str),
        device=wire.field(fields, "device", str),
        init_set_version=wire.field(fields, "init_set_version", int),
        can_resend=wire.field(fields, "can_resend", bool),
        existed=wire.field(fields, "existed", bool),
        backend=wire.field(fields, "backend", str),
        connected=wire.field(fields, "connected", bool),
    )
