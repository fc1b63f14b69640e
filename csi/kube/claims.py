"""PersistentVolumeClaims, read one at a time: the controller needs `get` and nothing else."""

from __future__ import annotations

from kubernetes.client import ApiClient, CoreV1Api

from csi.errors import ControlError
from csi.kube.api import TIMEOUT_S, errors_named
from csi.provisioned import Claim


class KubeClaims:
    """See `Claims`."""

    def __init__(self, client: ApiClient) -> None:
        self._core = CoreV1Api(client)

    def get(self, namespace: str, name: str) -> Claim | None:
        """See `Claims.get`."""
        try:
            with errors_named(f"PersistentVolumeClaim {namespace}/{name}"):
                found = self._core.read_namespaced_persistent_volume_claim(name, namespace, _request_timeout=TIMEOUT_S)
        except ControlError as exc:
            if exc.fields.get("status") == 404:
                return None
            raise
        metadata = found.metadata
        assert metadata is not None
        return Claim(
            namespace=namespace, name=name, uid=metadata.uid or "", annotations=dict(metadata.annotations or {})
        )
