"""Access records: who could read which model from its registry, and when that was last seen.

A model in the node's cache is given only to callers who could pull it themselves. Whoever asks is checked with the
registry; the record of a success stands in for that while the registry is down, for as long as `life_s`. A refusal ends
the record. What cannot be read counts as no record.

A caller is known by a keyed hash of its credentials (never by the credentials), by its service account when kubelet has
vouched for it with a token, or as anonymous: a model that anybody may pull is anybody's.

Source: KEP-2535, image pull records; theirs do not expire, ours do.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from csi.oci.digest import Digest

log = logging.getLogger(__name__)

ANONYMOUS = "anonymous"
_MAX_CALLERS = 100
_KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class Model:
    """What is accessed: a digest at the place it comes from, within a trust domain."""

    domain: str
    origin: str
    digest: Digest


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. `credentials` are all of them as one text, empty for none; `service_account` is `namespace/name` when a
    token of it is among them, else empty.
    """

    credentials: str = field(repr=False)
    service_account: str = ""


class AccessRecords:
    """Files below `directory`, one per model. Use from one thread. `clock` in seconds since the epoch."""

    def __init__(self, directory: str, life_s: float, clock: Callable[[], float] = time.time) -> None:
        self._directory, self._life_s, self._clock = directory, life_s, clock
        os.makedirs(directory, mode=0o700, exist_ok=True)
        self._key = _key(os.path.join(directory, "key"))

    def age_s(self, model: Model, caller: Caller) -> float | None:
        """How long ago this caller, or an anonymous one, was seen to have access; None when never, or too long ago."""
        seen = self._load(model)
        now = self._clock()
        ages = [now - seen[name] for name in (*self._names(caller), ANONYMOUS) if name in seen]
        valid = [age for age in ages if 0 <= age <= self._life_s]
        return min(valid, default=None)

    def grant(self, model: Model, caller: Caller) -> None:
        """The registry has just let this caller read it. Best effort: without the record the registry is asked again."""
        now = self._clock()
        seen = {name: at for name, at in self._load(model).items() if 0 <= now - at <= self._life_s}
        seen |= dict.fromkeys(self._names(caller), now)
        newest = dict(sorted(seen.items(), key=lambda entry: entry[1])[-_MAX_CALLERS:])
        self._store(model, newest)

    def revoke(self, model: Model, caller: Caller) -> None:
        """The registry has just refused this caller."""
        seen = self._load(model)
        left = {name: at for name, at in seen.items() if name not in self._names(caller)}
        if left != seen:
            self._store(model, left)

    def _names(self, caller: Caller) -> tuple[str, ...]:
        if not caller.credentials:
            return (ANONYMOUS,)
        names = ["credentials:" + hmac.new(self._key, caller.credentials.encode(), hashlib.sha256).hexdigest()]
        if caller.service_account:
            names.append(f"serviceaccount:{caller.service_account}")
        return tuple(names)

    def _path(self, model: Model) -> str:
        text = json.dumps([model.domain, model.origin, str(model.digest)])
        return os.path.join(self._directory, hashlib.sha256(text.encode()).hexdigest() + ".json")

    def _load(self, model: Model) -> dict[str, float]:
        try:
            with open(self._path(model), encoding="utf-8") as file:
                seen = json.load(file)["seen"]
            return {str(name): float(at) for name, at in seen.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
            log.warning("access record of %s is unreadable and counts as none: %r", model.digest.short(), exc)
            return {}

    def _store(self, model: Model, seen: dict[str, float]) -> None:
        path = self._path(model)
        record = {"domain": model.domain, "origin": model.origin, "digest": str(model.digest), "seen": seen}
        try:
            with open(f"{path}.tmp", "w", encoding="utf-8") as file:
                json.dump(record, file)
            os.replace(f"{path}.tmp", path)
        except OSError as exc:
            log.warning("access record of %s cannot be kept: %s", model.digest.short(), exc)
            with contextlib.suppress(OSError):  # an old grant must not outlive a refusal
                os.unlink(path)


def _key(path: str) -> bytes:
    """This node's own, so that records say nothing about passwords elsewhere."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        key = file.read()
        if len(key) == _KEY_BYTES:
            return key
    key = secrets.token_bytes(_KEY_BYTES)
    fd = os.open(f"{path}.tmp", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(fd, "wb") as file:
        file.write(key)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)
    return key
