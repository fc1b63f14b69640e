"""What a fetcher is asked before it serves a mount, or beside it: what does a reference name, for these credentials?"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from csi.control import wire
from csi.credentials import Credentials, to_wire
from csi.errors import MountError
from csi.oci.digest import Digest
from csi.oci.reference import Reference
from csi.registry_hosts import to_wire as hosts_to_wire
from csi.supervisor.child import Child
from csi.supervisor.hosts import read_hosts
from csi.supervisor.manifests import MAX_BYTES, KeptManifest
from csi.supervisor.settings import SupervisorSettings

_KNOWN_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a reference names now. `manifest_fd` is a sealed memfd, the holder's to close. `indexed`: there is a block index
    that this node trusts. `index_ignored`: why one that there is besides is not used. `parent`: the reference of the model that
    it builds on.
    """

    manifest_fd: int
    media_type: str
    digest: Digest
    indexed: bool
    index_ignored: str = ""
    parent: str | None = None


async def send_hosts(fetcher: Child, references: Sequence[Reference], settings: SupervisorSettings) -> None:
    """Tell a fetcher which hosts serve these registries, as this node's files say now. Raises: InvalidVolumeError."""
    if settings.registry_config_dir is None:
        return
    registries = sorted({reference.registry for reference in references if not reference.is_layout})
    hosts = {name: hosts_to_wire(read_hosts(settings.registry_config_dir, name)) for name in registries}
    hosts_fd = wire.memfd("hosts", json.dumps(hosts).encode())
    try:
        await fetcher.call("hosts", 5.0, [hosts_fd])
    finally:
        os.close(hosts_fd)


async def resolve(
    fetcher: Child,
    reference: Reference,
    credentials: Credentials,
    settings: SupervisorSettings,
    *,
    variant: str = "",
    prove: bool = False,
) -> Resolved:
    """What `reference` names now; `variant` is which manifest is meant if that is an index. `prove`: the fetcher serves that
    model already, and checks that this registry has its blobs too.

    Raises: what the registry answered, as our errors.
    """
    layout_fds: list[int] = []
    if reference.is_layout:
        try:
            layout_fds = [os.open(reference.layout_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)]
        except OSError as exc:
            raise MountError(f"{reference}: {exc.strerror}; is it an OCI image-layout directory?") from exc
    try:
        await send_hosts(fetcher, [reference], settings)
        fields, fds = await fetcher.call(
            "resolve",
            settings.resolve_timeout_s + 5.0,
            layout_fds,
            reference=str(reference),
            credentials=to_wire(credentials),
            **settings.address_rules,
            registry_timeout_s=settings.resolve_timeout_s,
            variant=variant,
            prove=prove,
        )
    finally:
        wire.close_all(layout_fds)
    return _resolved(fields, fds)


async def resolve_known(fetcher: Child, manifest: KeptManifest, origin: str) -> Resolved:
    """The same for a manifest that is on this node: no registry is asked. Raises: ControlError."""
    manifest_fd = wire.memfd("manifest", manifest.data)
    try:
        fields, fds = await fetcher.call(
            "known",
            _KNOWN_TIMEOUT_S,
            [manifest_fd],
            origin=origin,
            digest=str(manifest.digest),
            media_type=manifest.media_type,
            indexed=manifest.indexed,
        )
    finally:
        os.close(manifest_fd)
    return replace(_resolved(fields, fds), parent=manifest.parent)


def kept_of(model: Resolved) -> KeptManifest:
    """What of it to keep."""
    data = wire.read_all(model.manifest_fd, MAX_BYTES, "manifest")
    return KeptManifest(model.digest, model.media_type, data, model.indexed, model.parent)


def _resolved(fields: dict[str, Any], fds: list[int]) -> Resolved:
    return Resolved(
        wire.exactly(fds, 1)[0],
        wire.field(fields, "media_type", str),
        Digest.parse(wire.field(fields, "digest", str)),
        wire.field(fields, "indexed", bool),
        str(fields.get("index_ignored", "")),
        wire.field(fields, "parent", str) if fields.get("parent") is not None else None,
    )
