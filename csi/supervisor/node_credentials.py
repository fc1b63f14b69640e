"""Adds the node's own registry logins to those a volume brings: here, because workers and fetchers may run no programs.

Order: what the volume's secret has, then kubelet's credential provider plugins, then the node's docker configuration
with its helpers.
"""

from __future__ import annotations

import asyncio
import time

from csi.credentials import Credentials, united, within_limits
from csi.keychain.own_logins import OwnLogins
from csi.oci.reference import Reference

_MAX_KEPT = 4096


class NodeCredentials:
    """Use from one event loop; programs run in threads."""

    def __init__(self, own: OwnLogins, kept_s: float) -> None:
        """`kept_s`: for how long what was found is used without looking again."""
        self._own, self._kept_s = own, kept_s
        self._kept: dict[str, tuple[float, Credentials]] = {}

    async def after(self, brought: Credentials, reference: Reference) -> Credentials:
        """`brought`, then the node's for that repository. Never raises for what is wrong on the node."""
        if reference.is_layout or not self._own:
            return brought
        until, own = self._kept.get(reference.origin, (0.0, ()))
        if time.monotonic() >= until:
            own = await asyncio.to_thread(self._own.candidates, reference.registry, reference.repository)
            if len(self._kept) >= _MAX_KEPT:
                self._kept.clear()
            self._kept[reference.origin] = (time.monotonic() + self._kept_s, own)
        return within_limits(united(brought, own))
