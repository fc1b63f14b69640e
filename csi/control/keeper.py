"""The keeper's operations, as its clients call them. The server side is `csi.keeper.main`."""

from __future__ import annotations

import os
from dataclasses import dataclass

from csi.control import endpoint, wire

SOCKET_NAME = "keeper.sock"
_TIMEOUT_S = 20.0  # mounts and binds take milliseconds; only a stuck host takes longer


@dataclass(frozen=True, slots=True)
class KeptMount:
    """A superblock the keeper holds. `can_resend`: the kernel repeats requests a dead worker had taken. `existed`: it was
    there before this call. `backend`: who serves it, as its first `mount` said.
    """

    mount_id: str
    device: str
    init_set_version: int
    can_resend: bool
    existed: bool
    backend: str


class KeeperClient:
    """Blocking calls; each uses a connection of its own, so any number of threads may share a client."""

    def __init__(self, state_dir: str) -> None:
        self._path = os.path.join(state_dir, SOCKET_NAME)

    def ping(self) -> dict[str, object]:
        """What the keeper says of itself: pid, kernel, init_set_version."""
        return self._call("ping")[0]

    def mount(self, mount_id: str, read_ahead_kb: int, backend: str) -> tuple[KeptMount, int, int, bytes]:
        """The superblock of `mount_id`, made if there is none: what it is, its /dev/fuse fd, the fd of its request
        table, its INIT request. `backend` is for one that is made; one that exists keeps its own.
        """
        fields, fds = self._call("mount", mount_id=mount_id, read_ahead_kb=read_ahead_kb, backend=backend)
        fuse_fd, table_fd = wire.exactly(fds, 2)
        return _kept(fields), fuse_fd, table_fd, bytes.fromhex(str(fields["init"]))

    def bind(self, mount_id: str, target_path: str) -> bool:
        """Show the superblock read-only at `target_path`; False when it was there already."""
        return bool(self._call("bind", mount_id=mount_id, target_path=target_path)[0]["bound"])

    def unbind(self, target_path: str) -> None:
        """Detach what is ours at `target_path` and remove the directory. Nothing there is fine."""
        self._call("unbind", target_path=target_path)

    def unmount(self, mount_id: str) -> None:
        """Detach the superblock and let go of its connection. Unknown is fine."""
        self._call("unmount", mount_id=mount_id)

    def mounts(self) -> list[KeptMount]:
        """The superblocks the keeper holds."""
        return [_kept(entry) for entry in self._call("list")[0]["mounts"]]

    def _call(self, op: str, **fields: str | int) -> tuple[wire.Message, list[int]]:
        return endpoint.call(self._path, op, _TIMEOUT_S, (), **fields)


def _kept(fields: wire.Message) -> KeptMount:
    return KeptMount(
        mount_id=wire.field(fields, "mount_id", str),
        device=wire.field(fields, "device", str),
        init_set_version=wire.field(fields, "init_set_version", int),
        can_resend=wire.field(fields, "can_resend", bool),
        existed=wire.field(fields, "existed", bool),
        backend=wire.field(fields, "backend", str),
    )
