"""Adds the node's own registry logins to those a volume brings: here, because workers and fetchers may run no programs.

Order: what the volume's secret has, then kubelet's credential provider plugins, then the node's docker configuration
with its helpers. Whatever of the node fails is logged and left out: a public model needs none of it.
"""

from __future__ import annotations

import asyncio
import logging
import time

from csi.credentials import Credentials, united, within_limits
from csi.errors import ModelMountError
from csi.keychain import docker_config
from csi.keychain.plugins import CredentialPlugins
from csi.oci.reference import Reference

log = logging.getLogger(__name__)

# A republish comes every minute; running programs for each would be a nuisance. A guess, not measured.
_KEPT_S = 120.0
_MAX_KEPT = 4096


class NodeCredentials:
    """Use from one event loop; programs run in threads."""

    def __init__(self, registry_config: str | None, plugins: CredentialPlugins | None) -> None:
        """`registry_config`: docker's configuration file on this node."""
        self._registry_config, self._plugins = registry_config, plugins
        self._kept: dict[str, tuple[float, Credentials]] = {}

    async def after(self, brought: Credentials, reference: Reference) -> Credentials:
        """`brought`, then the node's for that repository. Never raises for what is wrong on the node."""
        if reference.is_layout or (self._registry_config is None and self._plugins is None):
            return brought
        until, own = self._kept.get(reference.origin, (0.0, ()))
        if time.monotonic() > until:
            own = await asyncio.to_thread(self._of_node, reference)
            if len(self._kept) >= _MAX_KEPT:
                self._kept.clear()
            self._kept[reference.origin] = (time.monotonic() + _KEPT_S, own)
        return within_limits(united(brought, own))

    def _of_node(self, reference: Reference) -> Credentials:
        found: Credentials = ()
        if self._plugins is not None:
            found = self._plugins.candidates(reference.registry, reference.repository)
        if self._registry_config is not None:
            try:
                written = docker_config.configured(self._registry_config, reference.registry, reference.repository)
            except ModelMountError as exc:
                log.warning("logins of this node for %s: %s", reference.registry, exc)
            else:
                found = united(found, written)
        return found
