"""Tells pods' owners, as Kubernetes events, what happens to their volumes: how far a pull is, that it is verified, why a
publish was refused, what degrades a volume and that it has healed.

Said on change, and a pull's progress at most twice a minute; never more than `_MOST_PER_ROUND` events in one round of all
volumes. An event that cannot be posted is lost, and nothing else is.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from csi.control.supervisor import cached_bytes, is_verified
from csi.driver.health import troubles_of
from csi.driver.publisher import Publisher
from csi.driver.records import Publication
from csi.errors import ControlError, ModelMountError
from csi.pods import Events, Pod
from csi.redact import scrub

log = logging.getLogger(__name__)

_PERIOD_S = 5.0
_PROGRESS_EVERY_S = 30.0
_REFUSAL_EVERY_S = 300.0
_MOST_PER_ROUND = 20
_MOST_REFUSALS = 1000


@dataclass(frozen=True, slots=True)
class Announcement:
    """One event."""

    warning: bool
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Told:
    """What has been said of a volume, and what a pull's rate is measured from."""

    verified: bool = False
    troubles: frozenset[str] = field(default_factory=frozenset)
    progress_at: float | None = None
    done_bytes: int = 0


def announce(
    told: Told, mount: Mapping[str, Any] | None, target_path: str, now: float
) -> tuple[list[Announcement], Told]:
    """What to say of a volume now, and what has been said then. `now` in seconds of a monotonic clock."""
    said: list[Announcement] = []
    troubles = {trouble.reason: trouble for trouble in troubles_of(mount, target_path)}
    for reason, trouble in troubles.items():
        if reason not in told.troubles:
            said.append(Announcement(True, "ModelDegraded", f"{reason}: {trouble.message}"))
    if healed := sorted(told.troubles - set(troubles)):
        said.append(Announcement(False, "ModelHealed", f"{', '.join(healed)} is over"))
    told = replace(told, troubles=frozenset(troubles))
    if mount is None or told.verified:
        return said, told
    done, total = cached_bytes(mount)
    name = str(mount.get("reference", "the model"))
    if is_verified(mount):
        if told.progress_at is not None:  # a pull that was over at once needs no two events
            said.append(Announcement(False, "ModelVerified", f"{name}: {total / 1e6:,.1f} MB are here and verified"))
        return said, replace(told, verified=True)
    if told.progress_at is None:
        return said, replace(told, progress_at=now, done_bytes=done)
    if now - told.progress_at >= _PROGRESS_EVERY_S:
        rate = max(0.0, (done - told.done_bytes) / (now - told.progress_at))
        said.append(Announcement(False, "ModelPulling", f"{name}: {progress_text(done, total, rate)}"))
        told = replace(told, progress_at=now, done_bytes=done)
    return said, told


def progress_text(done: int, total: int, bytes_per_s: float) -> str:
    """Percent, sizes, rate, time left."""
    percent = 100 * done / total if total else 100.0
    text = f"{percent:.0f} % ({done / 1e6:,.1f} of {total / 1e6:,.1f} MB), {bytes_per_s / 1e6:,.1f} MB/s"
    return f"{text}, {(total - done) / bytes_per_s:,.0f} s left" if bytes_per_s > 0 else text


class Announcer:
    """Use from one event loop."""

    def __init__(self, events: Events, publisher: Publisher, clock: Callable[[], float] = time.monotonic) -> None:
        self._events, self._publisher, self._clock = events, publisher, clock
        self._told: dict[str, Told] = {}
        self._refused: dict[tuple[Pod, str], float] = {}

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(_PERIOD_S)
            await self.round()

    async def round(self) -> None:
        """Look at every volume once."""
        volumes = [publication for publication in self._publisher.all() if publication.pod is not None]
        self._told = {one.target_path: self._told.get(one.target_path, Told()) for one in volumes}
        if not volumes:
            return
        try:
            mounts = await self._publisher.mounts()
        except ControlError as exc:
            log.info("no events now: %s", exc)
            return
        left = _MOST_PER_ROUND
        for publication in volumes:
            said, told = announce(
                self._told[publication.target_path], _shown(mounts, publication), publication.target_path, self._clock()
            )
            if len(said) > left:
                return
            left -= len(said)
            self._told[publication.target_path] = told
            assert publication.pod is not None
            for announcement in said:
                await self._post(publication.pod, announcement)

    async def refused(self, pod: Pod | None, error: ModelMountError) -> None:
        """A publish failed for good; the same reason is said again after five minutes at the earliest."""
        if pod is None or error.retryable:
            return
        key, now = (pod, str(error)), self._clock()
        if now - self._refused.get(key, -_REFUSAL_EVERY_S) < _REFUSAL_EVERY_S:
            return
        self._refused = {one: at for one, at in self._refused.items() if now - at < _REFUSAL_EVERY_S}
        if len(self._refused) < _MOST_REFUSALS:
            self._refused[key] = now
            await self._post(pod, Announcement(True, "ModelRefused", f"{type(error).__name__}: {error}"))

    async def _post(self, pod: Pod, said: Announcement) -> None:
        try:
            await asyncio.to_thread(
                self._events.post, pod, warning=said.warning, reason=said.reason, message=scrub(said.message)
            )
        except ControlError as exc:
            log.info("event lost: %s", exc)


def _shown(mounts: list[dict[str, Any]], publication: Publication) -> dict[str, Any] | None:
    return next((mount for mount in mounts if publication.target_path in mount["targets"]), None)
