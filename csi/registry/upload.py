"""Uploads to a registry, over the oras library: its session and its addresses; our timeouts, streaming, checks, tokens
and rules about passwords.

What the adapter changes, because oras as it is has none of it:
- every request has timeouts, and no retries that repeat a refused password;
- no ambient credentials (it would read docker's config.json, netrc, ORAS_USER by itself), proxies or cookies;
- every credential that fits is tried in turn, with tokens that are renewed before they end;
- a password goes to the registry itself, and to a token service that belongs to it; never along a redirect;
- blobs stream from the file with a known length in one PUT, instead of being read whole;
- the bytes sent are hashed, and a digest the registry reports is compared.

A push is not repeated here when it fails; started again, it skips what the registry has.

Source: distribution-spec, "Pushing blobs" and "Pushing manifests"; distribution docs, spec/auth/token.
"""

from __future__ import annotations

import contextlib
import http
import json
import math
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin, urlsplit

import oras.container
import oras.provider
import requests
import urllib3.exceptions
from requests.adapters import HTTPAdapter

from csi.credentials import Credentials
from csi.errors import (
    DigestMismatchError,
    ModelNotFoundError,
    RegistryAuthError,
    RegistryError,
    RegistryUnavailableError,
)
from csi.oci.descriptor import Descriptor
from csi.oci.digest import Digest
from csi.oci.manifest import MAX_MANIFEST_BYTES, OCI_INDEX, OCI_MANIFEST
from csi.oci.modelpack import PackedModel
from csi.oci.reference import Reference
from csi.oci.strict_json import loads_strict
from csi.registry.address_rules import AddressRules, redact_url
from csi.registry.auth import Authenticator, Authorization
from csi.registry.headers import parse_challenges
from csi.registry.pushing import HashedFile, OnProgress, PushProgress, PushState, Referrer
from csi.registry.realm import split_url
from csi.registry.transport import TlsSettings, Transport, TransportSettings, tls_context
from csi.registry_hosts import RegistryHost, own_host

_CONNECT_TIMEOUT_S = 10.0
_ANSWER_TIMEOUT_S = 120.0
# A registry that keeps its blobs in an object store copies a finished upload before it answers. A guess, not measured.
_COMMIT_BYTES_PER_S = 32 * 1024 * 1024
_MAX_ANSWER_BYTES = 64 * 1024
# Tokens live at least 60 s; a large PUT must begin with a fresh one, as its body cannot be sent twice.
_TOKEN_AGE_S = 30.0
_LIST_TRIES = 4
_NOBODY = Authorization(None, 0, 0, frozenset())
# What requests raises, and what escapes it: urllib3's own while a body is read, ValueError for a malformed redirect.
_NO_ANSWER = (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError)
_REDIRECTS = (301, 302, 303, 307, 308)


class _Adapter(HTTPAdapter):
    """The CAs of the system and of the configuration beside those of requests, and a timeout on every request, also on those
    oras makes.
    """

    def __init__(self, tls: TlsSettings, authority: str) -> None:
        self._context = tls_context(tls, authority)
        super().__init__()

    def init_poolmanager(self, connections: int, maxsize: int, block: bool = False, **pool_kwargs: Any) -> None:
        super().init_poolmanager(  # type: ignore[no-untyped-call, unused-ignore]
            connections, maxsize, block, ssl_context=self._context, **pool_kwargs
        )

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = False,
        timeout: Any = None,
        verify: bool | str = True,
        cert: Any = None,
        proxies: Mapping[str, str] | None = None,
    ) -> requests.Response:
        timeout = timeout or (_CONNECT_TIMEOUT_S, _ANSWER_TIMEOUT_S)
        verify = verify and self._context.verify_mode is not ssl.CERT_NONE
        return super().send(request, stream, timeout, verify, cert, proxies)


