"""What is wrong with a published volume, told from what its supervisor knows: CSI 1.13 volume health.

An entry is there as long as its cause is, at most one per reason; no entry means healthy. Nothing here touches a
mounted file system or a registry.

    MountLost            INACCESSIBLE  the connection is gone; the next publish makes it anew
    WorkerRestarting     INACCESSIBLE  reads wait for a new worker
    WorkerNotAnswering   INACCESSIBLE  the worker is there and says nothing
    IntegrityFailure     DATA_LOSS     bytes do not have their digest; reads of them fail
    RegistryUnreachable  DEGRADED      what is not in the cache cannot be read now
    CredentialsExpired   DEGRADED      the registry refuses the volume's credentials; what is cached is still read
    AccessRefused        DEGRADED      a republish found that the pod may not pull this model any more
    ModelGone            DEGRADED      the registry does not have the model any more
    CacheFailure         DEGRADED      the node's cache disk is full or broken
    FetchFailing         DEGRADED      anything else that keeps bytes from coming
    SupervisorUnreachable  DEGRADED    what is there is served; what goes wrong with it now is not seen to

Source: CSI 1.13 spec, "NodeGetVolumeHealth".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from csi.wire import csi_pb2

_MAX_MESSAGE = 1000


class Severity(Enum):
    """How bad it is for whoever reads the volume."""

    DEGRADED = csi_pb2.DEGRADED
    INACCESSIBLE = csi_pb2.INACCESSIBLE
    DATA_LOSS = csi_pb2.DATA_LOSS


@dataclass(frozen=True, slots=True)
class Trouble:
    """One thing that is wrong. `reason` is CamelCase, `message` for people."""

    severity: Severity
    reason: str
    message: str


_FETCH_REASONS = {
    "RegistryUnavailableError": "RegistryUnreachable",
    "RegistryAuthError": "CredentialsExpired",
    "ModelNotFoundError": "ModelGone",
    "CacheError": "CacheFailure",
    "DigestMismatchError": "IntegrityFailure",
    "SizeMismatchError": "IntegrityFailure",
}


def troubles_of(mount: Mapping[str, Any] | None, target_path: str) -> list[Trouble]:
    """From the supervisor's status of the mount shown at `target_path`; None when it knows none."""
    if mount is None or mount.get("dead"):
        return [
            Trouble(
                Severity.INACCESSIBLE,
                "MountLost",
                "the mount is gone: reads fail with ENOTCONN until the volume is published again, which kubelet does by "
                "itself within about a minute; a running container sees it after its own restart, or at once with "
                "mountPropagation: HostToContainer",
            )
        ]
    found = [*_worker(mount), *_content(mount), *_fetching(mount), *_access(mount, target_path)]
    return list({trouble.reason: trouble for trouble in reversed(found)}.values())[::-1]


def supervisor_unreachable(error: Exception) -> Trouble:
    """The node's supervisor did not answer."""
    return Trouble(Severity.DEGRADED, "SupervisorUnreachable", f"nothing watches this node's mounts now: {error}")


def node_troubles(mounts: Sequence[Mapping[str, Any]]) -> list[Trouble]:
    """What is wrong with more than one volume's worth: registries and the cache disk, as all mounts see them."""
    seen: dict[str, list[str]] = {}
    for mount in mounts:
        for trouble in _fetching(mount):
            if trouble.reason in ("RegistryUnreachable", "CacheFailure"):
                seen.setdefault(trouble.reason, []).append(trouble.message)
    return [
        Trouble(Severity.DEGRADED, reason, f"{len(texts)} of {len(mounts)} mounts: {texts[0]}")
        for reason, texts in seen.items()
    ]


def _worker(mount: Mapping[str, Any]) -> list[Trouble]:
    if mount.get("worker_resting"):  # nobody reads
        return []
    if not mount.get("worker_alive", True):
        text = f"reads wait for a new worker ({mount.get('worker_restarts', 0)} restarts so far)"
        return [Trouble(Severity.INACCESSIBLE, "WorkerRestarting", text)]
    if not mount.get("reads"):
        return [Trouble(Severity.INACCESSIBLE, "WorkerNotAnswering", "the worker does not answer; reads may wait")]
    return []


def _content(mount: Mapping[str, Any]) -> list[Trouble]:
    wrong = [blob["digest"] for blob in _blobs(mount) if blob.get("state") == "poisoned"]
    if not wrong:
        return []
    text = f"{len(wrong)} of {len(_blobs(mount))} blobs do not hash to their digest ({', '.join(wrong[:3])}); reads of them fail"
    return [Trouble(Severity.DATA_LOSS, "IntegrityFailure", text)]


def _fetching(mount: Mapping[str, Any]) -> list[Trouble]:
    """The fetcher's last failure, unless bytes have come since, or none are missing."""
    progress = mount.get("progress") or {}
    text = progress.get("last_error")
    missing = any(blob["present_blocks"] < blob["blocks"] for blob in _blobs(mount))
    if not text or not missing or progress.get("last_block_at", 0.0) > progress.get("last_error_at", 0.0):
        return []
    if failed := (mount.get("reads") or {}).get("failed_reads"):
        text = f"{text} ({failed} reads have failed)"
    reason = _FETCH_REASONS.get(str(progress.get("last_error_kind")), "FetchFailing")
    severity = Severity.DATA_LOSS if reason == "IntegrityFailure" else Severity.DEGRADED
    return [Trouble(severity, reason, str(text)[:_MAX_MESSAGE])]


def _access(mount: Mapping[str, Any], target_path: str) -> list[Trouble]:
    refused = (mount.get("refused") or {}).get(target_path)
    return [Trouble(Severity.DEGRADED, "AccessRefused", str(refused)[:_MAX_MESSAGE])] if refused else []


def _blobs(mount: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    blobs: Sequence[Mapping[str, Any]] = (mount.get("progress") or {}).get("blobs") or []
    return blobs
