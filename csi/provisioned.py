"""A volume the controller has made: which model its name was resolved to, once and for all, and where that is kept.

Written once and never changed; whoever finds a volume of that name gets this answer, whatever happened to the tag.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class ProvisionedVolume:
    """`volume_context` is what a node gets to see of it, the digest in its reference.

    `arguments` is a fingerprint of the request, so that a repeat can be told from a conflict. `source` says who named the
    model: `StorageClass`, or `PersistentVolumeClaim namespace/name`.
    """

    volume_id: str
    name: str
    arguments: str
    digest: str
    size_bytes: int
    capacity_bytes: int
    source: str
    volume_context: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Inverse of `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ProvisionedVolume:
        """Raises: KeyError, TypeError, ValueError for anything `to_json` did not make. Fields it does not know are ignored."""
        context = value["volume_context"]
        return cls(
            volume_id=str(value["volume_id"]),
            name=str(value["name"]),
            arguments=str(value["arguments"]),
            digest=str(value["digest"]),
            size_bytes=int(value["size_bytes"]),
            capacity_bytes=int(value["capacity_bytes"]),
            source=str(value["source"]),
            volume_context={str(key): str(text) for key, text in context.items()},
        )


class ProvisionedVolumes(Protocol):
    """Where they are kept. Blocking; any number of threads. Raises: ControlError when the store does not answer."""

    def get(self, volume_id: str) -> ProvisionedVolume | None:
        """The volume of that id."""

    def add(self, volume: ProvisionedVolume) -> ProvisionedVolume:
        """Durable when it returns. What is there already under its id stays, and is returned instead."""

    def remove(self, volume_id: str) -> None:
        """No such volume: nothing to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """What the controller needs of a PersistentVolumeClaim."""

    namespace: str
    name: str
    uid: str
    annotations: Mapping[str, str]


class Claims(Protocol):
    """Where PersistentVolumeClaims are looked up."""

    def get(self, namespace: str, name: str) -> Claim | None:
        """Blocking. Raises: ControlError when the API does not answer or refuses."""
