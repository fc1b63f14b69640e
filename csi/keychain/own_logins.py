"""The registry logins of a machine: kubelet's credential provider plugins, then docker's configuration file with its helpers.

What fails here is logged and left out: a public model needs none of it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from csi.credentials import Credentials, united
from csi.errors import ModelMountError
from csi.keychain import docker_config

if TYPE_CHECKING:
    from csi.keychain.plugins import CredentialPlugins

log = logging.getLogger(__name__)


class OwnLogins:
    """Blocking: programs are run. Thread-safe."""

    def __init__(self, registry_config: str | None, plugins: CredentialPlugins | None) -> None:
        """`registry_config`: docker's configuration file on this machine."""
        self._registry_config, self._plugins = registry_config, plugins

    def __bool__(self) -> bool:
        """Whether there may be any."""
        return self._registry_config is not None or self._plugins is not None

    def candidates(self, registry: str, repository: str) -> Credentials:
        """What fits the repository. Never raises for what is wrong on the machine."""
        found: Credentials = ()
        if self._plugins is not None:
            found = self._plugins.candidates(registry, repository)
        if self._registry_config is not None:
            try:
                written = docker_config.configured(self._registry_config, registry, repository)
            except ModelMountError as exc:
                log.warning("logins of this machine for %s: %s", registry, exc)
            else:
                found = united(found, written)
        return found


def own_logins(registry_config: str | None, provider_config: str | None, provider_bin_dir: str | None) -> OwnLogins:
    """From the paths that an administrator has set; the last two go together. Raises: InvalidVolumeError for a plugin
    configuration that cannot be used.
    """
    if not provider_config or not provider_bin_dir:
        return OwnLogins(registry_config, None)
    from csi.keychain.plugins import CredentialPlugins  # with YAML, which nothing else on a node reads

    return OwnLogins(registry_config, CredentialPlugins(provider_config, provider_bin_dir))
