"""Which token service a registry may send us to, and with what. Plain decisions, for pulls and pushes alike.

Source: the advisories on clients that sent a user's password to any realm a registry named.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import SplitResult, urlsplit

from csi.errors import RegistryAuthError
from csi.registry.address_rules import redact_url


def check_realm(base: str, realm: str, *, with_password: bool) -> None:
    """Whether the token service at `realm`, named by the registry at `base` (`scheme://host[:port]`), may be asked.

    Without a password: any https address, or the registry's own host. With one: the registry's own host, a host below
    it, or one beside it in the same domain (`auth.example.com` for `registry.example.com`). The registry gets the
    password anyway; the rule keeps a challenge from handing it to strangers. Over plain http only where the registry
    itself is spoken to that way, and only on its host.

    Raises: RegistryAuthError.
    """
    registry, service = split_url(base), split_url(realm)
    if registry is None or service is None:
        raise RegistryAuthError(f"registry {base}: names a malformed token service {redact_url(realm)!r}")
    ours, theirs = registry.hostname or "", service.hostname or ""
    if service.scheme == "http" and (registry.scheme != "http" or ours != theirs):
        raise RegistryAuthError(
            f"registry {registry.netloc}: its token service {redact_url(realm)} is not reached over https; refused"
        )
    if ours == theirs or not with_password or theirs.endswith(f".{ours}") or _in_domain_of(theirs, ours):
        return
    raise RegistryAuthError(
        f"registry {registry.netloc}: its token service {redact_url(realm)} belongs to another domain; passwords are not "
        "sent there. Name the registry by an address in that domain, or ask its administrator"
    )


def _in_domain_of(host: str, registry: str) -> bool:
    """Under the registry's parent domain, unless that looks like a public suffix (`co.uk`)."""
    try:
        ipaddress.ip_address(registry)
        return False
    except ValueError:
        pass
    parent = registry.partition(".")[2]
    labels = parent.split(".")
    if len(labels) < 2 or (len(labels) == 2 and len(labels[0]) <= 3 and len(labels[1]) == 2):
        return False
    return host == parent or host.endswith(f".{parent}")


def split_url(url: str) -> SplitResult | None:
    """The parts of an absolute http or https URL without user info, None for anything else."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return None
    return parts if parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc else None
