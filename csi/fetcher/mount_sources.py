"""Where the blobs of this process's mount come from: opened sources, which keep their connections while credentials change."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from csi import credentials, registry_hosts
from csi.control import wire
from csi.fetcher.answers import read_and_close
from csi.fetcher.origins import Origins
from csi.oci.reference import Reference
from csi.registry.address_rules import AddressRules
from csi.registry.client import RegistrySource
from csi.registry.sources import SourceSettings, open_source
from csi.registry_hosts import RegistryHost
from csi.stream.ports import ModelSource

_MAX_HOSTS_BYTES = 64 * 1024 * 1024
_MAX_SOURCES_BYTES = 16 * 1024 * 1024


class MountSources:
    """Changed by the main thread alone; `origins` is a value, which any thread may use as it finds it."""

    def __init__(self) -> None:
        self.origins = Origins()
        self._hosts: dict[str, tuple[RegistryHost, ...]] = {}

    def use_hosts(self, hosts_fd: int) -> None:
        """Which hosts serve which registry, for the sources opened from then on."""
        given = json.loads(read_and_close(hosts_fd, _MAX_HOSTS_BYTES, "registry hosts"))
        self._hosts |= {str(registry): registry_hosts.from_wire(hosts) for registry, hosts in given.items()}

    def open(self, reference: Reference, request: Mapping[str, Any], logins: Any, layout_fds: list[int]) -> ModelSource:
        """A source of its own, the caller's to close, by the address rules of `request`. Takes over `layout_fds`: the
        directory of a layout, else none.

        Raises: InvalidVolumeError, PolicyDeniedError.
        """
        rules = AddressRules(
            frozenset(request.get("plain_http_hosts", ())), frozenset(request.get("allowed_registries", ()))
        )
        settings = SourceSettings(
            rules=rules,
            credentials=credentials.from_wire(logins),
            hosts=self._hosts.get(reference.registry, ()),
            layout_fd=layout_fds[0] if layout_fds and reference.is_layout else None,
        )
        return open_source(reference, settings)

    def use(self, request: wire.Message, sources_fd: int, layout_fds: list[int]) -> list[ModelSource]:
        """Use what is listed there from now on. A registry that was in use keeps its connections, and gets its
        credentials. Returns the sources that are not used any more, for the caller to close once nobody asks them.

        Raises: ControlError, and as `open`.
        """
        before = {source.origin: source for source in self.origins.all()}
        own: list[ModelSource] = []
        parents: dict[str, ModelSource] = {}
        for wanted in json.loads(read_and_close(sources_fd, _MAX_SOURCES_BYTES, "sources")):
            reference = Reference.parse(wire.field(wanted, "reference", str))
            source = before.pop(reference.origin, None)
            if source is None:
                source = self.open(reference, request, wanted.get("credentials"), layout_fds)
            elif isinstance(source, RegistrySource):
                newer = credentials.from_wire(wanted.get("credentials"))
                if newer or not wanted.get("keep"):
                    source.replace_credentials(newer)
            if wanted.get("is_parent"):
                parents[source.origin] = source
            else:
                own.append(source)
        self.origins = Origins(own, parents)
        return list(before.values())
