"""The pod a volume is published for, as kubelet names it with `podInfoOnMount: true`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

_PREFIX = "csi.storage.k8s.io/"


@dataclass(frozen=True, slots=True)
class Pod:
    """kubelet's word, not the pod author's: it overwrites these keys of volume_context."""

    namespace: str
    name: str
    uid: str


def pod_of(volume_context: Mapping[str, str]) -> Pod | None:
    """None where kubelet does not say."""
    texts = [volume_context.get(f"{_PREFIX}pod.{key}", "") for key in ("namespace", "name", "uid")]
    return Pod(*texts) if all(texts) else None


class Events(Protocol):
    """Where a pod's owner is told what happens to its volumes."""

    def post(self, pod: Pod, *, warning: bool, reason: str, message: str) -> None:
        """Blocking. Raises: ControlError when it cannot be told."""
