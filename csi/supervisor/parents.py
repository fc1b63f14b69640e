"""The models that a model builds on (a KitOps kit on other kits): found before there is a mount, pinned with it, and fetched as
whoever may read *them*.

A parent lies where the author of the kit says, so nobody's credentials go there but those that are meant for that registry.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from csi.credentials import Credentials, to_wire, united, within_limits
from csi.errors import ModelMountError
from csi.oci.digest import Digest
from csi.oci.formats import kitops
from csi.oci.reference import Reference
from csi.supervisor.build import SentManifest


@dataclass(frozen=True, slots=True)
class Parent:
    """`reference` has its digest. `credentials` are candidates for that repository."""

    reference: Reference
    credentials: Credentials = field(default=(), repr=False)

    @property
    def place(self) -> str:
        """What it adds to the mount's key."""
        return f"{self.reference.origin}@{self.reference.digest}"


class Resolved(Protocol):
    """What a registry answered; see `csi.supervisor.mount.Resolved`."""

    @property
    def manifest_fd(self) -> int: ...

    @property
    def media_type(self) -> str: ...

    @property
    def digest(self) -> Digest: ...

    @property
    def parent(self) -> str | None: ...


@dataclass(frozen=True, slots=True)
class FoundParents:
    """The nearest first, each with its manifest. `close` it."""

    parents: tuple[Parent, ...] = ()
    manifests: tuple[SentManifest, ...] = ()

    def places(self) -> tuple[str, ...]:
        """What they add to the mount's key."""
        return tuple(parent.place for parent in self.parents)

    def close(self) -> None:
        """Close the manifests."""
        for manifest in self.manifests:
            os.close(manifest.fd)


NO_PARENTS = FoundParents()


async def find_parents(
    model: Reference,
    first: str | None,
    pinned: Sequence[Reference],
    logins: Callable[[Reference], Awaitable[Credentials]],
    ask: Callable[[Reference, Credentials], Awaitable[Resolved]],
) -> FoundParents:
    """Everything that `model` builds on; `first` is what its own Kitfile says. `pinned`: what was found when its volume was
    published first, which decides over tags.

    Raises: UnsupportedModelError for a circle and for too many; what the registry of a parent answers, naming both.
    """
    parents: list[Parent] = []
    manifests: list[SentManifest] = []
    chain, text = [str(model)], first
    try:
        while text is not None:
            chain.append(text)
            kitops.check_chain(chain)
            reference = Reference.parse(text)
            if len(parents) < len(pinned) and pinned[len(parents)].origin == reference.origin:
                digest = pinned[len(parents)].digest
                reference = reference.with_digest(digest) if digest is not None else reference
            credentials = await logins(reference)
            try:
                found = await ask(reference, credentials)
            except ModelMountError as exc:
                raise type(exc)(f"{model} builds on the kit {text}: {exc.message}", **exc.fields) from exc
            manifests.append(SentManifest(found.manifest_fd, found.media_type))
            parents.append(Parent(reference.with_digest(found.digest), credentials))
            text = found.parent
    except BaseException:
        FoundParents((), tuple(manifests)).close()
        raise
    return FoundParents(tuple(parents), tuple(manifests))


def parent_sources(model: Reference, several: Iterable[Sequence[Parent]]) -> list[dict[str, Any]]:
    """For the fetcher: one source for every origin, in the order of the chain, with everybody's credentials for it; `several`
    are the parents as each volume may read them. What lies in the model's own repository is no source of its own.
    """
    references: dict[str, Reference] = {}
    candidates: dict[str, Credentials] = {}
    for parents in several:
        for parent in parents:
            origin = parent.reference.origin
            if origin != model.origin:
                references.setdefault(origin, parent.reference)
                candidates[origin] = united(candidates.get(origin, ()), parent.credentials)
    return [
        {
            "reference": str(reference),
            "credentials": to_wire(within_limits(candidates[origin])),
            "is_parent": True,
        }
        for origin, reference in references.items()
    ]