@dataclass(frozen=True, slots=True)
class _Answer:
    """A response, its body read as far as anybody needs it."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class ModelUploader:
    """A `ModelSink` over one repository of a registry.

    Plain HTTP is spoken to loopback registries, and to others only with `plain_http`; never as a fallback. Of `hosts` (empty:
    the registry as it is) the registry's own entry counts, with its address, certificates and headers: a mirror has no use
    for a push.
    """

    def __init__(
        self,
        reference: Reference,
        *,
        plain_http: bool,
        credentials: Credentials = (),
        hosts: Sequence[RegistryHost] = (),
    ) -> None:
        """No I/O yet. Raises: RegistryError for a host that is not pushed to, or whose certificates cannot be used."""
        rules = AddressRules(frozenset({reference.registry}) if plain_http else frozenset())
        host = _own_host(reference, hosts)
        scheme = host.scheme or rules.scheme_for(reference.registry)
        if scheme == "http":
            rules = AddressRules(rules.plain_http_hosts | {host.authority})
        self._origin = reference.origin
        self._registry = reference.registry
        self._headers = dict(host.headers)
        self._oras = oras.provider.Registry(hostname=host.authority, insecure=scheme == "http", auth_backend="token")
        self._base = f"{self._oras.prefix}://{host.authority}"
        self._oras.session.trust_env = False
        tls = TlsSettings(host.authority, host.ca, host.client, host.skip_verify)
        self._oras.session.mount("http://", _Adapter(tls, ""))
        self._oras.session.mount("https://", _Adapter(tls, ""))
        self._oras.session.mount(f"https://{host.authority}/", _Adapter(tls, host.authority))
        self._container = oras.container.Container(f"{host.authority}/{reference.repository}")
        self._transport = Transport(rules, TransportSettings(tls=tls))
        self._authenticator = Authenticator(
            self._base, reference.repository, credentials, self._transport, actions="pull,push"
        )

    def put_file(self, blob: Descriptor, path: str, on_progress: OnProgress) -> PushState:
        """See `ModelSink`."""
        with HashedFile(blob, path, on_progress) as source:
            state = self._put_blob(blob, source, path)
        on_progress(PushProgress(blob.digest, path, blob.size_bytes, blob.size_bytes, state))
        return state

    def finish(self, model: PackedModel, tag: str) -> None:
        """See `ModelSink`. The manifest goes there under its digest first, so that the tag never names half a push."""
        self._put_blob(model.config_descriptor, model.config, "config")
        if model.index_layer is not None:
            self._put_blob(model.index_layer, model.index, "block index")
        for name in (str(model.digest), tag):
            answer = self._put_manifest(name, model.manifest, OCI_MANIFEST)
            _check_told_digest(answer, model.digest, f"{self._origin} manifest {name}")

    def attach(self, referrer: Referrer, subject: Digest) -> None:
        """Store a manifest that refers to `subject`, and its blobs. A registry that does not keep lists of referrers gets the
        list from us, under the tag for it; two who do that at once may lose one of the two, hence the second look.

        Source: distribution-spec, "Pushing Manifests with Subject". Raises: RegistryError, DigestMismatchError.
        """
        for digest, data in referrer.blobs:
            self._put_blob(Descriptor("", digest, len(data)), data, "block index")
        answer = self._put_manifest(str(referrer.digest), referrer.manifest, OCI_MANIFEST)
        _check_told_digest(answer, referrer.digest, f"{self._origin} referrer")
        if answer.headers.get("OCI-Subject"):
            return
        for _ in range(_LIST_TRIES):
            listed = self._listed_referrers(subject)
            if any(entry.get("digest") == str(referrer.digest) for entry in listed):
                return
            entry = {
                "mediaType": OCI_MANIFEST,
                "digest": str(referrer.digest),
                "size": len(referrer.manifest),
                "artifactType": referrer.artifact_type,
            }
            index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [*listed, entry]}
            self._put_manifest(subject.path_name, json.dumps(index).encode(), OCI_INDEX)
        raise RegistryUnavailableError(
            f"{self._origin}: the list of referrers of {subject.short()} is changed by others again and again; try again"
        )

    def _listed_referrers(self, subject: Digest) -> list[dict[str, Any]]:
        url = f"{self._oras.prefix}://{self._container.manifest_url(subject.path_name)}"
        answer = self._ask("GET", url, headers={"Accept": OCI_INDEX}, most_bytes=MAX_MANIFEST_BYTES)
        if answer.status == http.HTTPStatus.NOT_FOUND:
            return []
        self._expect(answer, http.HTTPStatus.OK, "list of referrers")
        listed = loads_strict(answer.body, "list of referrers", MAX_MANIFEST_BYTES).get("manifests")
        if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
            raise RegistryError(f"{self._origin}: what is tagged {subject.path_name} is not a list of referrers")
        return listed

    def _put_manifest(self, name: str, data: bytes, media_type: str) -> _Answer:
        url = f"{self._oras.prefix}://{self._container.manifest_url(name)}"
        answer = self._ask("PUT", url, data=data, headers={"Content-Type": media_type})
        self._expect(answer, http.HTTPStatus.CREATED, f"manifest {name}")
        return answer

    def close(self) -> None:
        """See `ModelSink`."""
        self._oras.session.close()
        self._transport.close()

    def _put_blob(self, blob: Descriptor, source: HashedFile | bytes, what: str) -> PushState:
        if self._has_blob(blob.digest):
            return PushState.EXISTS
        start = f"{self._oras.prefix}://{self._container.upload_blob_url()}"
        answer = self._ask("POST", start, headers={"Content-Length": "0"})
        self._expect(answer, http.HTTPStatus.ACCEPTED, f"upload of {what}")
        location = self._upload_address(start, answer.headers.get("Location", ""))
        separator = "&" if urlsplit(location).query else "?"
        if isinstance(source, HashedFile) and blob.size_bytes == 0:
            source = source.read()  # requests takes a body of length 0 for no body at all
        answer = self._ask(
            "PUT",
            f"{location}{separator}digest={blob.digest}",
            data=source,
            headers={"Content-Type": "application/octet-stream"},
            answer_timeout_s=_ANSWER_TIMEOUT_S + blob.size_bytes / _COMMIT_BYTES_PER_S,
        )
        if answer.status == http.HTTPStatus.BAD_REQUEST and b"DIGEST_INVALID" in answer.body:
            raise DigestMismatchError(
                f"{self._origin}: {what}: the registry says that what it received is not {blob.digest.short()}, though it "
                "was when it was sent; check what is between here and the registry, then push again",
                expected=str(blob.digest),
                subject=what,
            )
        self._expect(answer, http.HTTPStatus.CREATED, f"upload of {what}")
        _check_told_digest(answer, blob.digest, f"{self._origin} {what}")
        return PushState.UPLOADED

    def _has_blob(self, digest: Digest) -> bool:
        """A registry that redirects to its object store has looked the blob up; asking there with HEAD may be refused."""
        url = f"{self._oras.prefix}://{self._container.get_blob_url(str(digest))}"
        answer = self._ask("HEAD", url)
        if answer.status == http.HTTPStatus.TOO_MANY_REQUESTS or answer.status >= 500:
            self._expect(answer, http.HTTPStatus.OK, f"blob {digest.short()}")
        if answer.status in _REDIRECTS:
            target = _join(url, answer.headers.get("Location", ""))
            if target and urlsplit(target).path == urlsplit(url).path:
                raise RegistryError(
                    f"registry {self._registry}: redirects to {redact_url(target)}; push to that address instead",
                    status=answer.status,
                )
            return True
        return answer.status == http.HTTPStatus.OK

    def _upload_address(self, start: str, location: str) -> str:
        """Absolute. Raises: RegistryError for none, or one that must not be used."""
        target = _join(start, location)
        parts = split_url(target)
        if not location or parts is None:
            raise RegistryError(
                f"{self._origin}: the registry gave no usable address to upload to ({redact_url(target)})"
            )
        if parts.scheme == "http" and self._oras.prefix == "https":
            raise RegistryError(
                f"{self._origin}: the registry wants the upload over plain HTTP ({redact_url(target)}); refused. Its "
                "administrator must tell it that it is reached over https (external URL, X-Forwarded-Proto)"
            )
        return target

    # --- requests -------------------------------------------------------------------------------------------------

    def _ask(
        self,
        method: str,
        url: str,
        *,
        data: HashedFile | bytes | None = None,
        headers: Mapping[str, str] | None = None,
        answer_timeout_s: float = _ANSWER_TIMEOUT_S,
        most_bytes: int = _MAX_ANSWER_BYTES,
    ) -> _Answer:
        """One request; after a refusal, and only with a body that can be sent twice, another one as somebody else.

        Raises: RegistryUnavailableError, RegistryAuthError (401, 403).
        """
        to_registry = _same_origin(url, self._base)
        age_s = _TOKEN_AGE_S if isinstance(data, HashedFile) else math.inf
        authorization = self._authenticator.current(age_s) if to_registry else _NOBODY
        while True:
            answer = self._send(method, url, data, headers, authorization, answer_timeout_s, most_bytes)
            if answer.status not in (http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN):
                if to_registry:
                    self._authenticator.worked(authorization)
                return answer
            another = None
            if to_registry and not isinstance(data, HashedFile):
                challenges = parse_challenges(answer.headers.get("WWW-Authenticate", ""))
                another = self._authenticator.after_refusal(authorization, answer.status, challenges)
            if another is None:
                raise self._refused(answer)
            authorization = another

    def _send(
        self,
        method: str,
        url: str,
        data: HashedFile | bytes | None,
        headers: Mapping[str, str] | None,
        authorization: Authorization,
        answer_timeout_s: float,
        most_bytes: int,
    ) -> _Answer:
        sent = {"Accept-Encoding": "identity", "User-Agent": "modelmount", **(headers or {})}
        if _same_origin(url, self._base):
            sent |= self._headers
        if authorization.header is not None:
            sent["Authorization"] = authorization.header
        # While a body is sent, urllib3 waits for the socket as long as for a connection.
        stall_s = _ANSWER_TIMEOUT_S if data else _CONNECT_TIMEOUT_S
        try:
            response = self._oras.session.request(
                method,
                url,
                data=data,
                headers=sent,
                stream=True,
                timeout=(stall_s, answer_timeout_s),
                allow_redirects=False,
            )
            try:
                body = response.raw.read(most_bytes, decode_content=False) or b""
            finally:
                response.close()
        except _NO_ANSWER as exc:
            raise self._unavailable(method, url, exc) from exc
        return _Answer(response.status_code, response.headers, body)

    # --- failures -------------------------------------------------------------------------------------------------

    def _expect(self, answer: _Answer, status: int, what: str) -> None:
        if answer.status == status:
            return
        message = (
            f"{self._origin}: {what}: the registry answered {answer.status}{_said(answer)}, expected {int(status)}"
        )
        if answer.status == http.HTTPStatus.NOT_FOUND:
            raise ModelNotFoundError(
                f"{message}; does the repository exist, and may it be pushed to?", status=answer.status
            )
        if answer.status == http.HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            raise RegistryError(
                f"{message}; the registry, or a proxy in front of it, limits uploads: raise its limit, or use smaller shards",
                status=answer.status,
            )
        if answer.status == http.HTTPStatus.TOO_MANY_REQUESTS or answer.status >= 500:
            raise RegistryUnavailableError(
                f"{message}; push again later, what is uploaded already is not sent again", status=answer.status
            )
        raise RegistryError(message, status=answer.status)

    def _refused(self, answer: _Answer) -> RegistryAuthError:
        challenges = parse_challenges(answer.headers.get("WWW-Authenticate", ""))
        wants = f" (it wants {', '.join(challenge.scheme for challenge in challenges)[:80]})" if challenges else ""
        hint = (
            "check the password, and that the user may push to this repository"
            if self._authenticator.has_credentials()
            else "log in with docker login, or give --username and --password-stdin"
        )
        return RegistryAuthError(
            f"{self._origin}: the registry answered {answer.status}{_said(answer)}{wants}; {hint}", status=answer.status
        )

    def _unavailable(self, method: str, url: str, error: Exception) -> RegistryUnavailableError:
        return RegistryUnavailableError(
            f"registry {self._registry}: {method} {redact_url(url)} failed: {_reason(error)}; {_hint(error)}"
        )


def _own_host(reference: Reference, hosts: Sequence[RegistryHost]) -> RegistryHost:
    """The registry's own entry, which is the last. Raises: RegistryError."""
    host = hosts[-1] if hosts else own_host(reference.registry)
    if "push" not in host.capabilities or host.path != "/v2":
        raise RegistryError(
            f"registry {reference.registry}: its hosts.toml does not allow pushing to {host.authority}{host.path}; expected "
            "the capability 'push' and a path of /v2; correct its 'server', or push without --registry-config-dir"
        )
    return host


