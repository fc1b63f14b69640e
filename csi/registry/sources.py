"""The `ModelSource` of a reference."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace

from csi.credentials import Credentials
from csi.errors import InvalidVolumeError
from csi.oci.reference import Reference
from csi.registry.address_rules import AddressRules
from csi.registry.auth import Authenticator
from csi.registry.client import RegistrySource
from csi.registry.endpoint import Endpoint
from csi.registry.layout_source import LayoutSource
from csi.registry.transport import TlsSettings, Transport, TransportSettings
from csi.registry_hosts import RegistryHost, own_host
from csi.stream.ports import ModelSource


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSettings:
    """`layout_fd`: the opened directory of an `oci-layout:` reference; the source takes it over. `hosts`: who serves the
    registry, in order; empty for the registry itself.
    """

    rules: AddressRules
    credentials: Credentials = ()
    hosts: tuple[RegistryHost, ...] = ()
    layout_fd: int | None = None
    transport: TransportSettings = field(default_factory=TransportSettings)


def open_source(reference: Reference, settings: SourceSettings) -> ModelSource:
    """No I/O yet. Raises: InvalidVolumeError for a layout without its directory, PolicyDeniedError for a registry that may not
    be named.
    """
    if reference.is_layout:
        if settings.layout_fd is None:
            raise InvalidVolumeError(f"{reference}: its directory was not opened", field="reference")
        return LayoutSource(settings.layout_fd, reference.layout_dir)
    if settings.layout_fd is not None:
        os.close(settings.layout_fd)
    settings.rules.check_registry(reference.registry)
    hosts = settings.hosts or (own_host(reference.registry),)
    return RegistrySource(reference, [_endpoint(host, reference, settings) for host in hosts])


def _endpoint(host: RegistryHost, reference: Reference, settings: SourceSettings) -> Endpoint:
    """A host that an administrator wrote down with `http://` is allowed plain HTTP and loopback by that."""
    rules = settings.rules
    if not host.scheme:
        host = replace(host, scheme=rules.scheme_for(reference.registry))
    elif host.is_mirror or host.scheme == "http":
        rules = replace(rules, plain_http_hosts=rules.plain_http_hosts | {host.authority})
    base = settings.transport
    transport = Transport(
        rules,
        replace(
            base,
            connect_timeout_s=host.dial_timeout_s or base.connect_timeout_s,
            tls=TlsSettings(host.authority, host.ca, host.client, host.skip_verify),
        ),
    )
    credentials = settings.credentials if host.gets_credentials else ()
    authenticator = Authenticator(f"{host.scheme}://{host.authority}", reference.repository, credentials, transport)
    return Endpoint(host, reference.registry, reference.repository, rules, authenticator, transport)
