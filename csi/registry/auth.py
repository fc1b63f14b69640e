"""Who asks: for each request what to send, and after a refusal what to send next.

Nothing is sent until the registry asks for something, as a password must not go where it is not wanted. Then the
candidates are tried in turn, beginning with the one that worked last; each with Basic or with a token of its own, as
the registry wants. A token that is refused is renewed once before its credential counts as refused.

    token     of one repository, kept in memory; four fifths through its time one thread fetches the next while the
              others go on with the one that is still good; however many threads want one, it is fetched once
    replace   other credentials from now on; nothing of the former ones is kept

No lock is held while a token service is asked.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from csi.credentials import Credential, Credentials
from csi.errors import RegistryAuthError, RegistryUnavailableError
from csi.registry.headers import Challenge
from csi.registry.token_service import basic, exchange, exchange_subject
from csi.registry.transport import Transport

_USED_SHARE = 0.8
_MAX_TOKENS = 64  # a registry that names another scope each time must not fill memory
_PREFERRED = ("bearer", "basic")


@dataclass(frozen=True, slots=True)
class Authorization:
    """What one request carries. `header` None: nothing."""

    header: str | None = field(repr=False)
    generation: int
    candidate: int
    tried: frozenset[int]
    """Candidates that were refused during this request."""
    is_fresh: bool = False
    """The token was fetched for this request; refused, its credential is."""


@dataclass(slots=True)
class _Held:
    value: str
    fetched_at: float
    renew_at: float
    ends_at: float


_Key = tuple[int, str | None, str | None, str | None]


class Authenticator:
    """Thread-safe. `base` is the host's `scheme://host[:port]`; `repository` as the host calls it."""

    def __init__(
        self, base: str, repository: str, credentials: Credentials, transport: Transport, *, actions: str = "pull"
    ) -> None:
        self._base = base
        self._scope = f"repository:{repository}:{actions}"
        self._transport = transport
        self._lock = threading.Condition()
        self._generation = 0
        self._candidates: Sequence[Credential | None] = credentials or (None,)
        self._works = 0
        self._challenge: Challenge | None = None
        self._tokens: dict[_Key, _Held] = {}
        self._fetching: set[_Key] = set()
        self._passwords: dict[Credential, _Held] = {}
        self._exchanging = threading.Lock()

    def has_credentials(self) -> bool:
        """Whether there is anybody to ask as."""
        return self._candidates[0] is not None

    def current(self, max_age_s: float = math.inf) -> Authorization:
        """For a new request, with a token fetched at most so long ago. Raises: RegistryAuthError, RegistryUnavailableError when no token can be had."""
        with self._lock:
            generation, candidate = self._generation, self._works
        try:
            return self._authorize(Authorization(None, generation, candidate, frozenset()), max_age_s=max_age_s)
        except (RegistryAuthError, RegistryUnavailableError):
            with self._lock:  # the registry may name another token service by now, or ask for none: hear it again
                self._challenge = None
            raise

    def after_refusal(self, used: Authorization, status: int, challenges: Sequence[Challenge]) -> Authorization | None:
        """What to send after a 401 or 403 with these challenges; None when there is nothing left to try.

        Raises: RegistryAuthError, RegistryUnavailableError when no token can be had.
        """
        wanted = next((one for scheme in _PREFERRED for one in challenges if one.scheme == scheme), None)
        with self._lock:
            if wanted is None and self._challenge is None and not challenges:
                wanted = Challenge("basic", {})  # a few registries refuse without saying what they want
            if used.generation != self._generation:  # replaced meanwhile
                used = Authorization(None, self._generation, self._works, frozenset())
            learned = status == 401 and wanted is not None and used.header is None
            if status == 401 and wanted is not None:
                self._challenge = wanted
        if learned:
            answer = self._authorize(used)
            return None if answer.header is None else answer
        if used.header is not None and used.header.startswith("Bearer ") and not used.is_fresh:
            return self._authorize(used, refused=used.header.removeprefix("Bearer "))
        return self._next(used) if used.header is not None else None

    def worked(self, used: Authorization) -> None:
        """The registry took it: the next request begins with the same candidate."""
        with self._lock:
            if used.generation == self._generation:
                self._works = used.candidate

    def replace(self, credentials: Credentials) -> None:
        """Use other credentials from now on."""
        with self._lock:
            if (credentials or (None,)) == self._candidates:
                return
            self._generation += 1
            self._candidates = credentials or (None,)
            self._works = 0
            self._tokens.clear()
            self._passwords = {}
            self._lock.notify_all()

    def _next(self, used: Authorization, error: RegistryAuthError | None = None) -> Authorization | None:
        """The next candidate that this request has not tried. Raises: `error`, if given, when there is none."""
        tried = used.tried | {used.candidate}
        with self._lock:
            left = [] if used.generation != self._generation else range(len(self._candidates))
        for candidate in left:
            if candidate not in tried:
                return self._authorize(Authorization(None, used.generation, candidate, tried))
        if error is not None:
            raise error
        return None

    def _authorize(
        self, wanted: Authorization, *, refused: str | None = None, max_age_s: float = math.inf
    ) -> Authorization:
        """Fill in the header for the candidate, by what the registry asks for; `refused` is a token it did not take."""
        with self._lock:
            challenge, generation = self._challenge, self._generation
            credential = self._candidates[min(wanted.candidate, len(self._candidates) - 1)]
        wanted = replace(wanted, generation=generation)
        if challenge is None:
            return wanted
        if credential is not None and credential.subject_token:
            try:
                credential = self._exchanged(credential)
            except RegistryAuthError as error:
                following = self._next(wanted, error)
                assert following is not None
                return following
        if challenge.scheme == "basic":
            if credential is not None and credential.password:
                return replace(wanted, header=basic(credential))
            return wanted if credential is None else self._next(wanted) or wanted
        if credential is not None and credential.registry_token:
            return replace(wanted, header=f"Bearer {credential.registry_token}", is_fresh=True)
        try:
            value, is_fresh = self._token(wanted.candidate, credential, challenge, refused, max_age_s)
        except RegistryAuthError as error:
            following = self._next(wanted, error)
            assert following is not None
            return following
        return replace(wanted, header=f"Bearer {value}", is_fresh=is_fresh or refused is not None)

    def _exchanged(self, credential: Credential) -> Credential:
        """The login that a subject token stands for; one thread asks, the others wait for it.

        Raises: RegistryAuthError, RegistryUnavailableError.
        """
        with self._exchanging:
            now = time.monotonic()
            held = self._passwords.get(credential)
            if held is None or now >= held.renew_at:
                try:
                    token = exchange_subject(self._transport, self._base, credential)
                except RegistryUnavailableError:
                    if held is None or now >= held.ends_at:
                        raise
                else:
                    used_s = token.lifetime_s * _USED_SHARE
                    held = _Held(token.value, now, now + used_s, now + token.lifetime_s)
                    self._passwords = {credential: held}
            return Credential(credential.username, held.value)

    def _token(
        self,
        candidate: int,
        credential: Credential | None,
        challenge: Challenge,
        refused: str | None,
        max_age_s: float,
    ) -> tuple[str, bool]:
        """A token that is not `refused`, and whether it was fetched just now."""
        parameters = challenge.parameters
        key = (candidate, parameters.get("realm"), parameters.get("service"), parameters.get("scope"))
        with self._lock:
            while True:
                generation = self._generation
                held = self._tokens.get(key)
                now = time.monotonic()
                if held is not None and (held.value == refused or now - held.fetched_at > max_age_s):
                    held = None
                if held is not None and now < held.ends_at and (now < held.renew_at or key in self._fetching):
                    return held.value, False
                if key not in self._fetching:
                    break
                self._lock.wait()
            self._fetching.add(key)
        started = time.monotonic()
        try:
            token = exchange(self._transport, self._base, challenge, self._scope, credential)
        except RegistryUnavailableError:
            if held is not None and time.monotonic() < held.ends_at:
                return held.value, False
            raise
        else:
            with self._lock:
                if generation == self._generation:
                    if len(self._tokens) >= _MAX_TOKENS:
                        self._tokens.clear()
                    lifetime_s = token.lifetime_s
                    self._tokens[key] = _Held(
                        token.value, started, started + lifetime_s * _USED_SHARE, started + lifetime_s
                    )
            return token.value, True
        finally:
            with self._lock:
                self._fetching.discard(key)
                self._lock.notify_all()
