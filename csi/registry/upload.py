"""Uploads, over the oras library: its names and session, our timeouts, streaming and checks.

What the adapter changes: every request has timeouts and no ambient credentials, proxies or cookies; Basic goes to
the registry itself and nowhere else; blobs stream from the file with a known length instead of being read whole;
a digest the registry reports is compared.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, BinaryIO
from urllib.parse import urljoin, urlsplit

import oras.container
import oras.provider
import requests

from csi.errors import (
    DigestMismatchError,
    ModelNotFoundError,
    RegistryAuthError,
    RegistryError,
    RegistryUnavailableError,
    SizeMismatchError,
)
from csi.oci.descriptor import Descriptor
from csi.oci.digest import Digest
from csi.oci.manifest import OCI_MANIFEST
from csi.oci.reference import Reference
from csi.registry.address_rules import AddressRules, redact_url
from csi.registry.auth import Credentials

_CONNECT_TIMEOUT_S, _ANSWER_TIMEOUT_S = 10.0, 120.0
_READ_BYTES = 1024 * 1024


class UploadState(StrEnum):
    """What became of a blob."""

    EXISTS = "exists"
    UPLOADED = "uploaded"


class _Registry(oras.provider.Registry):  # type: ignore[misc]
    """oras's registry with a request function of our own."""

    def __init__(self, authority: str, *, plain_http: bool, credentials: Credentials | None) -> None:
        super().__init__(hostname=authority, insecure=plain_http, auth_backend="basic")
        self.session.trust_env = False
        self._base = (self.prefix, authority)
        self._authorization = None
        if credentials is not None:
            userpass = f"{credentials.username}:{credentials.password}".encode()
            self._authorization = "Basic " + base64.b64encode(userpass).decode()

    def do_request(
        self,
        url: str,
        method: str = "GET",
        data: Any = None,
        headers: dict[str, str] | None = None,
        json: dict[str, Any] | None = None,
        stream: bool = False,
    ) -> requests.Response:
        """One request, without retries or redirects. Raises: RegistryUnavailableError, RegistryAuthError."""
        sent = dict(headers or {})
        parts = urlsplit(url)
        if self._authorization and (parts.scheme, parts.netloc) == self._base:
            sent["Authorization"] = self._authorization
        try:
            response: requests.Response = self.session.request(
                method,
                url,
                data=data,
                json=json,
                headers=sent,
                stream=stream,
                verify=self._tls_verify,
                timeout=(_CONNECT_TIMEOUT_S, _ANSWER_TIMEOUT_S),
                allow_redirects=False,
            )
        except requests.exceptions.SSLError as exc:
            raise RegistryUnavailableError(
                f"registry {self._base[1]}: TLS failed; if it speaks plain HTTP, say --plain-http"
            ) from exc
        except (requests.exceptions.RequestException, OSError) as exc:
            raise RegistryUnavailableError(
                f"registry {self._base[1]}: no answer to {method} {redact_url(url)} ({type(exc).__name__}); is it running?"
            ) from exc
        if response.status_code in (401, 403):
            wants = response.headers.get("WWW-Authenticate", "").partition(" ")[0] or "no known scheme"
            hint = "they may not push here" if self._authorization else "give --username and --password-stdin"
            raise RegistryAuthError(
                f"registry {self._base[1]}: answered {response.status_code} (wants {wants}); {hint}",
                status=response.status_code,
            )
        return response


@dataclass(frozen=True, slots=True)
class _ProgressFile:
    """A file object of known length for requests, which then neither buffers nor chunks the body."""

    file: BinaryIO
    length: int
    on_bytes: Callable[[int], None]

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[bytes]:
        while block := self.read(_READ_BYTES):
            yield block

    def read(self, size: int = -1) -> bytes:
        """More bytes per call than http.client asks for: fewer system calls."""
        block = self.file.read(max(size, _READ_BYTES) if size > 0 else _READ_BYTES)
        self.on_bytes(len(block))
        return block