def _join(base: str, location: str) -> str:
    """The absolute form of a Location header; empty for a malformed one."""
    try:
        return urljoin(base, location)
    except ValueError:
        return ""


def _same_origin(url: str, base: str) -> bool:
    """The same scheme, host and port: where credentials may go."""
    here, there = split_url(url), split_url(base)
    if here is None or there is None:
        return False
    default = 443 if here.scheme == "https" else 80
    return (here.scheme, here.hostname, here.port or default) == (there.scheme, there.hostname, there.port or default)


def _said(answer: _Answer) -> str:
    """` (CODE: message)` of the registry's first error, cut."""
    with contextlib.suppress(ValueError, KeyError, IndexError, TypeError, RecursionError):
        first = json.loads(answer.body)["errors"][0]
        text = f"{first['code']}: {first.get('message', '')}"[:200]
        return " (" + "".join(c if c.isprintable() else "?" for c in text) + ")"
    return ""


def _check_told_digest(answer: _Answer, digest: Digest, what: str) -> None:
    told = answer.headers.get("Docker-Content-Digest", "")
    if told and told != str(digest) and told.startswith(f"{digest.algorithm}:"):
        raise DigestMismatchError(
            f"{what}: the registry stored {told[:80]}, expected {digest}; check the registry, then push again",
            expected=str(digest),
            actual=told[:200],
            subject=what,
        )


def _reason(error: BaseException) -> str:
    """The innermost plain reason: `requests` and `urllib3` wrap it several times."""
    found = type(error).__name__
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, requests.exceptions.Timeout | TimeoutError):
            return "no answer in time"
        if isinstance(seen, ssl.SSLError):
            return str(getattr(seen, "verify_message", "") or seen.reason or seen)
        if isinstance(seen, OSError) and seen.strerror:
            found = seen.strerror
        seen = seen.__cause__ or seen.__context__
    return found


def _hint(error: Exception) -> str:
    if isinstance(error, requests.exceptions.SSLError):
        return "check its certificate and this machine's CAs; a registry without TLS needs --plain-http"
    if isinstance(error, requests.exceptions.Timeout):
        return "push again, what is uploaded already is not sent again"
    return "is the address right, and the registry running?"
