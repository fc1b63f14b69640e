"""Provisioned volumes as ModelVolume objects (deploy/crds/modelvolumes.yaml): one small object per volume, so that
`kubectl get modelvolumes` shows which bytes a PersistentVolume stands for.
"""

from __future__ import annotations

from typing import Any

from kubernetes.client import ApiClient, CustomObjectsApi

from csi.errors import ControlError
from csi.kube.api import TIMEOUT_S, errors_named
from csi.provisioned import ProvisionedVolume

GROUP, VERSION, PLURAL, KIND = "csi.modelmount.dev", "v1alpha1", "modelvolumes", "ModelVolume"


class KubeProvisionedVolumes:
    """See `ProvisionedVolumes`. An object's name is the volume's id."""

    def __init__(self, client: ApiClient) -> None:
        self._objects = CustomObjectsApi(client)

    def get(self, volume_id: str) -> ProvisionedVolume | None:
        """See `ProvisionedVolumes.get`."""
        try:
            with errors_named(f"ModelVolume {volume_id}"):
                found = self._objects.get_cluster_custom_object(
                    GROUP, VERSION, PLURAL, volume_id, _request_timeout=TIMEOUT_S
                )
        except ControlError as exc:
            if exc.fields.get("status") == 404 and self._is_installed():
                return None
            raise
        return _from_object(found)

    def add(self, volume: ProvisionedVolume) -> ProvisionedVolume:
        """See `ProvisionedVolumes.add`."""
        try:
            with errors_named(f"ModelVolume {volume.volume_id}"):
                self._objects.create_cluster_custom_object(
                    GROUP, VERSION, PLURAL, _to_object(volume), _request_timeout=TIMEOUT_S
                )
        except ControlError as exc:
            if exc.fields.get("status") != 409:
                raise
            return self.get(volume.volume_id) or self.add(volume)
        return volume

    def remove(self, volume_id: str) -> None:
        """See `ProvisionedVolumes.remove`."""
        try:
            with errors_named(f"ModelVolume {volume_id}"):
                self._objects.delete_cluster_custom_object(
                    GROUP, VERSION, PLURAL, volume_id, _request_timeout=TIMEOUT_S
                )
        except ControlError as exc:
            if exc.fields.get("status") != 404:
                raise

    def _is_installed(self) -> bool:
        """A missing object and a missing definition are both 404. Raises: ControlError for the latter."""
        with errors_named("CustomResourceDefinition modelvolumes.csi.modelmount.dev (deploy/crds/modelvolumes.yaml)"):
            self._objects.list_cluster_custom_object(GROUP, VERSION, PLURAL, limit=1, _request_timeout=TIMEOUT_S)
        return True


def _to_object(volume: ProvisionedVolume) -> dict[str, Any]:
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": KIND,
        "metadata": {"name": volume.volume_id},
        "spec": {
            "volumeName": volume.name,
            "arguments": volume.arguments,
            "reference": volume.volume_context["reference"],
            "digest": volume.digest,
            "sizeBytes": volume.size_bytes,
            "capacityBytes": volume.capacity_bytes,
            "source": volume.source,
            "volumeContext": dict(volume.volume_context),
        },
    }


def _from_object(found: Any) -> ProvisionedVolume:
    try:
        spec = found["spec"]
        return ProvisionedVolume.from_json(
            {
                "volume_id": found["metadata"]["name"],
                "name": spec["volumeName"],
                "arguments": spec["arguments"],
                "digest": spec["digest"],
                "size_bytes": spec["sizeBytes"],
                "capacity_bytes": spec["capacityBytes"],
                "source": spec["source"],
                "volume_context": spec["volumeContext"],
            }
        )
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise ControlError(f"a ModelVolume object is not one of ours ({exc!r}); was it edited by hand?") from exc
