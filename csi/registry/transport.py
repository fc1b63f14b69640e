"""HTTP/1.1 connections to registries: http.client in threads, because `readinto` of a socket into a reused buffer is
the cheapest way to move gigabytes in Python (measured against urllib3, requests, aiohttp, httpx and pycurl). The sockets
are ours (`csi.registry.line`).

The name is resolved once, the address checked, and that very address connected to. Proxies of the environment, netrc
and cookies are not used. Every connect and every receive has a timeout.
"""

from __future__ import annotations

import http.client
import os
import socket
import ssl
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from csi.errors import RegistryError, RegistryUnavailableError
from csi.registry.address_rules import AddressRules
from csi.registry.line import Line, TlsLine

_IDLE_PER_HOST = 16  # as many as a fetcher uses at most
# Bounded: saves nginx a third of its CPU; makes no difference to docker-registry (both measured on loopback).
_RECEIVE_BUFFER_BYTES = 512 * 1024
_USER_AGENT = "modelmount"

HostKey = tuple[str, str]
"""Scheme and authority (`host[:port]`)."""


@dataclass(frozen=True, slots=True)
class TlsSettings:
    """How a host is known, and known to: PEM texts. CAs are added to the system's; client certificates and `skip_verify`
    are for `authority` alone, not for where it redirects to.
    """

    authority: str = ""
    ca: tuple[str, ...] = ()
    client: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    skip_verify: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class TransportSettings:
    """Seconds: to connect one address; without a byte while one is awaited. `most_at_once`: requests to one host that are
    limited (see `Transport.get`); what others take from it at the same time is not counted.
    """

    connect_timeout_s: float = 10.0
    stall_timeout_s: float = 20.0
    most_at_once: int = 16
    tls: TlsSettings = TlsSettings()


class Response:
    """A response whose body is still on the wire. `finish` or `discard` it."""

    def __init__(self, transport: Transport, key: HostKey, connection: http.client.HTTPConnection) -> None:
        self._transport, self._key, self._connection = transport, key, connection
        self._slot: threading.Semaphore | None = None
        self._response = connection.getresponse()
        self.stall_timeout_s = transport.stall_timeout_s
        self.status = self._response.status
        self.headers = self._response.headers
        self._open = True

    def readinto(self, buffer: memoryview) -> int:
        """Bytes received, 0 at the end. Raises: OSError, http.client.HTTPException."""
        return self._response.readinto(buffer)

    def read(self, limit_bytes: int) -> bytes:
        """At most `limit_bytes` of the body."""
        parts, left = [], limit_bytes
        while left > 0 and (part := self._response.read(min(left, 65536))):
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    def finish(self) -> None:
        """The body was read to its end (or is short): keep the connection for the next request if it can be."""
        if not self._open:
            return
        self._end()
        line: Line | None = self._connection.sock  # type: ignore[assignment]  # as `_connect` made it
        in_step = line is not None and not line.has_leftovers
        if self._response.isclosed() and not self._response.will_close and in_step:
            self._transport.give_back(self._key, self._connection)
        else:
            self._connection.close()

    def discard(self) -> None:
        """Drop the connection with whatever is still coming."""
        if self._open:
            self._end()
            self._connection.close()

    def occupy(self, slot: threading.Semaphore) -> None:
        """`slot` was acquired for it, and is released with it."""
        self._slot = slot

    def _end(self) -> None:
        self._open = False
        if self._slot is not None:
            self._slot.release()


