"""One exchange with a token service: what a Bearer challenge asks for, for a credential or for nobody.

    GET     with Basic credentials or none, which every service knows
    POST    OAuth2, for identity tokens (`refresh_token`), and for passwords where the service knows no GET

And before it, where a login begins with a token of somebody else's: its exchange for a password.

Source: distribution docs, spec/auth/token and spec/auth/oauth.
"""

from __future__ import annotations

import base64
import http.client
import json
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlencode

from csi.credentials import Credential
from csi.errors import ModelMountError, RegistryAuthError, RegistryUnavailableError
from csi.registry.address_rules import redact_url
from csi.registry.headers import Challenge, parse_retry_after
from csi.registry.realm import check_realm
from csi.registry.transport import Response, Transport

_CLIENT = {"client_id": "modelmount"}
_MAX_ANSWER_BYTES = 1024 * 1024
_DEFAULT_LIFETIME_S = 60.0  # where the service does not say (distribution spec/auth/token)
_LONGEST_LIFETIME_S = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Token:
    """An access token and how long it is good for, from now on."""

    value: str = field(repr=False)
    lifetime_s: float


def exchange(
    transport: Transport, base: str, challenge: Challenge, own_scope: str, credential: Credential | None
) -> Token:
    """A token for what the registry at `base` asks for; `own_scope` where it does not say.

    Raises: RegistryAuthError (refused, or a realm that must not be asked), RegistryUnavailableError.
    """
    realm = challenge.parameters.get("realm", "")
    check_realm(base, realm, with_password=credential is not None)
    asked = {"scope": challenge.parameters.get("scope") or own_scope}
    if service := challenge.parameters.get("service"):
        asked["service"] = service
    if credential is not None and credential.identity_token:
        secret = {"grant_type": "refresh_token", "refresh_token": credential.identity_token}
        return _token(_post(transport, realm, asked | secret | _CLIENT), base, realm)
    headers = {"Authorization": basic(credential)} if credential is not None else {}
    response = transport.get(f"{realm}{'&' if '?' in realm else '?'}{urlencode(asked)}", headers)
    if response.status in (404, 405) and credential is not None:
        response.discard()
        secret = {"grant_type": "password", "username": credential.username, "password": credential.password}
        response = _post(transport, realm, asked | secret | _CLIENT)
    return _token(response, base, realm)


def exchange_subject(transport: Transport, base: str, credential: Credential) -> Token:
    """The password of a login whose subject token an administrator's token service exchanges. What its URL has behind the
    question mark (an audience, a scope) goes into the form.

    Raises: RegistryAuthError, RegistryUnavailableError. Source: RFC 8693, section 2.1.
    """
    url, _, query = credential.exchange_url.partition("?")
    form = dict(parse_qsl(query)) | {
        "grant_type": "urn:ietf:params:oauth:grant-type:token-exchange",
        "requested_token_type": "urn:ietf:params:oauth:token-type:access_token",
        "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
        "subject_token": credential.subject_token,
    }
    return _token(_post(transport, url, form), base, url)


def basic(credential: Credential) -> str:
    """The Authorization header of Basic."""
    return "Basic " + base64.b64encode(f"{credential.username}:{credential.password}".encode()).decode()


def _post(transport: Transport, realm: str, form: dict[str, str]) -> Response:
    body = urlencode(form).encode()
    return transport.post(realm, {"Content-Type": "application/x-www-form-urlencoded"}, body)


def _token(response: Response, base: str, realm: str) -> Token:
    try:
        answer = _answer(response, base, realm)
    finally:
        response.discard()
    value = answer.get("token") or answer.get("access_token")
    if not isinstance(value, str) or not (value.isascii() and value.isprintable()):
        raise _refused(base, realm, "gave no token", 401)
    lifetime = answer.get("expires_in")
    seconds = float(lifetime) if isinstance(lifetime, int | float) and lifetime > 0 else _DEFAULT_LIFETIME_S
    return Token(value, min(seconds, _LONGEST_LIFETIME_S))


def _answer(response: Response, base: str, realm: str) -> dict[str, Any]:
    status = response.status
    if status in (408, 425, 429) or status >= 500:
        wait_s = parse_retry_after(response.headers.get("Retry-After", ""), time.time())
        raise RegistryUnavailableError(
            f"registry {base}: its token service {redact_url(realm)} answered {status}; it is asked again",
            status=status,
            retry_after_s=None if wait_s is None else int(min(wait_s, 3600)),
        )
    if status != 200:
        raise _refused(
            base,
            realm,
            f"answered {status}; the credentials are wrong or have expired, or may not read this repository",
            403 if status == 403 else 401,
        )
    try:
        answer = json.loads(response.read(_MAX_ANSWER_BYTES))
    except TimeoutError as exc:
        raise RegistryUnavailableError(f"registry {base}: its token service {redact_url(realm)} stalled") from exc
    except (OSError, http.client.HTTPException) as exc:
        raise RegistryUnavailableError(
            f"registry {base}: its token service {redact_url(realm)} broke the connection ({type(exc).__name__})"
        ) from exc
    except (ValueError, RecursionError):
        # Without its cause: a decoding error quotes what it could not decode.
        raise _refused(base, realm, "gave no usable answer", 401) from None
    return answer if isinstance(answer, dict) else {}


def _refused(base: str, realm: str, problem: str, status: int) -> ModelMountError:
    return RegistryAuthError(f"registry {base}: its token service {redact_url(realm)} {problem}", status=status)
