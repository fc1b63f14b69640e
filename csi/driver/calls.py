"""Whom it is told that a CSI call has ended: nobody, until metrics are wanted. Their library costs a process 4 MiB."""

from __future__ import annotations

from collections.abc import Callable

Observer = Callable[[str, str, float], None]
"""Gets the name of the call, that of its status, and seconds."""

_observers: list[Observer] = []


def tell(observer: Observer) -> None:
    """Of every call from now on."""
    _observers.append(observer)


def tell_no_more(observer: Observer) -> None:
    """What `tell` was given."""
    _observers.remove(observer)


def ended(rpc: str, code: str, seconds: float) -> None:
    """A call has."""
    for observer in _observers:
        observer(rpc, code, seconds)
