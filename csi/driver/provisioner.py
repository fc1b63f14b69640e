"""Provisioning, without gRPC: a name becomes a volume that stands for one digest for ever.

Nothing is stored per volume but its record: the bytes stay in the registry and in the nodes' caches.

Who names the model: the StorageClass (`reference`), or else the PersistentVolumeClaim by an annotation, which is read
through the Kubernetes API. Whoever writes a claim is not whoever wrote the class, so a claim names models only below
the class's `allowedRepositories`, and is believed only when its UID is the one in the volume's name `pvc-<uid>`.

Source: CSI 1.13 spec, "CreateVolume"; external-provisioner's `--extra-create-metadata`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from csi.credentials import Credentials, Keyring
from csi.driver.credentials import candidates
from csi.driver.locks import NamedLocks
from csi.errors import (
    InvalidVolumeError,
    PolicyDeniedError,
    VolumeConflictError,
    VolumeNotFoundError,
    VolumeTooSmallError,
)
from csi.oci.digest import Digest
from csi.oci.reference import Reference
from csi.provisioned import Claim, Claims, ProvisionedVolume, ProvisionedVolumes
from csi.volume import ATTRIBUTE_KEYS, REFERENCE_ALIASES, parse_attributes

log = logging.getLogger(__name__)

REFERENCE_ANNOTATION = "csi.modelmount.dev/reference"
ALLOWED_REPOSITORIES = "allowedRepositories"
PARAMETER_KEYS = (*ATTRIBUTE_KEYS, ALLOWED_REPOSITORIES)

_CLAIM_NAME, _CLAIM_NAMESPACE = "csi.storage.k8s.io/pvc/name", "csi.storage.k8s.io/pvc/namespace"
_KUBERNETES_PREFIX = "csi.storage.k8s.io/"
_PROVISIONED_NAME = re.compile(r"pvc-([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})")
_PATTERN = re.compile(r"[a-z0-9.:\[\]-]+(?:/[a-z0-9._-]+)*(?:/\*)?")
_MAX_CONTEXT_BYTES = 4096  # CSI spec, "Size Limits"

Resolve = Callable[[Reference, str, Credentials], tuple[Digest, int]]
"""Digest and bytes of a reference, of that variant if it is an index, asked of its registry; blocking."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CreateRequest:
    """`required_bytes` and `limit_bytes`: 0 for none. `capabilities`: fingerprints, see `capabilities.described`."""

    name: str
    parameters: Mapping[str, str]
    capabilities: list[list[object]]
    required_bytes: int = 0
    limit_bytes: int = 0
    keyring: Keyring = field(default_factory=Keyring)

    @property
    def arguments(self) -> str:
        """Everything a repeat must repeat; not the metadata external-provisioner adds."""
        own = {key: text for key, text in self.parameters.items() if not key.startswith(_KUBERNETES_PREFIX)}
        described = [1, own, sorted(self.capabilities, key=json.dumps), self.required_bytes, self.limit_bytes]
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


