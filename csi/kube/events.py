"""Events on pods, as `kubectl describe pod` shows them. One Event object per pod and reason: a repeat counts it up."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime

from kubernetes.client import (
    ApiClient,
    CoreV1Api,
    CoreV1Event,
    V1EventSource,
    V1ObjectMeta,
    V1ObjectReference,
)

from csi.errors import ControlError
from csi.kube.api import TIMEOUT_S, errors_named
from csi.pods import Pod

_COMPONENT = "csi.modelmount.dev"
_MAX_MESSAGE = 1024  # the API server refuses longer ones


class KubeEvents:
    """See `Events`. Needs `create` and `patch` on events."""

    def __init__(self, client: ApiClient, node_name: str) -> None:
        self._core = CoreV1Api(client)
        self._node_name = node_name
        self._counts: dict[str, int] = {}

    def post(self, pod: Pod, *, warning: bool, reason: str, message: str) -> None:
        """See `Events.post`."""
        key = hashlib.sha256(f"{pod.uid} {reason}".encode()).hexdigest()[:16]
        name = f"{pod.name[:200]}.{key}"
        count = self._counts.get(key, 0) + 1
        now = datetime.now(UTC)
        event = CoreV1Event(
            metadata=V1ObjectMeta(name=name, namespace=pod.namespace),
            involved_object=V1ObjectReference(
                api_version="v1", kind="Pod", namespace=pod.namespace, name=pod.name, uid=pod.uid
            ),
            type="Warning" if warning else "Normal",
            reason=reason,
            message=message[:_MAX_MESSAGE],
            source=V1EventSource(component=_COMPONENT, host=self._node_name),
            reporting_component=_COMPONENT,
            reporting_instance=self._node_name,
            first_timestamp=now,
            last_timestamp=now,
            count=count,
        )
        what = f"event {reason} on pod {pod.namespace}/{pod.name}"
        try:
            with errors_named(what):
                self._core.create_namespaced_event(pod.namespace, event, _request_timeout=TIMEOUT_S)
        except ControlError as exc:
            if exc.fields.get("status") != 409:
                raise
            again = {"message": event.message, "lastTimestamp": now.isoformat(), "count": count, "type": event.type}
            with errors_named(what):
                self._core.patch_namespaced_event(name, pod.namespace, again, _request_timeout=TIMEOUT_S)
        self._counts[key] = count
