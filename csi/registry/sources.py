"""The `ModelSource` of a reference."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from csi.credentials import Credentials
from csi.errors import InvalidVolumeError
from csi.oci.reference import Reference
from csi.registry.address_rules import AddressRules
from csi.registry.auth import Authenticator
from csi.registry.client import RegistrySource, base_url
from csi.registry.layout_source import LayoutSource
from csi.registry.transport import Transport, TransportSettings
from csi.stream.ports import ModelSource


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSettings:
    """`layout_fd`: the opened directory of an `oci-layout:` reference; the source takes it over."""

    rules: AddressRules
    credentials: Credentials = ()
    layout_fd: int | None = None
    transport: TransportSettings = field(default_factory=TransportSettings)


def open_source(reference: Reference, settings: SourceSettings) -> ModelSource:
    """No I/O yet. Raises: InvalidVolumeError for a layout without its directory."""
    if reference.is_layout:
        if settings.layout_fd is None:
            raise InvalidVolumeError(f"{reference}: its directory was not opened", field="reference")
        return LayoutSource(settings.layout_fd, reference.layout_dir)
    if settings.layout_fd is not None:
        os.close(settings.layout_fd)
    transport = Transport(settings.rules, settings.transport)
    base = base_url(reference.registry, settings.rules)
    authenticator = Authenticator(base, reference.repository, settings.credentials, transport)
    return RegistrySource(reference, settings.rules, authenticator, transport)
