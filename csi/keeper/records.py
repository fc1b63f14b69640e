"""What the keeper remembers on disk: one file per superblock, of this boot, durable before mount(2).

mountinfo wins: a record without its mount is dropped, a mount without a whole record is detached. What a record
cannot hold is the descriptor itself; a keeper that was restarted gets it back from a supervisor (`restore`).
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass

from csi.errors import MountError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class SuperblockRecord:
    """`device` and `init` are empty until the mount is complete; such a record only says that a mount may be there."""

    boot_id: str
    mount_id: str
    init_set_version: int
    backend: str
    device: str = ""
    init: str = ""

    @property
    def complete(self) -> bool:
        """Whether mount(2) and the INIT handshake were finished."""
        return bool(self.device and self.init)


class SuperblockRecords:
    """Files below `directory`, named by mount id."""

    def __init__(self, directory: str, boot_id: str) -> None:
        self._directory = directory
        self._boot_id = boot_id
        os.makedirs(directory, mode=0o700, exist_ok=True)

    def load(self) -> dict[str, SuperblockRecord]:
        """The records of this boot by mount id; those of other boots and unreadable ones are removed."""
        found: dict[str, SuperblockRecord] = {}
        for name in sorted(os.listdir(self._directory)):
            path = os.path.join(self._directory, name)
            try:
                with open(path, encoding="utf-8") as file:
                    record = SuperblockRecord(**json.load(file))
            except (OSError, ValueError, TypeError) as exc:
                log.warning("record %s is unreadable and dropped: %s", name, exc)
                os.unlink(path)
                continue
            if record.boot_id != self._boot_id or record.mount_id != name:
                os.unlink(path)
                continue
            found[record.mount_id] = record
        return found

    def put(self, mount_id: str, init_set_version: int, backend: str, device: str = "", init: bytes = b"") -> None:
        """Durable when it returns. Raises: MountError (a full disk); then nothing may be mounted."""
        record = SuperblockRecord(
            boot_id=self._boot_id,
            mount_id=mount_id,
            init_set_version=init_set_version,
            backend=backend,
            device=device,
            init=init.hex(),
        )
        path = os.path.join(self._directory, mount_id)
        temporary = f"{path}.tmp"
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                json.dump(asdict(record), file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_directory(self._directory)
        except OSError as exc:
            raise MountError(
                f"mount {mount_id}: its record cannot be written: {exc.strerror}; is the state directory full?",
                errno=exc.errno,
            ) from exc

    def remove(self, mount_id: str) -> None:
        """No such record: nothing to do."""
        try:
            os.unlink(os.path.join(self._directory, mount_id))
        except FileNotFoundError:
            return


def _sync_directory(directory: str) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
