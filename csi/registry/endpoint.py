"""One host that serves a repository: the registry itself or a mirror. Requests to it, with authorization and redirects.

A redirect of a blob is remembered and asked first, until it refuses. Whether the host is well is remembered too, so
that one that does not answer costs a request its timeout only once in a while; who to ask instead is the caller's
decision.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from urllib.parse import quote, urljoin

from csi.errors import RegistryError, RegistryUnavailableError
from csi.oci.digest import Digest
from csi.oci.manifest import OCI_INDEX
from csi.registry.address_rules import MAX_REDIRECTS, AddressRules
from csi.registry.auth import Authenticator
from csi.registry.headers import parse_challenges
from csi.registry.transport import Response, Transport
from csi.registry_hosts import RegistryHost

_EXPIRED = (401, 403, 404, 410)
_REDIRECTS = (301, 302, 303, 307, 308)
_FIRST_REST_S = 1.0
_LONGEST_REST_S = 60.0
_DISTRUST_S = 600.0
"""How long a host that sent wrong bytes is asked for nothing that somebody else has too. A guess, not measured."""
_MAX_REJECTED = 4096


class Endpoint:
    """Thread-safe. `host` has its scheme; `registry` is the one that the reference names."""

    def __init__(
        self,
        host: RegistryHost,
        registry: str,
        repository: str,
        rules: AddressRules,
        authenticator: Authenticator,
        transport: Transport,
    ) -> None:
        self.host = host
        self.authenticator = authenticator
        self._rules, self._transport = rules, transport
        self._base = f"{host.scheme}://{host.authority}{host.path}/{repository}"
        self._query = f"?ns={quote(registry, safe='')}" if host.is_mirror else ""
        self._headers: dict[str, str] = {}
        for name, text in host.headers:
            self._headers[name] = f"{self._headers[name]}, {text}" if name in self._headers else text
        self._lock = threading.Lock()
        self._resolved: dict[Digest, str] = {}
        """Where a blob was redirected to; used until that address refuses."""
        self._rejected: set[Digest] = set()
        self._failures = 0
        self._rests_until = 0.0
        self._distrusted_until = 0.0

    def close(self) -> None:
        """Close idle connections."""
        self._transport.close()

    def rests(self) -> bool:
        """Whether it has failed lately, and is left in peace for a while."""
        return time.monotonic() < max(self._rests_until, self._distrusted_until)

    def failed(self, error: RegistryUnavailableError) -> None:
        """It does not answer, or asks for time: leave it in peace, longer each time, or as long as it says."""
        with self._lock:
            self._failures += 1
            asked = error.fields.get("retry_after_s")
            rest_s = float(asked) if asked is not None else _FIRST_REST_S * 2.0 ** min(self._failures - 1, 8)
            self._rests_until = time.monotonic() + min(rest_s, _LONGEST_REST_S)

    def reject(self, digest: Digest | None) -> None:
        """It sent wrong bytes (of that blob): it is not to be asked for them any more, and for anything only if nobody else is
        left.
        """
        with self._lock:
            self._distrusted_until = time.monotonic() + _DISTRUST_S
            if digest is not None:
                if len(self._rejected) >= _MAX_REJECTED:
                    self._rejected.clear()
                self._rejected.add(digest)
                self._resolved.pop(digest, None)

    def is_rejected(self, digest: Digest | None) -> bool:
        """Whether it has sent wrong bytes of that blob."""
        return digest in self._rejected

    def cannot_serve_ranges(self) -> None:
        """It sends whole blobs: of no use for parts of them, for now."""
        with self._lock:
            self._rests_until = time.monotonic() + _LONGEST_REST_S

    def works(self) -> None:
        """It has answered."""
        if self._failures:
            with self._lock:
                self._failures, self._rests_until = 0, 0.0

    def get_manifest(self, name: str, headers: Mapping[str, str], subject: str, timeout_s: float) -> Response:
        """GET of a manifest by tag or digest. The answer may have any final status but a redirect."""
        return self._get(f"{self._base}/manifests/{name}{self._query}", headers, subject, timeout_s)

    def get_referrers(self, digest: Digest, artifact_type: str, subject: str, timeout_s: float) -> Response:
        """GET of the list of what refers to a manifest. The answer may have any final status but a redirect."""
        query = f"{self._query}{'&' if self._query else '?'}artifactType={quote(artifact_type, safe='')}"
        return self._get(f"{self._base}/referrers/{digest}{query}", {"Accept": OCI_INDEX}, subject, timeout_s)

    def get_blob(self, digest: Digest, headers: Mapping[str, str], subject: str) -> Response:
        """GET of (a range of) a blob, at the address it was redirected to before if there is one."""
        with self._lock:
            known = self._resolved.get(digest)
        if known is not None:
            try:
                response = self._transport.get(known, headers, limited=True)
            except BaseException:
                self._forget(digest, known)  # the next request may be sent elsewhere
                raise
            if response.status < 300:
                return response
            self._forget(digest, known)
            if response.status not in _EXPIRED:
                return response
            response.discard()
        return self._get(f"{self._base}/blobs/{digest}{self._query}", headers, subject, None, remember=digest)

    def _forget(self, digest: Digest, address: str) -> None:
        with self._lock:
            if self._resolved.get(digest) == address:
                del self._resolved[digest]

    def _get(
        self,
        url: str,
        headers: Mapping[str, str],
        subject: str,
        timeout_s: float | None,
        remember: Digest | None = None,
    ) -> Response:
        authorization = self.authenticator.current()
        is_own = True  # until a redirect leads to another scheme, host or port
        redirects = 0
        while redirects <= MAX_REDIRECTS:
            sent = dict(headers)
            if is_own:
                sent |= self._headers
                if authorization.header is not None:
                    sent["Authorization"] = authorization.header
            response = self._transport.get(url, sent, timeout_s, limited=True)
            if response.status in (401, 403) and is_own:
                challenges = parse_challenges(", ".join(response.headers.get_all("WWW-Authenticate", [])))
                try:
                    another = self.authenticator.after_refusal(authorization, response.status, challenges)
                except BaseException:
                    response.discard()
                    raise
                if another is not None:
                    response.discard()
                    authorization = another
                    continue
            elif is_own:
                self.authenticator.worked(authorization)
            if response.status not in _REDIRECTS:
                return response
            location = response.headers.get("Location", "")
            response.discard()
            try:
                target = urljoin(url, location)
                same_place = self._rules.redirect(url, target)
            except ValueError:
                raise RegistryError(f"{subject}: redirects to a malformed address") from None
            is_own = is_own and same_place
            if remember is not None and not is_own:
                with self._lock:
                    self._resolved[remember] = target
            url = target
            redirects += 1
        raise RegistryError(f"{subject}: more than {MAX_REDIRECTS} redirects")
