"""The supervisor's operations, as its clients call them. The server side is `csi.supervisor.main`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from csi.control import endpoint, wire
from csi.credentials import NO_LOGINS, Credentials, Keyring, keyring_to_wire, to_wire
from csi.errors import ControlError
from csi.oci.digest import Digest
from csi.oci.reference import Reference
from csi.oci.view import View
from csi.volume import SHARED_DOMAIN, Prefetch, Verify

SOCKET_NAME = "supervisor.sock"
_ENSURE_TIMEOUT_S = 100.0  # below kubelet's two minutes; the work goes on, and the next call joins it
_QUICK_TIMEOUT_S = 20.0
_CACHE_TIMEOUT_S = 3600.0
_STATUS_LIMIT_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class LeasedMount:
    """A mount somebody has a lease of. `total_bytes` and `files` are those of the whole model."""

    mount_id: str
    digest: Digest
    device: str
    verify: Verify
    can_resend: bool
    files: int
    total_bytes: int
    parents: tuple[str, ...] = ()
    """What the model builds on: references with digests."""
    sealed: bool = False
    """The target may show it as plain files."""


class SupervisorClient:
    """Blocking calls; each uses a connection of its own, so any number of threads may share a client."""

    def __init__(self, state_dir: str) -> None:
        self._path = os.path.join(state_dir, SOCKET_NAME)

    def ping(self) -> int:
        """The supervisor's pid."""
        return int(self._call("ping")["pid"])

    def ensure(
        self,
        *,
        target_path: str,
        volume_id: str,
        reference: Reference,
        pinned: Digest | None,
        verify: Verify | None,
        prefetch: Prefetch,
        view: View,
        credentials: Credentials,
        domain: str = SHARED_DOMAIN,
        service_account: str = "",
        keyring: Keyring = NO_LOGINS,
        pinned_parents: Sequence[str] = (),
    ) -> LeasedMount:
        """The mount of that model, made or joined, with a lease for `target_path`. `verify` None: the best the model
        allows. `keyring` and `pinned_parents` are for what the model builds on.
        """
        fields = self._call(
            "ensure",
            _ENSURE_TIMEOUT_S,
            keyring,
            target_path=target_path,
            volume_id=volume_id,
            reference=str(reference),
            pinned=str(pinned) if pinned else None,
            verify=str(verify) if verify else None,
            prefetch=str(prefetch),
            view=view.texts,
            credentials=to_wire(credentials),
            domain=domain,
            service_account=service_account,
            pinned_parents=list(pinned_parents),
        )
        return _leased(fields)

    def renew(self, target_path: str, credentials: Credentials, keyring: Keyring = NO_LOGINS) -> LeasedMount | None:
        """Hand over newer credentials. None: no such lease, or its mount is dead."""
        fields = {"target_path": target_path, "credentials": to_wire(credentials)}
        found = self._call("renew", _QUICK_TIMEOUT_S, keyring, **fields)["mount"]
        return None if found is None else _leased(found)

    def release(self, target_path: str, timeout_s: float = _QUICK_TIMEOUT_S) -> None:
        """Give a lease back. Unknown is fine."""
        self._call("release", timeout_s, target_path=target_path)

    def reconcile(self, target_paths: list[str], before: float) -> None:
        """These leases are all we have of those given `before` (CLOCK_MONOTONIC, seconds)."""
        self._call("reconcile", target_paths=target_paths, before=before)

    def cache(self, verb: str, **fields: Any) -> dict[str, Any]:
        """What `modelmount cache` asks of the store. Hashing everything takes its time."""
        _, fds = endpoint.call(self._path, "cache", _CACHE_TIMEOUT_S, verb=verb, **fields)
        try:
            result: dict[str, Any] = json.loads(wire.read_all(wire.exactly(fds, 1)[0], _STATUS_LIMIT_BYTES, "cache"))
        finally:
            wire.close_all(fds)
        return result

    def status(self, target_path: str | None = None) -> list[dict[str, Any]]:
        """Every mount (or one target's) with progress, counters and events."""
        _, fds = endpoint.call(self._path, "status", _QUICK_TIMEOUT_S, target_path=target_path)
        if len(fds) != 1:
            wire.close_all(fds)
            raise ControlError("supervisor answered 'status' without its content")
        try:
            mounts: list[dict[str, Any]] = json.loads(wire.read_all(fds[0], _STATUS_LIMIT_BYTES, "status"))
        finally:
            os.close(fds[0])
        return mounts

    def _call(
        self, op: str, timeout_s: float = _QUICK_TIMEOUT_S, keyring: Keyring = NO_LOGINS, **fields: Any
    ) -> dict[str, Any]:
        logins = json.dumps(keyring_to_wire(keyring)).encode()
        sent = [wire.memfd("keyring", logins)] if keyring.entries else []
        try:
            reply, fds = endpoint.call(self._path, op, timeout_s, sent, **fields)
        finally:
            wire.close_all(sent)
        wire.close_all(fds)
        return reply


def cached_bytes(mount: Mapping[str, Any]) -> tuple[int, int]:
    """Of a mount's status: bytes in the cache (whole blocks), bytes of all blobs."""
    blobs = mount["progress"].get("blobs", [])
    present = sum(
        blob["size_bytes"]
        if blob["present_blocks"] == blob["blocks"]
        else blob["size_bytes"] * blob["present_blocks"] // max(1, blob["blocks"])
        for blob in blobs
    )
    return present, sum(blob["size_bytes"] for blob in blobs)


def is_verified(mount: Mapping[str, Any]) -> bool:
    """Of a mount's status: every blob is here and has its digest."""
    blobs = mount["progress"].get("blobs", [])
    return bool(blobs) and all(blob["state"] == "verified" for blob in blobs)


def _leased(fields: dict[str, Any]) -> LeasedMount:
    return LeasedMount(
        mount_id=wire.field(fields, "mount_id", str),
        digest=Digest.parse(wire.field(fields, "digest", str)),
        device=wire.field(fields, "device", str),
        verify=Verify(wire.field(fields, "verify", str)),
        can_resend=wire.field(fields, "can_resend", bool),
        files=wire.field(fields, "files", int),
        total_bytes=wire.field(fields, "total_bytes", int),
        parents=tuple(str(parent) for parent in fields.get("parents", ())),
        sealed=bool(fields.get("sealed")),
    )
