"""A repository in a registry as a `ModelSource`.

Everything a registry answers is checked against what was asked: manifest bytes against their digest, ranges against
Content-Range and the descriptor's size. Blobs' bytes are handed on unverified; the caller checks them.

Where a registry has several hosts (mirrors), one that fails, or does not have it, is followed by the next. No other
retries here but two that change nothing for the caller: a stale idle connection, and a redirect target that has
expired. When to try again is the caller's decision.

Source: distribution-spec, "Pulling manifests" and "Pulling blobs"; RFC 9110 sections 14 and 15.
"""

from __future__ import annotations

import http.client
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

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
from csi.registry.endpoint import Endpoint
from csi.registry.headers import parse_content_range, parse_retry_after, parse_size
from csi.registry.transport import Response
from csi.stream.ports import ManifestBytes, RangeReader

_ACCEPT = ", ".join((oci.OCI_MANIFEST, oci.OCI_INDEX, oci.DOCKER_MANIFEST, oci.DOCKER_LIST))
_MAX_ERROR_BODY = 8192
_MAX_REFERRERS = 16  # of one kind: more is somebody's attempt to keep us busy
_NO_REFERRERS_API = (400, 404, 405, 501)
_MAX_SKIP_BYTES = 1024 * 1024
_Answer = TypeVar("_Answer")

log = logging.getLogger(__name__)


class RegistrySource:
    """Thread-safe. `reference` names the repository; its tag and digest are not used. `endpoints` are asked in their
    order, the registry's own usually last, each for what it is said to be capable of.
    """

    def __init__(self, reference: Reference, endpoints: Sequence[Endpoint]):
        self._registry, self._repository = reference.registry, reference.repository
        self._endpoints = endpoints

    @property
    def origin(self) -> str:
        """`registry/repository`."""
        return f"{self._registry}/{self._repository}"

    def replace_credentials(self, credentials: Credentials) -> None:
        """Use other credentials from now on; cached redirects stay."""
        for endpoint in self._endpoints:
            if endpoint.host.gets_credentials:
                endpoint.authenticator.replace(credentials)

    def close(self) -> None:
        """See `ModelSource.close`."""
        for endpoint in self._endpoints:
            endpoint.close()

    def fetch_manifest(self, tag: str | None, digest: Digest | None, timeout_s: float) -> ManifestBytes:
        """See `ModelSource.fetch_manifest`."""
        name = str(digest) if digest else (tag or "latest")
        subject = f"{self.origin}{'@' if digest else ':'}{name}"
        deadline = time.monotonic() + timeout_s

        def fetch(endpoint: Endpoint, subject: str) -> ManifestBytes:
            left_s = max(deadline - time.monotonic(), 0.1)
            response = endpoint.get_manifest(name, {"Accept": _ACCEPT}, subject, left_s)
            return self._read_manifest(response, digest, subject, deadline, endpoint)

        return self._first("pull" if digest else "resolve", subject, fetch, deadline)

    def referrers(self, digest: Digest, artifact_type: str, timeout_s: float) -> tuple[Digest, ...]:
        """See `ModelSource.referrers`. A registry without the referrers API keeps the list under a tag made of the digest. Some
        say the config's media type for the artifact's.

        Source: distribution-spec, "Listing Referrers" and "Referrers Tag Schema".
        """
        subject = f"{self.origin} referrers of {digest.short()}"
        deadline = time.monotonic() + timeout_s

        def ask(endpoint: Endpoint, subject: str) -> tuple[Digest, ...]:
            left_s = max(deadline - time.monotonic(), 0.1)
            response = endpoint.get_referrers(digest, artifact_type, subject, left_s)
            if response.status in _NO_REFERRERS_API:
                response.discard()
                left_s = max(deadline - time.monotonic(), 0.1)
                response = endpoint.get_manifest(digest.path_name, {"Accept": oci.OCI_INDEX}, subject, left_s)
                if response.status == 404:
                    response.discard()
                    return ()
            listed = oci.parse_referrer(self._read_manifest(response, None, subject, deadline, endpoint).data)
            entries = listed.entries if isinstance(listed, oci.Index) else ()
            may_be = (artifact_type, "", oci.EMPTY_TYPE)
            found = sorted(
                (e for e in entries if e.artifact_type in may_be), key=lambda e: may_be.index(e.artifact_type)
            )
            return tuple(entry.descriptor.digest for entry in found[:_MAX_REFERRERS])

        return self._first("resolve", subject, ask, deadline)

    def open_range(self, digest: Digest, size_bytes: int, offset: int, length: int) -> RangeReader:
        """See `ModelSource.open_range`."""
        headers = {"Range": f"bytes={offset}-{offset + length - 1}"}

        def open_one(endpoint: Endpoint, subject: str) -> RangeReader:
            response = endpoint.get_blob(digest, headers, subject)
            try:
                return self._range_reader(response, subject, digest, size_bytes, offset, length, endpoint)
            except BaseException:
                response.discard()
                raise

        return self._first("pull", f"{self.origin} blob {digest.short()}", open_one, blob=digest)

    def _first(
        self,
        capability: str,
        subject: str,
        ask: Callable[[Endpoint, str], _Answer],
        deadline: float = math.inf,
        blob: Digest | None = None,
    ) -> _Answer:
        """The first endpoint's answer that is one. Those that failed lately are asked only if no other is left, and so are
        those that have sent wrong bytes of `blob`.

        Raises: what the last of them said, which is the registry's own word where it was asked.
        """
        able = [endpoint for endpoint in self._endpoints if capability in endpoint.host.capabilities]
        trusted = [endpoint for endpoint in able if not endpoint.is_rejected(blob)] or able
        awake = [endpoint for endpoint in trusted if not endpoint.rests()] or trusted
        error: ModelMountError | None = None
        for endpoint in awake:
            if error is not None and time.monotonic() > deadline:
                break
            try:
                answer = ask(
                    endpoint, f"{subject} at {endpoint.host.authority}" if endpoint.host.is_mirror else subject
                )
            except ModelMountError as exc:
                if self.origin not in exc.message:  # of the connection, perhaps to where a redirect led
                    exc.message = f"{subject}: {exc.message}"
                if isinstance(exc, RegistryUnavailableError):
                    endpoint.failed(exc)
                elif isinstance(exc, DigestMismatchError):
                    endpoint.reject(None)
                if endpoint is not awake[-1]:
                    log.info("%s; the next host is asked", exc)
                error = exc
            else:
                endpoint.works()
                return answer
        raise error or RegistryError(
            f"{subject}: none of the registry's {len(self._endpoints)} hosts may be asked to {capability}; an administrator "
            "of this node corrects the capabilities in its hosts.toml"
        )

    def _read_manifest(
        self, response: Response, digest: Digest | None, subject: str, deadline: float, endpoint: Endpoint
    ) -> ManifestBytes:
        try:
            self._expect_ok(response, subject, endpoint)
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

    def _range_reader(
        self,
        response: Response,
        subject: str,
        digest: Digest,
        size_bytes: int,
        offset: int,
        length: int,
        endpoint: Endpoint,
    ) -> _HttpRangeReader:
        if response.status not in (200, 206):
            self._expect_ok(response, subject, endpoint)
        encoding = response.headers.get("Content-Encoding", "identity").lower()
        if encoding != "identity":
            raise RegistryError(
                f"{subject}: sent {encoding}-encoded although identity was asked for; a proxy in between compresses: "
                "turn that off for /v2/"
            )
        body_bytes = parse_size(response.headers.get("Content-Length"))
        if response.status == 206:
            self._check_content_range(response.headers.get("Content-Range"), subject, size_bytes, offset, length)
            return _HttpRangeReader(response, subject, digest, length, endpoint)
        if body_bytes == size_bytes or (body_bytes is None and size_bytes == length):
            # Range was ignored: what comes is the whole blob.
            if offset > _MAX_SKIP_BYTES:
                endpoint.cannot_serve_ranges()
                raise RegistryError(
                    f"{subject}: the registry ignores Range requests and sent the whole blob; ModelMount cannot stream "
                    "from it: put a proxy with Range support in front, or use another registry"
                )
            reader = _HttpRangeReader(response, subject, digest, offset + length, endpoint)
            reader.skip(offset)
            return reader
        if body_bytes == length:  # a proxy that answers a range with 200: the bytes are those asked for
            return _HttpRangeReader(response, subject, digest, length, endpoint)
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

    def _expect_ok(self, response: Response, subject: str, endpoint: Endpoint) -> None:
        """Raises: the error that a final status other than 200 means."""
        if response.status != 200:
            raise _status_error(response, subject, has_credentials=endpoint.authenticator.has_credentials())

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


