"""What the node process remembers on disk: publications of this boot, and pins that outlive boots.

A publication says which volume was published where, and with which arguments, so that a repeat can be told from
a conflict after a restart. Written before the bind and removed after the unbind; what is really mounted is
mountinfo's business, and wins.

A pin says which digest a volume got at its first publish on this node. It lives until the volume's last unpublish
here, beyond reboots: a restarted pod never gets another model because a tag moved, nor one that builds on another.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from csi.oci.digest import Digest
from csi.pods import Pod

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Publication:
    """One published target. `arguments` is a fingerprint of everything a repeat must repeat."""

    volume_id: str
    target_path: str
    arguments: str
    digest: str
    mount_id: str
    device: str
    total_bytes: int
    files: int
    boot_id: str
    pod: Pod | None = None
    """Whom it is published for, where kubelet says."""


class Publications:
    """Files below `directory`, one per target path."""

    def __init__(self, directory: str, boot_id: str) -> None:
        self._directory = directory
        self._boot_id = boot_id
        os.makedirs(directory, mode=0o700, exist_ok=True)
        self._by_target: dict[str, Publication] = {}
        for name in sorted(os.listdir(directory)):
            path = os.path.join(directory, name)
            record = _load(path)
            if record is None or record.get("boot_id") != boot_id:  # the mounts of another boot are gone
                os.unlink(path)
                continue
            pod = record.pop("pod", None)
            publication = Publication(**record, pod=Pod(**pod) if pod else None)
            self._by_target[publication.target_path] = publication

    def get(self, target_path: str) -> Publication | None:
        """The publication at that target."""
        return self._by_target.get(target_path)

    def all(self) -> list[Publication]:
        """Every publication of this boot."""
        return list(self._by_target.values())

    def of_volume(self, volume_id: str) -> list[Publication]:
        """Where that volume is published."""
        return [publication for publication in self._by_target.values() if publication.volume_id == volume_id]

    def write(self, publication: Publication) -> None:
        """Durable when it returns. May be called in any thread; `put` makes it known to this process."""
        store_record(self._directory, publication.target_path, asdict(publication))

    def put(self, publication: Publication) -> None:
        """That target is published, as far as this process tells. `write` it before."""
        self._by_target[publication.target_path] = publication

    def remove(self, target_path: str) -> None:
        """No such publication: nothing to do."""
        self._by_target.pop(target_path, None)
        remove_record(self._directory, target_path)


@dataclass(frozen=True, slots=True)
class Pin:
    """The digest a volume got, and references with digests of what that model builds on."""

    digest: Digest
    parents: tuple[str, ...] = ()


class Pins:
    """Files below `directory`, one per volume id."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        os.makedirs(directory, mode=0o700, exist_ok=True)

    def get(self, volume_id: str) -> Pin | None:
        """What this volume is pinned to."""
        record = load_record(self._directory, volume_id)
        if not record:
            return None
        return Pin(Digest.parse(str(record["digest"])), tuple(map(str, record.get("parents", ()))))

    def put(self, volume_id: str, pin: Pin) -> None:
        """Durable when it returns."""
        record = {"volume_id": volume_id, "digest": str(pin.digest), "parents": pin.parents}
        store_record(self._directory, volume_id, record)

    def remove(self, volume_id: str) -> None:
        """No such pin: nothing to do."""
        remove_record(self._directory, volume_id)


def load_record(directory: str, name: str) -> dict[str, Any] | None:
    """The record called `name` in that directory; None when there is none, or nothing that can be read."""
    return _load(_path(directory, name))


def store_record(directory: str, name: str, record: Mapping[str, Any]) -> None:
    """Durable when it returns."""
    path = _path(directory, name)
    temporary = path + ".tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(record, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    directory_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory_fd)
    finally:
        os.close(directory_fd)


def remove_record(directory: str, name: str) -> None:
    """No such record: nothing to do."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(_path(directory, name))


def _path(directory: str, name: str) -> str:
    """Ids and paths come from outside and never become part of a path as they are."""
    return os.path.join(directory, hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest() + ".json")


def _load(path: str) -> dict[str, Any] | None:
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as exc:
        log.warning("record %s is unreadable and ignored: %s", os.path.basename(path), exc)
        return None
    return value if isinstance(value, dict) else None
