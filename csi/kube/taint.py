"""The startup taint: a node may join the cluster with it, so that no pod comes before its models can be mounted. The node
process takes it away once kubelet lists the driver in the CSINode object.

Needs `get` and `patch` of nodes, `get` of csinodes.
"""

from __future__ import annotations

import json
from typing import Any

from kubernetes.client import ApiClient, CoreV1Api, StorageV1Api

from csi.errors import ControlError
from csi.kube.api import TIMEOUT_S, errors_named

STARTUP_TAINT = "csi.modelmount.dev/agent-not-ready"


class StartupTaint:
    """The taint of one node, whatever its effect."""

    def __init__(self, client: ApiClient, node_name: str, driver: str) -> None:
        self._client = client
        self._core, self._storage = CoreV1Api(client), StorageV1Api(client)
        self._node_name, self._driver = node_name, driver

    def remove_if_registered(self) -> bool:
        """True when the node has no such taint (any more); False when kubelet does not list the driver yet.

        Raises: ControlError; also when somebody else changed the node meanwhile: try again.
        """
        if not self._is_registered():
            return False
        with errors_named(f"Node {self._node_name}"):
            node = self._core.read_node(self._node_name, _request_timeout=TIMEOUT_S)
            assert node.metadata is not None
            taints = (node.spec.taints if node.spec else None) or []
            kept = [taint for taint in taints if taint.key != STARTUP_TAINT]
            if len(kept) == len(taints):
                return True
            # With the version that was read: a taint put on in between must not be lost.
            patch = [
                {"op": "replace", "path": "/metadata/resourceVersion", "value": node.metadata.resource_version},
                {"op": "replace", "path": "/spec/taints", "value": self._client.sanitize_for_serialization(kept)},
            ]
            self._core.patch_node(self._node_name, patch, _request_timeout=TIMEOUT_S)
        return True

    def _is_registered(self) -> bool:
        try:
            with errors_named(f"CSINode {self._node_name}"):
                # As JSON: the client's own class refuses the `drivers: null` of a node without drivers.
                answer: Any = self._storage.read_csi_node(
                    self._node_name, _preload_content=False, _request_timeout=TIMEOUT_S
                )
        except ControlError as exc:
            if exc.fields.get("status") == 404:  # kubelet makes it with its first driver
                return False
            raise
        drivers = json.loads(answer.data)["spec"].get("drivers") or []
        return any(driver["name"] == self._driver for driver in drivers)
