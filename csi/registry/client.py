"""A repository in a registry as a `ModelSource`.

Everything a registry answers is checked against what was asked: manifest bytes against their digest, ranges against
Content-Range and the descriptor's size. Blobs' bytes are handed on unverified; the caller checks them.

No retries here but two that change nothing for the caller: a stale idle connection, and a redirect target that has
expired. When to try again is the caller's decision.

Source: distribution-spec, "Pulling manifests" and "Pulling blobs"; RFC 9110 sections 14 and 15.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Mapping
from urllib.parse import urljoin

from csi.credentials import Credentials
from csi.errors import (
    DigestMismatchError,
    InvalidVolumeError,
    ModelMountError,
    ModelNotFoundError,
    RegistryAuthError,
    RegistryError,
    RegistryUnavailableError,
    SizeMismatchError,
)
from csi.oci import manifest as oci
from csi.oci.digest import Digest
from csi.oci.reference import Reference
from csi.registry.address_rules import MAX_REDIRECTS, AddressRules
from csi.registry.auth import Authenticator
from csi.registry.headers import parse_challenges, parse_content_range, parse_retry_after, parse_size
from csi.registry.transport import Response, Transport
from csi.stream.ports import ManifestBytes, RangeReader

_ACCEPT = ", ".join((oci.OCI_MANIFEST, oci.OCI_INDEX, oci.DOCKER_MANIFEST, oci.DOCKER_LIST))
_API_HOSTS = {"docker.io": "registry-1.docker.io", "index.docker.io": "registry-1.docker.io"}
_MAX_ERROR_BODY = 8192
_MAX_SKIP_BYTES = 1024 * 1024


class RegistrySource:
    """Thread-safe. `reference` names the repository; its tag and digest are not used."""

    def __init__(self, reference: Reference, rules: AddressRules, authenticator: Authenticator, transport: Transport):
        self._registry, self._repository = reference.registry, reference.repository
        self._rules, self._authenticator, self._transport = rules, authenticator, transport
        self._base = f"{base_url(self._registry, rules)}/v2/{self._repository}"
        self._lock = threading.Lock()
        self._resolved: dict[Digest, str] = {}
        """Where a blob was redirected to; used until that address refuses."""

    @property
    def origin(self) -> str:
        """`registry/repository`."""
        return f"{self._registry}/{self._repository}"

    def replace_credentials(self, credentials: Credentials) -> None:
        """Use other credentials from now on; cached redirects stay."""
        self._authenticator.replace(credentials)

    def close(self) -> None:
        """See `ModelSource.close`."""
        self._transport.close()

    def fetch_manifest(self, tag: str | None, digest: Digest | None, timeout_s: float) -> ManifestBytes:
        """See `ModelSource.fetch_manifest`."""
        name = str(digest) if digest else (tag or "latest")
        subject = f"{self.origin}{'@' if digest else ':'}{name}"
        deadline = time.monotonic() + timeout_s
        response = self._get(f"{self._base}/manifests/{name}", {"Accept": _ACCEPT}, subject, timeout_s)
        try:
            self._expect_ok(response, subject)
            if (encoding := response.headers.get("Content-Encoding", "identity").lower()) != "identity":
                raise RegistryError(
                    f"{subject}: the registry sent its manifest {encoding}-encoded; expected it as it is"
                )
            data = _read_body(response, oci.MAX_MANIFEST_BYTES + 1, subject, deadline)
        finally:
            response.finish()
        if len(data) > oci.MAX_MANIFEST_BYTES:
            raise SizeMismatchError(
                f"{subject}: the manifest is larger than {oci.MAX_MANIFEST_BYTES} bytes",
                expected=oci.MAX_MANIFEST_BYTES,
                actual=len(data),
                subject=subject,
            )
        found = Digest.of(data, digest.algorithm if digest else "sha256")
        self._check_manifest(subject, digest, found, response.headers.get("Docker-Content-Digest"), data)
        return ManifestBytes(data, response.headers.get("Content-Type", ""), found)

    def open_range(self, digest: Digest, size_bytes: int, offset: int, length: int) -> RangeReader:
        """See `ModelSource.open_range`."""
        subject = f"{self.origin} blob {digest.short()}"
        headers = {"Range": f"bytes={offset}-{offset + length - 1}"}
        with self._lock:
            known = self._resolved.get(digest)
        response = None
        if known is not None:
            response = self._transport.get(known, headers)
            if response.status in (401, 403, 404, 410):  # the signed address has expired
                response.discard()
                with self._lock:
                    self._resolved.pop(digest, None)
                response = None
        if response is None:
            response = self._get(f"{self._base}/blobs/{digest}", headers, subject, None, remember=digest)
        try:
            return self._range_reader(response, subject, size_bytes, offset, length)
        except BaseException:
            response.discard()
            raise

    def _get(
        self,
        url: str,
        headers: Mapping[str, str],
        subject: str,
        timeout_s: float | None,
        remember: Digest | None = None,
    ) -> Response:
        """GET with authorization and redirects. The answer may have any final status but a redirect."""
        authorization = self._authenticator.current()
        with_credentials = True
        redirects = 0
        while redirects <= MAX_REDIRECTS:
            sent = dict(headers)
            if with_credentials and authorization.header is not None:
                sent["Authorization"] = authorization.header
            response = self._transport.get(url, sent, timeout_s)
            if response.status in (401, 403) and with_credentials:
                challenges = parse_challenges(", ".join(response.headers.get_all("WWW-Authenticate", [])))
                try:
                    another = self._authenticator.after_refusal(authorization, response.status, challenges)
                except BaseException:
                    response.discard()
                    raise
                if another is not None:
                    response.discard()
                    authorization = another
                    continue
            elif with_credentials:
                self._authenticator.worked(authorization)
            if response.status not in (301, 302, 303, 307, 308):
                return response
            location = response.headers.get("Location", "")
            response.discard()
            target = urljoin(url, location)
            same_place = self._rules.redirect(url, target)
            with_credentials = with_credentials and same_place
            if remember is not None and not with_credentials:
                with self._lock:
                    self._resolved[remember] = target
            url = target
            redirects += 1
        raise RegistryError(f"{subject}: more than {MAX_REDIRECTS} redirects")

    def _range_reader(
        self, response: Response, subject: str, size_bytes: int, offset: int, length: int
    ) -> _HttpRangeReader:
        if response.status not in (200, 206):
            self._expect_ok(response, subject)
        encoding = response.headers.get("Content-Encoding", "identity").lower()
        if encoding != "identity":
            raise RegistryError(
                f"{subject}: sent {encoding}-encoded although identity was asked for; a proxy in between compresses: "
                "turn that off for /v2/"
            )
        body_bytes = parse_size(response.headers.get("Content-Length"))
        if response.status == 206:
            self._check_content_range(response.headers.get("Content-Range"), subject, size_bytes, offset, length)
            return _HttpRangeReader(response, subject, length)
        if body_bytes == size_bytes or (body_bytes is None and size_bytes == length):
            # Range was ignored: what comes is the whole blob.
            if offset > _MAX_SKIP_BYTES:
                raise RegistryError(
                    f"{subject}: the registry ignores Range requests and sent the whole blob; ModelMount cannot stream "
                    "from it: put a proxy with Range support in front, or use another registry"
                )
            reader = _HttpRangeReader(response, subject, offset + length)
            reader.skip(offset)
            return reader
        if body_bytes == length:  # a proxy that answers a range with 200: the bytes are those asked for
            return _HttpRangeReader(response, subject, length)
        raise SizeMismatchError(
            f"{subject}: the manifest says {size_bytes} bytes, the registry has {body_bytes}; check its storage, or push "
            "the model again",
            expected=size_bytes,
            actual=body_bytes,
            subject=subject,
        )

    def _check_content_range(self, header: str | None, subject: str, size_bytes: int, offset: int, length: int) -> None:
        parsed = parse_content_range(header or "")
        if parsed is None:
            raise RegistryError(f"{subject}: answered a range with Content-Range {(header or 'missing')[:80]!r}")
        first, last, total = parsed
        if total is not None and total != size_bytes:
            raise SizeMismatchError(
                f"{subject}: the manifest says {size_bytes} bytes, the registry has {total}; check its storage, or push "
                "the model again",
                expected=size_bytes,
                actual=total,
                subject=subject,
            )
        if (first, last) != (offset, offset + length - 1):
            raise RegistryError(f"{subject}: asked for bytes {offset}-{offset + length - 1}, was sent {first}-{last}")

    def _expect_ok(self, response: Response, subject: str) -> None:
        """Raises: the error that a final status other than 200 means."""
        if response.status == 200:
            return
        raise _status_error(response, subject, has_credentials=self._authenticator.has_credentials())

    def _check_manifest(
        self, subject: str, wanted: Digest | None, found: Digest, declared: str | None, data: bytes
    ) -> None:
        if wanted is not None and wanted != found:
            raise DigestMismatchError(
                f"{subject}: the registry sent a manifest that hashes to {found}; nothing of it was used; "
                "the registry or something in between serves wrong content",
                expected=str(wanted),
                actual=str(found),
                subject=subject,
            )
        try:
            told = Digest.parse(declared) if declared else None
        except InvalidVolumeError:
            told = None
        if told is not None and Digest.of(data, told.algorithm) != told:
            raise DigestMismatchError(
                f"{subject}: the registry calls this manifest {told.short()}, its bytes hash to {found.short()}",
                expected=str(told),
                actual=str(found),
                subject=subject,
            )


def base_url(registry: str, rules: AddressRules) -> str:
    """`scheme://host[:port]` of a registry's API; docker.io's is at another host than its name says."""
    return f"{rules.scheme_for(registry)}://{_API_HOSTS.get(registry, registry)}"


class _HttpRangeReader:
    """See `RangeReader`. `left` is what the body must still bring."""

    def __init__(self, response: Response, subject: str, length: int) -> None:
        self._response, self._subject, self._left = response, subject, length

    def readinto(self, buffer: memoryview) -> None:
        wanted = len(buffer)
        try:
            while buffer:
                count = self._response.readinto(buffer)
                if count == 0:
                    raise RegistryUnavailableError(
                        f"{self._subject}: the connection ended {self._left} bytes before the range did"
                    )
                self._left -= count
                buffer = buffer[count:]
        except TimeoutError as exc:
            raise RegistryUnavailableError(f"{self._subject}: stalled, {self._left} bytes before the end") from exc
        except (OSError, http.client.HTTPException, ValueError) as exc:
            raise RegistryUnavailableError(
                f"{self._subject}: the connection broke {self._left} of {wanted} bytes early ({type(exc).__name__})"
            ) from exc

    def skip(self, count: int) -> None:
        """Read and drop."""
        if count:
            self.readinto(memoryview(bytearray(count)))

    def close(self) -> None:
        if self._left == 0:
            self._response.finish()
        else:
            self._response.discard()


def _read_body(response: Response, limit_bytes: int, subject: str, deadline: float) -> bytes:
    parts, left = [], limit_bytes
    try:
        while left > 0 and (part := response.read(min(left, 256 * 1024))):
            parts.append(part)
            left -= len(part)
            if time.monotonic() > deadline:
                raise RegistryUnavailableError(f"{subject}: the manifest did not arrive in time")
    except (OSError, http.client.HTTPException) as exc:
        raise RegistryUnavailableError(f"{subject}: the connection broke ({type(exc).__name__})") from exc
    declared = parse_size(response.headers.get("Content-Length"))
    data = b"".join(parts)
    if declared is not None and len(data) < min(declared, limit_bytes):
        raise RegistryUnavailableError(f"{subject}: the registry sent {len(data)} of {declared} bytes")
    return data


def _status_error(response: Response, subject: str, *, has_credentials: bool) -> ModelMountError:
    status = response.status
    said = _registry_message(response)
    response.discard()
    if status == 404:
        return ModelNotFoundError(
            f"{subject}: not found{said}; check the name and the digest, and that it was pushed to this registry",
            status=status,
        )
    if status in (401, 403):
        hint = (
            "the credentials are wrong, or may not read this repository"
            if has_credentials
            else "it needs credentials: set nodePublishSecretRef to a secret with an entry for this registry (by hand: "
            "docker login, or --username)"
        )
        return RegistryAuthError(
            f"{subject}: the registry answered {status}{said}; {hint}",
            status=status,
            anonymous=None if has_credentials else 1,
        )
    if status in (408, 425, 429) or status >= 500:
        retry_after = parse_retry_after(response.headers.get("Retry-After", ""), time.time())
        return RegistryUnavailableError(
            f"{subject}: the registry answered {status}{said}; it is asked again",
            status=status,
            retry_after_s=None if retry_after is None else int(min(retry_after, 3600)),
        )
    return RegistryError(f"{subject}: the registry answered {status}{said}", status=status)


def _registry_message(response: Response) -> str:
    """Code and text of a registry's error body, cut; empty for anything else."""
    try:
        first = json.loads(response.read(_MAX_ERROR_BODY))["errors"][0]
        text = f"{first['code']}: {first.get('message', '')}"
    except (
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
        OSError,
        http.client.HTTPException,
        RecursionError,
    ):
        return ""
    return f" ({''.join(c for c in text if c.isprintable())[:200]})"