class _HttpRangeReader:
    """See `RangeReader`. `left` is what the body must still bring."""

    def __init__(self, response: Response, subject: str, digest: Digest, length: int, endpoint: Endpoint) -> None:
        self._response, self._subject, self._left, self._endpoint = response, subject, length, endpoint
        self._digest = digest

    def readinto(self, buffer: memoryview) -> None:
        wanted = len(buffer)
        try:
            while buffer:
                count = self._response.readinto(buffer)
                if count == 0:
                    raise RegistryUnavailableError(
                        f"{self._subject}: the connection ended {self._left} bytes before the range did; is there a "
                        "proxy with a limit in between?"
                    )
                self._left -= count
                buffer = buffer[count:]
        except RegistryUnavailableError as exc:
            self._endpoint.failed(exc)
            raise
        except TimeoutError as exc:
            raise self._broken(f"stalled, {self._left} bytes before the end: {exc}") from exc
        except (OSError, http.client.HTTPException, ValueError) as exc:
            raise self._broken(
                f"the connection broke {self._left} of {wanted} bytes early ({type(exc).__name__})"
            ) from exc

    def _broken(self, problem: str) -> RegistryUnavailableError:
        error = RegistryUnavailableError(f"{self._subject}: {problem}")
        self._endpoint.failed(error)
        return error

    def skip(self, count: int) -> None:
        """Read and drop."""
        if count:
            self.readinto(memoryview(bytearray(count)))

    def reject(self) -> None:
        self._endpoint.reject(self._digest)
        log.warning("%s: wrong bytes; this host is not asked for them again", self._subject)

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
        hint = (
            "it limits how often it is asked: use a mirror, or an account with a higher limit"
            if status == 429
            else "it, or a proxy before it, is out of order: see its log"
        )
        wait = "" if retry_after is None else f" and wants to be asked again in {retry_after:.0f} s"
        return RegistryUnavailableError(
            f"{subject}: the registry answered {status}{said}{wait}; {hint}",
            status=status,
            retry_after_s=None if retry_after is None else int(min(retry_after, 3600)),
        )
    return RegistryError(f"{subject}: the registry answered {status}{said}", status=status)


def _registry_message(response: Response) -> str:
    """Code and text of a registry's error body, cut; empty for anything else. A body that does not announce itself as a
    small one is not waited for: docker-registry 2.8.2 announces the whole blob after a 416, and sends less.
    """
    if response.status == 416 or (parse_size(response.headers.get("Content-Length")) or 0) > _MAX_ERROR_BODY:
        return ""
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
