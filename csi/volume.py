"""What a volume asks for: its attributes, checked, and the key of the mount that serves it.

Attributes are written by anybody who may create a pod, so there is an allow-list of keys, and no key carries a
path, a flag or an address of this node.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

from csi.errors import InvalidVolumeError
from csi.oci import view
from csi.oci.digest import Digest
from csi.oci.reference import Reference
from csi.oci.view import WHOLE_MODEL, View

ATTRIBUTE_KEYS = ("reference", "verify", "prefetch", *view.KEYS)
REFERENCE_ALIASES = ("model.csi.modelpack.org/reference", "modelRef", "image")
"""Keys of other drivers that name the model, so that their published samples work by changing the driver's name."""

_KUBERNETES_PREFIXES = ("csi.storage.k8s.io/", "storage.kubernetes.io/")
SHARED_DOMAIN = "shared"
_NAMESPACE = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")  # RFC 1123 label

_Choice = TypeVar("_Choice", bound=StrEnum)


class Verify(StrEnum):
    """When bytes are checked against the digest; see docs/semantics.md."""

    CHUNK = "chunk"
    """Every block before it is read. Needs a block index."""
    WHOLE = "whole"
    """Every blob once it is complete; until then bytes are read on the word of the registry."""
    EAGER = "eager"
    """Every blob before the volume is there."""


class Prefetch(StrEnum):
    """What is fetched besides what readers ask for."""

    FULL = "full"
    ONDEMAND = "ondemand"
    """Nothing. Only with `verify: chunk`: the others check whole blobs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VolumeAttributes:
    """The checked attributes of one volume. `verify` None: `chunk` where the model has a block index, else `whole`."""

    reference: Reference
    verify: Verify | None = None
    prefetch: Prefetch = Prefetch.FULL
    view: View = WHOLE_MODEL


def parse_attributes(attributes: Mapping[str, str]) -> VolumeAttributes:
    """From a CSI volume_context (or a pod's volumeAttributes). What Kubernetes itself adds is ignored.

    Raises: InvalidVolumeError naming the key, with what it may be.
    """
    given = {key: value for key, value in attributes.items() if not key.startswith(_KUBERNETES_PREFIXES)}
    names = [key for key in ("reference", *REFERENCE_ALIASES) if key in given]
    if not names:
        raise InvalidVolumeError(
            "volumeAttributes: 'reference' is missing; set it to registry/repository@sha256:<hex> of the model",
            field="reference",
        )
    if len({given[name] for name in names}) > 1:
        raise InvalidVolumeError(
            f"volumeAttributes: {' and '.join(names)} name different models; keep one of them", field=names[1]
        )
    unknown = sorted(set(given) - set(ATTRIBUTE_KEYS) - set(REFERENCE_ALIASES))
    if unknown:
        raise InvalidVolumeError(
            f"volumeAttributes: unknown key {unknown[0]!r}; known keys are {', '.join(ATTRIBUTE_KEYS)}",
            field=unknown[0],
        )
    verify = _choice(Verify, given, "verify")
    prefetch = _choice(Prefetch, given, "prefetch") or Prefetch.FULL
    if prefetch is Prefetch.ONDEMAND:
        if verify not in (None, Verify.CHUNK):
            raise InvalidVolumeError(
                f"volumeAttributes: 'prefetch: ondemand' does not go with 'verify: {verify}', which checks whole blobs; "
                "use 'verify: chunk', or leave one of them out",
                field="prefetch",
            )
        verify = Verify.CHUNK
    return VolumeAttributes(
        reference=Reference.parse(given[names[0]]), verify=verify, prefetch=prefetch, view=View.parse(given)
    )


def _choice(kind: type[_Choice], given: Mapping[str, str], key: str) -> _Choice | None:
    try:
        return kind(given[key]) if key in given else None
    except ValueError:
        allowed = ", ".join(kind)
        raise InvalidVolumeError(
            f"volumeAttributes: {key} is {given[key][:80]!r}; this version knows: {allowed}", field=key
        ) from None


@dataclass(frozen=True, kw_only=True, slots=True)
class MountKey:
    """Volumes with equal keys share a superblock, hence its page cache; so nothing that makes a different promise
    may be left out of the key.

    With `verify: whole` bytes are served before the blob's digest is known to be right, on the word of the registry
    they come from. So the origin is part of the key then: nobody reads what another tenant's registry made up. With
    `chunk` it is None, and the same model from two repositories is one mount.

    `parents` are what `digest` leaves open: the models it builds on, `registry/repository@digest` each, the nearest first.
    """

    domain: str
    digest: Digest
    verify: Verify
    origin: str | None
    view: View = WHOLE_MODEL
    parents: tuple[str, ...] = ()

    @property
    def mount_id(self) -> str:
        """32 hexadecimal digits, the same on every node and in every version."""
        key: list[Any] = [1, self.domain, str(self.digest), self.verify, self.origin]
        if self.view:
            key.append(self.view.texts)
        if self.parents:
            key.append(self.parents)
        return hashlib.sha256(json.dumps(key, separators=(",", ":")).encode()).hexdigest()[:32]


class Sharing(StrEnum):
    """Who shares a node's cache and mounts: everybody who may pull the model, or the pods of one namespace."""

    SHARED = "shared"
    ISOLATED = "isolated"


def isolated_domain(namespace: str) -> str:
    """The trust domain of one Kubernetes namespace. Raises: InvalidVolumeError for what is no namespace's name."""
    if not _NAMESPACE.fullmatch(namespace):
        raise InvalidVolumeError(
            "this node keeps namespaces apart (--sharing=isolated), and the call does not say which one the pod is in; "
            "the CSIDriver object needs podInfoOnMount: true",
            field="volume_context",
        )
    return f"namespace-{namespace}"


def mount_key(
    reference: Reference,
    digest: Digest,
    verify: Verify,
    view: View = WHOLE_MODEL,
    domain: str = SHARED_DOMAIN,
    parents: tuple[str, ...] = (),
) -> MountKey:
    """The key of the mount that serves that view of `digest` from there. A layout directory stays part of it: what lies there is for
    the volumes that may name it. So does the origin with `eager`, where nothing shows that a second registry has the
    model too (see `csi.fetcher.possession`).
    """
    shared = verify is Verify.CHUNK and not reference.is_layout
    origin = None if shared else reference.origin
    return MountKey(domain=domain, digest=digest, verify=verify, origin=origin, view=view, parents=parents)
