"""Whether the processes this node stands on answer: asked in the background, so that Probe answers from memory.

Only the keeper counts for Probe: without it nothing can be mounted or unmounted here. A registry that is down, or a worker
that hangs, must not: a liveness probe would restart this process and help nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from csi.errors import ControlError, ModelMountError

_PERIOD_S = 5.0


class KeeperWatch:
    """`ping` blocks, and raises ControlError when nobody answers."""

    def __init__(self, ping: Callable[[], object]) -> None:
        self._ping = ping
        self._problem: ModelMountError | None = None

    @property
    def problem(self) -> ModelMountError | None:
        """What the last ping found wrong."""
        return self._problem

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await asyncio.to_thread(self._ping)
                self._problem = None
            except ControlError as exc:
                self._problem = exc
            await asyncio.sleep(_PERIOD_S)
