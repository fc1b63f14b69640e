"""Registry logins with the pod's service-account token: kubelet brings a fresh one with every publish (`tokenRequests`
and `requiresRepublish` of the CSIDriver object), in the secrets or, before Kubernetes 1.35, in volume_context.

What a registry does with the token is the administrator's setting, per registry; a pod's author has no say in where a token
goes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import urlsplit

from csi.credentials import Credential, Credentials
from csi.driver.credentials import TOKENS_KEY
from csi.errors import InvalidVolumeError
from csi.oci.reference import Reference


class Method(StrEnum):
    """How a token becomes a login."""

    IDENTITY = "identity"
    """The registry's token service exchanges it, as an OAuth 2 refresh token."""
    BEARER = "bearer"
    """The registry takes it as it is."""
    BASIC = "basic"
    """It is the password of a user."""
    EXCHANGE = "exchange"
    """A token service of the administrator's exchanges it for the password of a user (RFC 8693)."""


@dataclass(frozen=True, slots=True)
class TokenLogin:
    """`username` is for BASIC and EXCHANGE, `url` for EXCHANGE."""

    method: Method
    username: str = ""
    url: str = ""


def parse_token_logins(texts: Iterable[str]) -> dict[str, TokenLogin]:
    """From `REGISTRY=METHOD`, `REGISTRY=basic:USER` and `REGISTRY=exchange:USER:URL`. Raises: InvalidVolumeError."""
    logins = {}
    for text in texts:
        registry, _, method_text = text.partition("=")
        name, _, username = method_text.partition(":")
        username, _, url = username.partition(":") if name == Method.EXCHANGE else (username, "", "")
        if (
            not registry
            or "/" in registry
            or name not in set(Method)
            or (name in (Method.BASIC, Method.EXCHANGE)) != bool(username)
            or (name == Method.EXCHANGE) != _is_web_address(url)
        ):
            raise InvalidVolumeError(
                f"--token-login {text[:100]!r}: expected REGISTRY=identity, REGISTRY=bearer, REGISTRY=basic:USER or "
                "REGISTRY=exchange:USER:https://...",
                field="token-login",
            )
        logins[registry.lower()] = TokenLogin(Method(name), username, url)
    return logins


def token_credentials(
    secrets: Mapping[str, str],
    volume_context: Mapping[str, str],
    reference: Reference,
    logins: Mapping[str, TokenLogin],
) -> Credentials:
    """The login of the pod's own token at the reference's registry; none where none is set, or no token came.

    The token whose audience is the registry's name is used, else the only one. Raises: InvalidVolumeError.
    """
    login = logins.get(reference.registry)
    text = secrets.get(TOKENS_KEY) or volume_context.get(TOKENS_KEY)
    if login is None or not text:
        return ()
    token = _token(text, reference.registry)
    match login.method:
        case Method.IDENTITY:
            return (Credential(identity_token=token),)
        case Method.BEARER:
            return (Credential(registry_token=token),)
        case Method.BASIC:
            return (Credential(username=login.username, password=token),)
        case Method.EXCHANGE:
            return (Credential(username=login.username, subject_token=token, exchange_url=login.url),)


def service_account_of(volume_context: Mapping[str, str]) -> str:
    """`namespace/name` as kubelet says (`podInfoOnMount`), else empty."""
    namespace = volume_context.get("csi.storage.k8s.io/pod.namespace", "")
    name = volume_context.get("csi.storage.k8s.io/serviceAccount.name", "")
    return f"{namespace}/{name}" if namespace and name else ""


def _is_web_address(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme in ("https", "http") and bool(parts.hostname) and "@" not in parts.netloc


def _token(text: str, audience: str) -> str:
    try:
        tokens = {str(key): str(value["token"]) for key, value in json.loads(text).items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InvalidVolumeError("service-account tokens: not what kubelet sends", field=TOKENS_KEY) from None
    token = tokens.get(audience) or (next(iter(tokens.values())) if len(tokens) == 1 else "")
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise InvalidVolumeError(
            f"service-account tokens: none has the audience {audience!r} (there are {', '.join(sorted(tokens))[:200]}); add it "
            "to tokenRequests of the CSIDriver object",
            field=TOKENS_KEY,
        )
    return token
