"""What a mount leaves on disk for the next supervisor: its tree, and who has it. Never credentials.

Of one boot, like the mount itself: a record whose mount the keeper does not have is worth nothing, so nothing is synced
to the disk. Written when the mount begins to be served and whenever its leases change; a mount without a record is one
that nobody was ever told of.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from dataclasses import dataclass, field
from typing import Any

from csi.control import wire
from csi.errors import ModelMountError, MountError
from csi.oci.digest import Digest
from csi.oci.reference import Reference
from csi.oci.view import View
from csi.supervisor.lease import Lease
from csi.supervisor.parents import Parent
from csi.volume import MountKey, Verify

log = logging.getLogger(__name__)

_VERSION = 1
_MAX_TREE_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class MountRecord:
    """See `csi.supervisor.mount.Mount` for what the fields mean. Leases carry no credentials."""

    key: MountKey
    reference: Reference
    indexed: bool
    filling: bool
    summary: dict[str, int]
    proven: tuple[str, ...] = ()
    parents: tuple[Reference, ...] = ()
    leases: dict[str, Lease] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What `of_json` reads."""
        key = self.key
        return {
            "version": _VERSION,
            "key": {
                "domain": key.domain,
                "digest": str(key.digest),
                "verify": str(key.verify),
                "origin": key.origin,
                "view": key.view.texts,
                "parents": list(key.parents),
            },
            "reference": str(self.reference),
            "indexed": self.indexed,
            "filling": self.filling,
            "summary": self.summary,
            "proven": list(self.proven),
            "parents": [str(parent) for parent in self.parents],
            "leases": {
                path: {
                    "volume_id": lease.volume_id,
                    "reference": str(lease.reference),
                    "service_account": lease.service_account,
                    "sealed": lease.sealed,
                    "parents": [str(parent.reference) for parent in lease.parents],
                }
                for path, lease in self.leases.items()
            },
        }

    @classmethod
    def of_json(cls, text: str) -> MountRecord:
        """Raises: ValueError, TypeError, KeyError, ModelMountError for what we have not written; MountError for a record of
        another version.
        """
        given = json.loads(text)
        if given["version"] != _VERSION:
            raise MountError(f"a record of version {given['version']!r}, this supervisor reads {_VERSION}")
        key = given["key"]
        return cls(
            key=MountKey(
                domain=key["domain"],
                digest=Digest.parse(key["digest"]),
                verify=Verify(key["verify"]),
                origin=key["origin"],
                view=View.parse(key["view"]),
                parents=tuple(key["parents"]),
            ),
            reference=Reference.parse(given["reference"]),
            indexed=given["indexed"],
            filling=given["filling"],
            summary=dict(given["summary"]),
            proven=tuple(given["proven"]),
            parents=tuple(map(Reference.parse, given["parents"])),
            leases={
                path: Lease(
                    volume_id=lease["volume_id"],
                    reference=Reference.parse(lease["reference"]),
                    credentials=None,
                    service_account=lease["service_account"],
                    parents=tuple(Parent(Reference.parse(parent)) for parent in lease["parents"]),
                    sealed=bool(lease.get("sealed")),
                    since=0.0,
                )
                for path, lease in given["leases"].items()
            },
        )


class MountRecords:
    """Files below the supervisor's state directory, two per mount, named by mount id."""

    def __init__(self, state_dir: str) -> None:
        self._records_dir = os.path.join(state_dir, "mounted")
        self._trees_dir = os.path.join(state_dir, "trees")

    def load(self) -> dict[str, MountRecord]:
        """By mount id. One that cannot be read is left out: its mount is made anew by the next publish."""
        found: dict[str, MountRecord] = {}
        with contextlib.suppress(FileNotFoundError):
            for name in sorted(os.listdir(self._records_dir)):
                try:
                    with open(os.path.join(self._records_dir, name), encoding="utf-8") as file:
                        record = MountRecord.of_json(file.read())
                except (OSError, ValueError, TypeError, KeyError, AttributeError, ModelMountError) as exc:
                    log.error("the record of mount %s cannot be used: %r", name[:8], exc)
                    continue
                if record.key.mount_id == name:
                    found[name] = record
        return found

    def put(self, record: MountRecord) -> None:
        """Raises: MountError (a full disk)."""
        self._write(self._records_dir, record.key.mount_id, json.dumps(record.to_json()).encode())

    def put_tree(self, mount_id: str, tree_fd: int) -> None:
        """So that a later supervisor's workers load the very same tree. Raises: MountError (a full disk)."""
        self._write(self._trees_dir, mount_id, wire.read_all(tree_fd, _MAX_TREE_BYTES, "tree"))

    def open_tree(self, mount_id: str) -> int:
        """The caller's. Raises: MountError when it is gone."""
        try:
            return os.open(os.path.join(self._trees_dir, mount_id), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as exc:
            raise MountError(f"mount {mount_id[:8]}: its tree is gone: {exc.strerror}") from exc

    def remove(self, mount_id: str) -> None:
        """The mount has ended. Nothing there: nothing to do."""
        for directory in (self._records_dir, self._trees_dir):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(directory, mount_id))

    def keep_only(self, mount_ids: set[str]) -> None:
        """Remove what belongs to no mount any more."""
        for directory in (self._records_dir, self._trees_dir):
            with contextlib.suppress(FileNotFoundError):
                for name in set(os.listdir(directory)) - mount_ids:
                    with contextlib.suppress(OSError):
                        os.unlink(os.path.join(directory, name))

    @staticmethod
    def _write(directory: str, name: str, content: bytes) -> None:
        path = os.path.join(directory, name)
        temporary = f"{path}.tmp"
        try:
            os.makedirs(directory, mode=0o700, exist_ok=True)
            with open(temporary, "wb") as file:
                file.write(content)
            os.replace(temporary, path)
        except OSError as exc:
            raise MountError(
                f"mount {name[:8]}: {temporary} cannot be written: {exc.strerror}; is the state directory full?",
                errno=exc.errno,
            ) from exc
