"""What both halves of a mount have: a child that serves it, and somebody who watches the child."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod

from csi.supervisor.child import Child
from csi.supervisor.restarts import Restarts

_SOON_S = 1.0
"""A child that lived longer did not die of its start."""
_FIRST_DELAY_S = 0.2


class Half(ABC):
    """`Serving` or `Fetching`. `_watch` replaces the child when it dies; `_close` lets go of the half's descriptors.
    `longest_delay_s`: between two starts where one child after the other dies of it.
    """

    def __init__(self, longest_delay_s: float) -> None:
        self._watcher: asyncio.Task[None] | None = None
        self._changing = asyncio.Lock()
        self._stopping = False
        self._restarts = Restarts(soon_s=_SOON_S, first_s=_FIRST_DELAY_S, longest_s=longest_delay_s)
        self._child: Child | None = None
        self.pid: int | None = None
        """Of the one that serves, or served last."""

    @property
    def child(self) -> Child | None:
        """The one that serves; None while it is being replaced."""
        return self._child

    @child.setter
    def child(self, child: Child | None) -> None:
        self._child = child
        if child is not None:
            self.pid = child.pid

    def watch(self) -> None:
        """From now on there is a child: another one when it dies."""
        self._watcher = asyncio.create_task(self._watch())

    def pause(self) -> None:
        """Do nothing for now: another supervisor takes over. The child serves on."""
        self._end_watch()
        if self.child is not None:
            self.child.pause()

    def resume(self) -> None:
        """It did not."""
        if self.child is not None:
            self.child.listen()
        self.watch()

    def let_go(self) -> None:
        """It has taken over."""
        if self.child is not None:
            self.child.let_go()
        self._close()

    def _end_watch(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()

    @abstractmethod
    async def _watch(self) -> None: ...

    @abstractmethod
    def _close(self) -> None: ...
