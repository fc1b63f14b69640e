"""Which nodes a DaemonSet's pods are not ready on yet.

Needs `get` of daemonsets and `list` of pods in the namespace.
"""

from __future__ import annotations

from kubernetes.client import ApiClient, AppsV1Api, CoreV1Api

from csi.errors import ControlError
from csi.kube.api import TIMEOUT_S, errors_named


def nodes_without_ready_pod(client: ApiClient, namespace: str, name: str) -> list[str]:
    """Empty once every node that the DaemonSet is for has a ready pod.

    Raises: ControlError when the Kubernetes API does not answer, or there is no such DaemonSet.
    """
    with errors_named(f"DaemonSet {namespace}/{name}"):
        found = AppsV1Api(client).read_namespaced_daemon_set(name, namespace, _request_timeout=TIMEOUT_S)
        status = found.status
        observed = status is not None and status.observed_generation == (found.metadata and found.metadata.generation)
        if status is None or not observed:
            return ["the DaemonSet is not scheduled yet"]
        if (status.number_ready or 0) >= status.desired_number_scheduled:
            return []
        if found.spec is None or not found.spec.selector.match_labels:
            raise ControlError(f"DaemonSet {namespace}/{name} has no selector")
        selector = ",".join(f"{key}={value}" for key, value in found.spec.selector.match_labels.items())
        pods = CoreV1Api(client).list_namespaced_pod(namespace, label_selector=selector, _request_timeout=TIMEOUT_S)
    waiting = [
        (pod.spec.node_name if pod.spec else None) or "a node without its pod yet"
        for pod in pods.items
        if not any(c.type == "Ready" and c.status == "True" for c in (pod.status and pod.status.conditions) or [])
    ]
    return sorted(waiting) or ["a node without its pod yet"]
