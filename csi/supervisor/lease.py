"""Who has a mount, and whom its bytes may be fetched as because of that."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from csi.credentials import (
    NO_LOGINS,
    Credentials,
    Keyring,
    from_wire,
    keyring_from_wire,
    keyring_to_wire,
    to_wire,
    united,
    within_limits,
)
from csi.oci.digest import Digest
from csi.oci.reference import Reference
from csi.supervisor.parents import Parent, parent_sources

Source = dict[str, Any]
"""Where a fetcher fetches from, as it is told: `reference`, `credentials`, and `keep`: without any it goes on with those it
has for that registry.
"""


@dataclass(slots=True)
class Lease:
    """A target path that shows the mount. Credentials live in memory only, and are never logged."""

    volume_id: str
    reference: Reference
    credentials: Credentials | None = field(default=(), repr=False)
    """None: not known. A supervisor before us knew them, and the next republish brings them again."""
    service_account: str = ""
    parents: tuple[Parent, ...] = ()
    brought: Credentials = field(default=(), repr=False)
    keyring: Keyring = field(default=NO_LOGINS, repr=False)
    """What the volume itself brought, without the node's own logins."""
    refused: str | None = None
    """What the registry said when it was last asked whether these credentials may still read the model."""
    sealed: bool = False
    """The target was told that it may show plain files."""
    since: float = field(default_factory=time.monotonic)
    """CLOCK_MONOTONIC in seconds, 0 for one that a supervisor before us gave."""


@dataclass(frozen=True, slots=True)
class Logins:
    """What a lease has in memory only, for another supervisor's memory. `parents`: for each of the lease's parents."""

    credentials: Credentials = field(default=(), repr=False)
    brought: Credentials = field(default=(), repr=False)
    keyring: Keyring = field(default=NO_LOGINS, repr=False)
    parents: tuple[Credentials, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, lease: Lease) -> Logins | None:
        """None: not known here either."""
        if lease.credentials is None:
            return None
        return cls(
            lease.credentials, lease.brought, lease.keyring, tuple(parent.credentials for parent in lease.parents)
        )

    def give(self, lease: Lease) -> None:
        """Let the lease have them."""
        lease.credentials, lease.brought, lease.keyring = self.credentials, self.brought, self.keyring
        if len(self.parents) == len(lease.parents):
            lease.parents = tuple(
                replace(parent, credentials=known) for parent, known in zip(lease.parents, self.parents, strict=True)
            )

    def to_json(self) -> dict[str, Any]:
        """What `of_json` reads."""
        return {
            "credentials": to_wire(self.credentials),
            "brought": to_wire(self.brought),
            "keyring": keyring_to_wire(self.keyring),
            "parents": [to_wire(known) for known in self.parents],
        }

    @classmethod
    def of_json(cls, given: dict[str, Any]) -> Logins:
        """Raises: KeyError, TypeError, ControlError for what we have not written."""
        return cls(
            from_wire(given["credentials"]),
            from_wire(given["brought"]),
            keyring_from_wire(given["keyring"]),
            tuple(from_wire(known) for known in given["parents"]),
        )


def source(reference: Reference, credentials: Credentials) -> Source:
    """One place to fetch from."""
    return {"reference": str(reference), "credentials": to_wire(credentials), "keep": False}


def sources_of(leases: Iterable[Lease], model: Reference, digest: Digest) -> list[Source]:
    """One per origin that a volume names, with the credentials of the volumes that name it, the newest first: they go
    to no other. There is more than one only where the origin is no part of the mount's key. Then those of parents.
    """
    newest_first = list(reversed(list(leases)))
    by_origin: dict[str, list[Lease]] = {}
    for lease in newest_first:
        by_origin.setdefault(lease.reference.origin, []).append(lease)
    sources = []
    for same in by_origin.values():
        known = [lease.credentials for lease in same if lease.credentials is not None]
        one = source(same[0].reference.with_digest(digest), within_limits(united(*known)))
        sources.append(one | {"keep": len(known) < len(same)})
    keep = any(lease.credentials is None for lease in newest_first)
    parents = parent_sources(model, [lease.parents for lease in newest_first])
    return sources + [parent | {"keep": keep} for parent in parents]
