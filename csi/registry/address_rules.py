"""Which addresses may be spoken to, and how. Plain decisions: a tenant writes the reference, a registry writes the
redirect, and neither may lead this node to a metadata service or its own loopback.

    https           everywhere
    plain http      loopback names, and hosts an administrator listed; never as a fallback
    link-local, metadata, multicast, unspecified addresses     never
    loopback        only where plain http applies
    private ranges  yes: many registries are there

Where an administrator lists the registries that may be named, no other is spoken to, and where those lead (redirects, token
services) is limited to public addresses at port 443, or listed too.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from csi.errors import PolicyDeniedError, RegistryError

MAX_REDIRECTS = 5
_METADATA = frozenset({ipaddress.ip_address("169.254.169.254"), ipaddress.ip_address("fd00:ec2::254")})


@dataclass(frozen=True, slots=True)
class AddressRules:
    """`plain_http_hosts`: `host` (any port) or `host:port`, lower case. `allowed`: the same, or `*.domain`, which stands for any
    host below it; empty for no limit.
    """

    plain_http_hosts: frozenset[str] = frozenset()
    allowed: frozenset[str] = frozenset()

    def scheme_for(self, authority: str) -> str:
        """`http` or `https` for a registry's `host[:port]`."""
        return "http" if self.allows_plain_http(authority) else "https"

    def allows_plain_http(self, authority: str) -> bool:
        """Loopback by name or address, or listed."""
        host = host_of(authority)
        return is_loopback_name(host) or authority.lower() in self.plain_http_hosts or host in self.plain_http_hosts

    def check_registry(self, authority: str) -> None:
        """Whether a reference may name this registry. Raises: PolicyDeniedError."""
        if self.allowed and not self._is_listed(authority):
            raise PolicyDeniedError(
                f"registry {authority}: is not among the registries that volumes of this node may name; an administrator "
                "allows it with --allow-registry",
                rule="allow-registry",
                reason="registry is not listed",
            )

    def _is_listed(self, authority: str) -> bool:
        host = host_of(authority)
        return any(
            host.endswith(pattern[1:]) if pattern.startswith("*.") else pattern in (host, authority.lower())
            for pattern in self.allowed
        )

    def _is_foreign(self, authority: str, ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
        """Among listed registries: another host, and not one of the public network at the usual port."""
        if not self.allowed or self._is_listed(authority) or self.allows_plain_http(authority):
            return False
        return not ip.is_global or urlsplit(f"//{authority}").port not in (None, 443)

    def check_address(self, authority: str, address: str) -> None:
        """Whether to connect to `address`, which the name in `authority` resolved to.

        Raises: RegistryError, without saying more about the network than the name.
        """
        ip = ipaddress.ip_address(address.partition("%")[0])
        if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped:
            ip = ip.ipv4_mapped
        forbidden = ip in _METADATA or ip.is_link_local or ip.is_multicast or ip.is_unspecified
        if forbidden or (ip.is_loopback and not self.allows_plain_http(authority)):
            raise RegistryError(
                f"registry {authority}: its name leads to an address this node does not speak to; "
                "an administrator lists loopback registries with --plain-http-host"
            )
        if self._is_foreign(authority, ip):
            raise RegistryError(
                f"registry {authority}: its name leads to an address this node does not speak to; an administrator lists "
                "private registries, and what they lead to, with --allow-registry"
            )

    def redirect(self, origin: str, target: str) -> bool:
        """Whether credentials go along from URL `origin` to URL `target`: only to the same scheme, host and port.

        Raises: RegistryError for a redirect that must not be followed.
        """
        here, there = urlsplit(origin), urlsplit(target)
        if there.scheme not in ("http", "https") or not there.hostname or "@" in there.netloc:
            raise RegistryError(f"registry {here.netloc}: redirects to a malformed address {redact_url(target)!r}")
        if there.scheme == "http" and not self.allows_plain_http(there.netloc):
            raise RegistryError(
                f"registry {here.netloc}: redirects to plain HTTP at {there.netloc}; refused (an administrator may list "
                "that host with --plain-http-host)"
            )
        return (here.scheme, here.hostname, _port(here.scheme, here.port)) == (
            there.scheme,
            there.hostname,
            _port(there.scheme, there.port),
        )


def host_of(authority: str) -> str:
    """`host` of `host:port` or `[v6]:port`, lower case, without brackets."""
    return (urlsplit(f"//{authority}").hostname or "").lower()


def is_loopback_name(host: str) -> bool:
    """`localhost`, `*.localhost`, 127.0.0.0/8, ::1."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def redact_url(url: str) -> str:
    """For messages: without query, fragment and user info (signed blob addresses are secrets)."""
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "(malformed)"
    return f"{parts.scheme}://{parts.hostname or ''}{port}{parts.path[:200]}"


def _port(scheme: str, port: int | None) -> int:
    return port or (443 if scheme == "https" else 80)