class Transport:
    """A pool of idle connections. Thread-safe; a connection is used by one thread at a time."""

    def __init__(self, rules: AddressRules, settings: TransportSettings | None = None) -> None:
        self._rules = rules
        self._settings = settings or TransportSettings()
        self._lock = threading.Lock()
        self._idle: dict[HostKey, list[http.client.HTTPConnection]] = {}
        self._tls: dict[bool, ssl.SSLContext] = {}
        self._slots: dict[HostKey, threading.Semaphore] = {}

    @property
    def stall_timeout_s(self) -> float:
        """How long nothing may come while something is awaited."""
        return self._settings.stall_timeout_s

    def get(
        self, url: str, headers: Mapping[str, str], timeout_s: float | None = None, *, limited: bool = False
    ) -> Response:
        """One GET. `timeout_s` bounds each wait for bytes, at most the stall timeout. `limited`: it waits while `most_at_once`
        others of this kind to the host are not finished.

        An idle connection the server has closed meanwhile is replaced once, unseen.

        Raises: RegistryUnavailableError (cannot connect, no answer), RegistryError (forbidden address).
        """
        if not limited:
            return self._ask("GET", url, headers, None, timeout_s)
        parts = urlsplit(url)
        key = (parts.scheme, parts.netloc)
        with self._lock:
            slot = self._slots.setdefault(key, threading.Semaphore(self._settings.most_at_once))
        # The others each end within their own timeouts; whoever waits for longer than one of those asks again.
        if not slot.acquire(timeout=self._settings.stall_timeout_s):
            raise _unavailable(key, f"all {self._settings.most_at_once} requests to it at once are still going on")
        try:
            response = self._ask("GET", url, headers, None, timeout_s)
        except BaseException:
            slot.release()
            raise
        response.occupy(slot)
        return response

    def post(self, url: str, headers: Mapping[str, str], body: bytes) -> Response:
        """One POST that may be sent twice, as to a token service. Otherwise as `get`."""
        return self._ask("POST", url, headers, body, None)

    def _ask(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None, timeout_s: float | None
    ) -> Response:
        parts = urlsplit(url)
        key = (parts.scheme, parts.netloc)
        request = (method, (parts.path or "/") + (f"?{parts.query}" if parts.query else ""), body)
        wait_s = min(self._settings.stall_timeout_s, timeout_s or self._settings.stall_timeout_s)
        sent = {"User-Agent": _USER_AGENT, "Accept-Encoding": "identity", **headers}
        connection = self._take(key)
        if connection is not None:
            try:
                return self._exchange(key, connection, request, sent, wait_s)
            except (http.client.HTTPException, ConnectionError, BrokenPipeError):
                connection.close()
            except TimeoutError as exc:
                connection.close()
                raise _unavailable(
                    key, f"sent nothing for {wait_s:g} s; is it overloaded, or a firewall in between?"
                ) from exc
        connection = self._connect(key, wait_s)
        try:
            return self._exchange(key, connection, request, sent, wait_s)
        except TimeoutError as exc:
            connection.close()
            raise _unavailable(
                key, f"sent nothing for {wait_s:g} s; is it overloaded, or a firewall in between?"
            ) from exc
        except (http.client.HTTPException, OSError) as exc:
            connection.close()
            raise _unavailable(key, f"closed the connection ({type(exc).__name__})") from exc

    def give_back(self, key: HostKey, connection: http.client.HTTPConnection) -> None:
        """Keep an idle connection for the next request."""
        with self._lock:
            idle = self._idle.setdefault(key, [])
            if len(idle) < _IDLE_PER_HOST:
                idle.append(connection)
                return
        connection.close()

    def close(self) -> None:
        """Close idle connections."""
        with self._lock:
            held, self._idle = self._idle, {}
        for idle in held.values():
            for connection in idle:
                connection.close()

    def _take(self, key: HostKey) -> http.client.HTTPConnection | None:
        with self._lock:
            idle = self._idle.get(key)
            return idle.pop() if idle else None

    def _exchange(
        self,
        key: HostKey,
        connection: http.client.HTTPConnection,
        request: tuple[str, str, bytes | None],
        headers: Mapping[str, str],
        wait_s: float,
    ) -> Response:
        if connection.sock is not None:
            connection.sock.settimeout(wait_s)
        method, target, body = request
        connection.request(method, target, body, dict(headers))
        return Response(self, key, connection)

    def _connect(self, key: HostKey, wait_s: float) -> http.client.HTTPConnection:
        scheme, authority = key
        parts = urlsplit(f"//{authority}")
        host, port = parts.hostname or "", parts.port or (443 if scheme == "https" else 80)
        context = self._tls_context(authority) if scheme == "https" else None
        connection = http.client.HTTPConnection(host, port)
        connect_s = min(wait_s, self._settings.connect_timeout_s)
        sock = self._open_socket(authority, host, port, connect_s)
        # http.client writes the Host header from host and port.
        try:
            line = Line(sock) if context is None else TlsLine(sock, context, host, connect_s)
        except (ssl.SSLError, ssl.CertificateError) as exc:
            sock.close()
            reason = getattr(exc, "verify_message", None) or getattr(exc, "reason", None) or exc
            raise _unavailable(key, f"TLS failed: {reason}; check the registry's certificate and CA") from exc
        except OSError as exc:
            sock.close()
            raise _unavailable(key, f"TLS failed: {exc}") from exc
        connection.sock = line.as_socket()
        connection.default_port = 443 if scheme == "https" else 80
        return connection

    def _open_socket(self, authority: str, host: str, port: int, timeout_s: float) -> socket.socket:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as exc:
            raise RegistryUnavailableError(
                f"registry {authority}: its name does not resolve ({exc}); check the reference and this node's DNS"
            ) from exc
        failure: OSError | None = None
        for family, kind, protocol, _, address in found:
            self._rules.check_address(authority, str(address[0]))
            sock = socket.socket(family, kind, protocol)
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)
                sock.settimeout(timeout_s)
                sock.connect(address)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return sock
            except OSError as exc:
                sock.close()
                failure = exc
        raise RegistryUnavailableError(
            f"registry {authority}: cannot connect ({failure or 'no address'}); is it running, and reachable from this node?"
        ) from failure

    def _tls_context(self, authority: str) -> ssl.SSLContext:
        is_own = authority == self._settings.tls.authority
        with self._lock:
            if is_own not in self._tls:
                self._tls[is_own] = tls_context(self._settings.tls, authority)
            return self._tls[is_own]


def tls_context(tls: TlsSettings, authority: str) -> ssl.SSLContext:
    """For connections to `authority`. Raises: RegistryError for a CA, certificate or key that cannot be used."""
    is_own = authority == tls.authority
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        for pem in tls.ca:
            context.load_verify_locations(cadata=pem)
        for certificate, key in tls.client if is_own else ():
            _load_pair(context, certificate, key)
    except (ssl.SSLError, ValueError) as exc:
        raise RegistryError(
            f"registry {authority}: a CA, client certificate or key of its configuration cannot be used "
            f"({getattr(exc, 'reason', None) or type(exc).__name__}); an administrator of this node corrects it"
        ) from None
    if is_own and tls.skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _unavailable(key: HostKey, problem: str) -> RegistryUnavailableError:
    return RegistryUnavailableError(f"registry {key[1]}: {problem}")


def _load_pair(context: ssl.SSLContext, certificate: str, key: str) -> None:
    """OpenSSL reads these from a file only: an anonymous one, gone with its descriptor."""
    fd = os.memfd_create("client-certificate", os.MFD_CLOEXEC)
    with open(fd, "wb") as file:
        file.write(f"{certificate}\n{key}".encode())
        file.flush()
        context.load_cert_chain(f"/proc/self/fd/{fd}", password="")  # an encrypted key fails instead of asking