class Provisioner:
    """Use from one event loop; registry, store and Kubernetes API are called in threads."""

    def __init__(self, volumes: ProvisionedVolumes, claims: Claims | None, resolve: Resolve) -> None:
        """`claims` None: outside Kubernetes, where only StorageClass parameters name models."""
        self._volumes, self._claims, self._resolve = volumes, claims, resolve
        self._locks = NamedLocks("volume")

    async def create(self, request: CreateRequest) -> ProvisionedVolume:
        """The volume of that name, made or found. A tag is resolved the first time only.

        Raises: InvalidVolumeError, VolumeConflictError, PolicyDeniedError, VolumeTooSmallError, OperationPendingError,
        and what the registry or the Kubernetes API answered.
        """
        check_name(request.name)
        check_parameters(request.parameters)
        volume_id = volume_id_of(request.name)
        async with self._locks.held(volume_id):
            found = await asyncio.to_thread(self._volumes.get, volume_id)
            if found is None:
                found = await asyncio.to_thread(self._volumes.add, await self._make(volume_id, request))
                log.info("volume %s (%s) stands for %s", volume_id, request.name, found.digest)
        if found.name != request.name or found.arguments != request.arguments:
            raise VolumeConflictError(
                f"volume {request.name}: exists already with other parameters, capabilities or size (it stands for "
                f"{found.digest}); use another name, or delete it first",
                volume_id=volume_id,
            )
        return found

    async def delete(self, volume_id: str) -> None:
        """Forget a volume. Unknown: nothing to do. Pods that have it mounted keep it."""
        if _is_ours(volume_id):
            async with self._locks.held(volume_id):
                await asyncio.to_thread(self._volumes.remove, volume_id)

    async def find(self, volume_id: str) -> ProvisionedVolume:
        """Raises: VolumeNotFoundError."""
        found = await asyncio.to_thread(self._volumes.get, volume_id) if _is_ours(volume_id) else None
        if found is None:
            raise VolumeNotFoundError(f"volume {volume_id}: not known to this controller", volume_id=volume_id)
        return found

    async def _make(self, volume_id: str, request: CreateRequest) -> ProvisionedVolume:
        parameters = {key: text for key, text in request.parameters.items() if not key.startswith(_KUBERNETES_PREFIX)}
        allowed = parse_allowed(parameters.pop(ALLOWED_REPOSITORIES, ""))
        source = "StorageClass"
        if not any(key in parameters for key in ("reference", *REFERENCE_ALIASES)):
            claim = await self._claim(request)
            if not allowed:
                raise InvalidVolumeError(
                    f"StorageClass parameters: {ALLOWED_REPOSITORIES} is missing; a class whose claims name the model says "
                    "which repositories they may name, such as registry.example.com/models/*",
                    field=ALLOWED_REPOSITORIES,
                )
            parameters["reference"] = reference_of(claim)
            source = f"PersistentVolumeClaim {claim.namespace}/{claim.name}"
        attributes = parse_attributes(parameters)
        reference = attributes.reference
        if reference.is_layout:
            raise InvalidVolumeError(
                f"reference {str(reference)!r}: a directory of one node cannot be provisioned; name a registry",
                field="reference",
            )
        if allowed and not is_allowed(reference, allowed):
            raise PolicyDeniedError(
                f"reference {str(reference)!r}: {ALLOWED_REPOSITORIES} of the StorageClass does not list "
                f"{reference.origin}; it lists {', '.join(allowed)}",
                rule=ALLOWED_REPOSITORIES,
                reason="repository is not listed",
            )
        digest, size_bytes = await asyncio.to_thread(
            self._resolve, reference, attributes.view.variant, candidates(request.keyring, reference)
        )
        if request.limit_bytes and size_bytes > request.limit_bytes:
            raise VolumeTooSmallError(
                f"reference {str(reference)!r}: the model has {size_bytes} bytes, the volume's limit is "
                f"{request.limit_bytes}; ask for more",
                limit_bytes=request.limit_bytes,
                size_bytes=size_bytes,
            )
        context = {key: text for key, text in parameters.items() if key not in REFERENCE_ALIASES}
        context["reference"] = str(reference.with_digest(digest))
        if sum(len(key.encode()) + len(text.encode()) for key, text in context.items()) > _MAX_CONTEXT_BYTES:
            raise InvalidVolumeError(
                f"StorageClass parameters: together they have more than the {_MAX_CONTEXT_BYTES} bytes CSI allows a volume",
                field="parameters",
            )
        return ProvisionedVolume(
            volume_id=volume_id,
            name=request.name,
            arguments=request.arguments,
            digest=str(digest),
            size_bytes=size_bytes,
            capacity_bytes=max(request.required_bytes, size_bytes),
            source=source,
            volume_context=context,
        )

    async def _claim(self, request: CreateRequest) -> Claim:
        """The claim this volume is made for, believed only when the volume's name proves it."""
        missing = "StorageClass parameters: 'reference' is missing"
        if self._claims is None:
            raise InvalidVolumeError(
                f"{missing}; outside Kubernetes nothing else can name the model", field="reference"
            )
        namespace, name = request.parameters.get(_CLAIM_NAMESPACE), request.parameters.get(_CLAIM_NAME)
        if not namespace or not name:
            raise InvalidVolumeError(
                f"{missing}, and the PersistentVolumeClaim that could name the model in its annotation "
                f"{REFERENCE_ANNOTATION} is not known; run external-provisioner with --extra-create-metadata",
                field="reference",
            )
        named = _PROVISIONED_NAME.fullmatch(request.name)
        if named is None:
            raise InvalidVolumeError(
                f"volume {request.name}: expected the name pvc-<uid of the PersistentVolumeClaim>, which proves whose "
                "annotation to read; run external-provisioner without --volume-name-prefix and --volume-name-uuid-length",
                field="name",
            )
        claim = await asyncio.to_thread(self._claims.get, namespace, name)
        if claim is None or claim.uid != named[1]:
            raise VolumeNotFoundError(
                f"volume {request.name}: PersistentVolumeClaim {namespace}/{name} "
                f"{'does not exist' if claim is None else f'has the UID {claim.uid}'}; the claim this volume was asked for "
                "is gone",
                volume_id=request.name,
            )
        return claim


