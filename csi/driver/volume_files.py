"""Provisioned volumes as files below a directory: for a controller outside Kubernetes."""

from __future__ import annotations

import os

from csi.driver.records import load_record, remove_record, store_record
from csi.errors import ControlError
from csi.provisioned import ProvisionedVolume


class ProvisionedVolumeFiles:
    """See `ProvisionedVolumes`. One process at a time: callers hold a lock per volume."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        os.makedirs(directory, mode=0o700, exist_ok=True)

    def get(self, volume_id: str) -> ProvisionedVolume | None:
        """See `ProvisionedVolumes.get`."""
        record = load_record(self._directory, volume_id)
        if record is None:
            return None
        try:
            return ProvisionedVolume.from_json(record)
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            raise ControlError(f"the record of volume {volume_id} is not one of ours: {exc!r}") from exc

    def add(self, volume: ProvisionedVolume) -> ProvisionedVolume:
        """See `ProvisionedVolumes.add`."""
        found = self.get(volume.volume_id)
        if found is not None:
            return found
        store_record(self._directory, volume.volume_id, volume.to_json())
        return volume

    def remove(self, volume_id: str) -> None:
        """See `ProvisionedVolumes.remove`."""
        remove_record(self._directory, volume_id)