class ModelUploader:
    """Uploads to one repository. Not thread-safe."""

    def __init__(self, reference: Reference, *, plain_http: bool, credentials: Credentials | None) -> None:
        rules = AddressRules(frozenset({reference.registry}) if plain_http else frozenset())
        self._plain_http = rules.scheme_for(reference.registry) == "http"
        self._registry = _Registry(reference.registry, plain_http=self._plain_http, credentials=credentials)
        self._container = oras.container.Container(f"{reference.registry}/{reference.repository}")
        self._origin = reference.origin

    def upload_file(self, blob: Descriptor, path: str, on_bytes: Callable[[int], None]) -> UploadState:
        """Upload a file as `blob` unless the repository has it. `on_bytes` is told the bytes sent, piece by piece.

        Raises: SizeMismatchError or DigestMismatchError when the file is not what was hashed; RegistryError.
        """
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != blob.size_bytes:
                raise SizeMismatchError(
                    f"{path}: changed while it was pushed ({blob.size_bytes} bytes when hashed, {size} now); push again",
                    expected=blob.size_bytes,
                    actual=size,
                    subject=path,
                )
            return self._upload(blob, file, on_bytes, path)

    def upload_bytes(self, blob: Descriptor, content: bytes) -> UploadState:
        """The same for bytes in memory (configs)."""
        return self._upload(blob, io.BytesIO(content), lambda count: None, "config")

    def upload_manifest(self, manifest: bytes, names: list[str]) -> Digest:
        """PUT the manifest under its digest and then under each of `names` (tags).

        Raises: RegistryError, DigestMismatchError.
        """
        digest = Digest.of(manifest)
        for name in [str(digest), *names]:
            url = f"{self._registry.prefix}://{self._container.manifest_url(name)}"
            response = self._registry.do_request(url, "PUT", data=manifest, headers={"Content-Type": OCI_MANIFEST})
            self._expect(response, (201,), f"manifest {name}")
            _check_told_digest(response, digest, f"{self._origin} manifest {name}")
        return digest

    def close(self) -> None:
        """Close the connections."""
        self._registry.session.close()

    def _upload(self, blob: Descriptor, file: BinaryIO, on_bytes: Callable[[int], None], what: str) -> UploadState:
        if self._registry.blob_exists({"digest": str(blob.digest)}, self._container):
            return UploadState.EXISTS
        url = f"{self._registry.prefix}://{self._container.upload_blob_url()}"
        session = self._registry.do_request(url, "POST", headers={"Content-Length": "0"})
        self._expect(session, (202,), f"upload of {what}")
        location = urljoin(url, session.headers.get("Location", ""))
        if urlsplit(location).scheme == "http" and not self._plain_http:
            raise RegistryError(f"{self._origin}: wants the upload over plain HTTP at {redact_url(location)}; refused")
        separator = "&" if urlsplit(location).query else "?"
        response = self._registry.do_request(
            f"{location}{separator}digest={blob.digest}",
            "PUT",
            data=_ProgressFile(file, blob.size_bytes, on_bytes) if blob.size_bytes else b"",
            headers={"Content-Type": "application/octet-stream", "Content-Length": str(blob.size_bytes)},
        )
        if response.status_code == 400 and "DIGEST_INVALID" in response.text[:4096]:
            raise DigestMismatchError(
                f"{what}: the registry received bytes that are not {blob.digest.short()}; did the file change while it "
                "was pushed? push again",
                expected=str(blob.digest),
                subject=what,
            )
        self._expect(response, (201,), f"upload of {what}")
        _check_told_digest(response, blob.digest, what)
        return UploadState.UPLOADED

    def _expect(self, response: requests.Response, statuses: tuple[int, ...], what: str) -> None:
        status = response.status_code
        if status in statuses:
            return
        said = ""
        with contextlib.suppress(ValueError, KeyError, IndexError, TypeError):
            first = response.json()["errors"][0]
            said = f" ({first['code']}: {str(first.get('message', ''))[:200]})"
        message = f"{self._origin}: {what}: the registry answered {status}{said}, expected {statuses[0]}"
        if status == 404:
            raise ModelNotFoundError(f"{message}; does the repository exist, and may it be pushed to?", status=status)
        if status == 413:
            raise RegistryError(
                f"{message}; a proxy in front limits the size of uploads: raise its limit", status=status
            )
        if status == 429 or status >= 500:
            raise RegistryUnavailableError(f"{message}; push again later: what was uploaded stays", status=status)
        raise RegistryError(message, status=status)


def _check_told_digest(response: requests.Response, digest: Digest, what: str) -> None:
    told = response.headers.get("Docker-Content-Digest")
    if told and told != str(digest):
        raise DigestMismatchError(
            f"{what}: the registry stored {told[:80]}, expected {digest}",
            expected=str(digest),
            actual=told,
            subject=what,
        )