def check_name(name: str) -> None:
    """Raises: InvalidVolumeError. Source: CSI spec, CreateVolumeRequest.name."""
    if not name:
        raise InvalidVolumeError("name is missing", field="name")
    if len(name.encode()) > 128 or any(unicodedata.category(character) == "Cc" for character in name):
        raise InvalidVolumeError("name has more than 128 bytes, or control characters", field="name")


def check_parameters(parameters: Mapping[str, str]) -> None:
    """Raises: InvalidVolumeError naming the key that is not known."""
    known = {*PARAMETER_KEYS, *REFERENCE_ALIASES}
    unknown = sorted(key for key in parameters if key not in known and not key.startswith(_KUBERNETES_PREFIX))
    if unknown:
        raise InvalidVolumeError(
            f"StorageClass parameters: unknown key {unknown[0][:80]!r}; known keys are {', '.join(PARAMETER_KEYS)}",
            field=unknown[0][:80],
        )


def volume_id_of(name: str) -> str:
    """The same for the same name, whoever asks; fit for an object's name; says nothing of the model, so that two volumes
    of one model in one pod never have one handle.
    """
    return f"mv-{hashlib.sha256(name.encode()).hexdigest()[:40]}"


def _is_ours(volume_id: str) -> bool:
    return re.fullmatch(r"mv-[0-9a-f]{40}", volume_id) is not None


def reference_of(claim: Claim) -> str:
    """Raises: InvalidVolumeError when the claim names no model, or two."""
    keys = [key for key in (REFERENCE_ANNOTATION, *REFERENCE_ALIASES) if key in claim.annotations]
    if not keys:
        raise InvalidVolumeError(
            f"PersistentVolumeClaim {claim.namespace}/{claim.name}: annotation {REFERENCE_ANNOTATION} is missing; set it "
            "to registry/repository@sha256:<hex> of the model, or name the model in the StorageClass",
            field="reference",
        )
    if len({claim.annotations[key] for key in keys}) > 1:
        raise InvalidVolumeError(
            f"PersistentVolumeClaim {claim.namespace}/{claim.name}: annotations {' and '.join(keys)} name different "
            "models; keep one of them",
            field=keys[1],
        )
    return claim.annotations[keys[0]]


def parse_allowed(text: str) -> list[str]:
    """Patterns between commas or blanks: a repository, or `registry/path/*` for everything below. Empty: none given.

    Raises: InvalidVolumeError for a pattern that could mean more than it says.
    """
    patterns = [part for part in re.split(r"[,\s]+", text) if part]
    for pattern in patterns:
        if not _PATTERN.fullmatch(pattern) or ".." in pattern:
            raise InvalidVolumeError(
                f"StorageClass parameters: {ALLOWED_REPOSITORIES}: {pattern[:200]!r} is neither registry/repository nor "
                "registry/path/* (the star stands only at the end, behind a slash)",
                field=ALLOWED_REPOSITORIES,
            )
    if text and not patterns:
        raise InvalidVolumeError(
            f"StorageClass parameters: {ALLOWED_REPOSITORIES} lists nothing", field=ALLOWED_REPOSITORIES
        )
    return patterns


def is_allowed(reference: Reference, allowed: list[str]) -> bool:
    """Whether one of the patterns lists the repository."""
    return any(
        reference.origin.startswith(pattern.removesuffix("*"))
        if pattern.endswith("/*")
        else reference.origin == pattern
        for pattern in allowed
    )
