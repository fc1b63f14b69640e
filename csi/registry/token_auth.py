"""Token authentication for pulls: what a registry's Bearer challenge asks for is exchanged for a token.

Tokens are of one repository, kept in memory until four fifths of their time are over, fetched once however many
threads want one, and thrown away with the credentials they came from. A registry that wants Basic gets Basic.

Source: distribution docs, spec/auth/token; distribution-spec on challenges.
"""

from __future__ import annotations

import json
import threading
import time
from typing import Any
from urllib.parse import urlencode

from csi.errors import ModelMountError, RegistryAuthError, RegistryUnavailableError
from csi.registry.address_rules import redact_url
from csi.registry.auth import BasicAuthenticator, Challenge, Credentials
from csi.registry.realm import check_realm
from csi.registry.transport import Response, Transport

_MAX_ANSWER_BYTES = 1024 * 1024
_DEFAULT_LIFETIME_S = 60.0  # where the service does not say (distribution spec/auth/token)
_USED_SHARE = 0.8


class TokenAuthenticator:
    """See `Authenticator`. `base` is the registry's `scheme://host[:port]`."""

    def __init__(self, base: str, repository: str, credentials: Credentials | None, transport: Transport) -> None:
        self._base = base
        self._scope = f"repository:{repository}:pull"
        self._basic = BasicAuthenticator(credentials)
        self._transport = transport
        self._lock = threading.Lock()
        self._challenge: Challenge | None = None
        self._token: str | None = None
        self._renew_at = 0.0

    def authorization(self) -> str | None:
        """A token once the registry has asked for one, renewed before it ends; Basic, or nothing, before.

        Raises: RegistryAuthError, RegistryUnavailableError when a token cannot be renewed.
        """
        with self._lock:
            if self._challenge is None:
                return self._basic.authorization()
            if self._token is None or time.monotonic() > self._renew_at:
                self._fetch(self._challenge)
            return f"Bearer {self._token}"

    def has_credentials(self) -> bool:
        """Whether somebody has logged in (a token may be an anonymous one)."""
        return self._basic.authorization() is not None

    def on_challenge(self, challenges: list[Challenge], refused: str | None) -> bool:
        """A 401 came for a request that carried `refused`. True when another authorization is there now."""
        wanted = next((challenge for challenge in challenges if challenge.scheme == "bearer"), None)
        if wanted is None:
            return False
        with self._lock:
            if self._token is not None and refused != f"Bearer {self._token}":
                return True  # another thread has got one meanwhile
            self._challenge = wanted
            self._fetch(wanted)
        return True

    def replace(self, credentials: Credentials | None) -> None:
        """See `Authenticator`."""
        with self._lock:
            self._basic.replace(credentials)
            self._token = None

    def _fetch(self, challenge: Challenge) -> None:
        """Under the lock: whoever else wants a token waits for this one."""
        realm = challenge.parameters.get("realm", "")
        credentials = self._basic.authorization()
        check_realm(self._base, realm, with_password=credentials is not None)
        query = {"scope": challenge.parameters.get("scope") or self._scope}
        if service := challenge.parameters.get("service"):
            query["service"] = service
        url = f"{realm}{'&' if '?' in realm else '?'}{urlencode(query)}"
        response = self._transport.get(url, {"Authorization": credentials} if credentials else {})
        try:
            answer = _answer(response, self._base, realm)
        finally:
            response.discard()
        token = answer.get("token") or answer.get("access_token")
        if not isinstance(token, str) or not (token.isascii() and token.isprintable()):
            raise _refused(self._base, realm, "gave no token", response.status)
        lifetime = answer.get("expires_in")
        seconds = float(lifetime) if isinstance(lifetime, int | float) and lifetime > 0 else _DEFAULT_LIFETIME_S
        self._token, self._renew_at = token, time.monotonic() + seconds * _USED_SHARE


def _answer(response: Response, base: str, realm: str) -> dict[str, Any]:
    if response.status == 429 or response.status >= 500:
        raise RegistryUnavailableError(
            f"registry {base}: its token service {redact_url(realm)} answered {response.status}", status=response.status
        )
    if response.status != 200:
        raise _refused(
            base,
            realm,
            f"answered {response.status}; the credentials are wrong, or may not read this repository",
            401 if response.status != 403 else 403,
        )
    try:
        answer = json.loads(response.read(_MAX_ANSWER_BYTES))
    except (ValueError, RecursionError, OSError) as exc:
        raise _refused(base, realm, "gave no usable answer", 401) from exc
    return answer if isinstance(answer, dict) else {}


def _refused(base: str, realm: str, problem: str, status: int) -> ModelMountError:
    return RegistryAuthError(f"registry {base}: its token service {redact_url(realm)} {problem}", status=status)
