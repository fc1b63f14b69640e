"""References: `registry[:port]/repository[:tag][@digest]` and `oci-layout:/directory[:tag][@digest]`.

Strict where people make mistakes: the registry must be written out (no silent docker.io), names are lower case,
and a digest, when given, decides; a tag beside it is only a label.

Source: distribution-spec, "Pulling manifests" (name and tag grammar); distribution/reference (host rule).
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from csi.errors import InvalidVolumeError
from csi.oci.digest import Digest

_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[(?P<ipv6>[0-9a-fA-F:.]+)\])(?::(?P<port>[0-9]{{1,5}}))?")
_MAX_LENGTH = 1024  # registry + repository ≤ 255 is advised by the spec; the digest may add 135

LAYOUT_SCHEME = "oci-layout:"
OCI_SCHEME = "oci://"


@dataclass(frozen=True, slots=True)
class Reference:
    """Where a model is. Exactly one of `registry` and `layout_dir` is set.

    A registry reference has a tag, a digest or both; a layout reference may have neither (a layout of one model).
    """

    registry: str
    repository: str
    tag: str | None
    digest: Digest | None
    layout_dir: str = ""

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Accepts an `oci://` prefix. A reference with neither tag nor digest gets the tag `latest`.

        Raises: InvalidVolumeError that says which part is wrong and what would be right.
        """
        shown = text[:200]
        if not text or len(text) > _MAX_LENGTH or text != text.strip() or not text.isprintable():
            raise _invalid(shown, "is empty, longer than 1024 characters, or has blanks or control characters")
        if text.startswith(LAYOUT_SCHEME):
            return cls._parse_layout(text[len(LAYOUT_SCHEME) :], shown)
        text = text.removeprefix(OCI_SCHEME)
        if "://" in text:
            raise _invalid(shown, "starts with a scheme that is not oci://")
        rest, digest = _split_digest(text)
        registry, slash, path = rest.partition("/")
        if not slash or not ("." in registry or ":" in registry or registry == "localhost"):
            raise _invalid(shown, "does not begin with a registry host (such as registry.example.com/)")
        if not _is_host(registry):
            raise _invalid(shown, f"has a malformed registry host {registry!r}")
        repository, tag = _split_tag(path, shown)
        if len(repository) > 255 or not _REPOSITORY.fullmatch(repository):
            raise _invalid(
                shown, f"has a malformed repository {repository!r} (lower-case letters, digits and . _ - between /)"
            )
        return cls(registry.lower(), repository, tag if tag or digest else "latest", digest)

    @classmethod
    def _parse_layout(cls, text: str, shown: str) -> Reference:
        head, slash, last = text.rpartition("/")
        last, digest = _split_digest(last)
        directory, tag = _split_tag(head + slash + last, shown)
        if not directory.startswith("/") or ".." in directory.split("/"):
            raise _invalid(shown, "needs an absolute directory after oci-layout:, without '..'")
        directory = directory.rstrip("/") or "/"
        if set(directory.rpartition("/")[2]) & set(":@"):  # could not be told from a tag or digest when written out
            raise _invalid(shown, "names a directory with ':' or '@' in its last part, where a tag or digest begins")
        return cls("", "", tag, digest, layout_dir=directory)

    @property
    def is_layout(self) -> bool:
        """True for an OCI image-layout directory on this node."""
        return bool(self.layout_dir)

    @property
    def origin(self) -> str:
        """Where the bytes come from, without version: `registry/repository` or `oci-layout:/directory`."""
        return f"{LAYOUT_SCHEME}{self.layout_dir}" if self.is_layout else f"{self.registry}/{self.repository}"

    def with_digest(self, digest: Digest) -> Reference:
        """The same place, pinned to `digest`; the tag stays as a label."""
        return Reference(self.registry, self.repository, self.tag, digest, self.layout_dir)

    def __str__(self) -> str:
        text = self.origin
        if self.tag:
            text += f":{self.tag}"
        if self.digest:
            text += f"@{self.digest}"
        return text


def _invalid(shown: str, problem: str) -> InvalidVolumeError:
    return InvalidVolumeError(
        f"reference {shown!r} {problem}; expected registry/repository:tag or registry/repository@sha256:<hex>",
        field="reference",
    )


def _is_host(registry: str) -> bool:
    host = _HOST.fullmatch(registry)
    if host is None or (host["port"] and not 0 < int(host["port"]) < 65536):
        return False
    if host["ipv6"]:
        try:
            ipaddress.IPv6Address(host["ipv6"])
        except ValueError:
            return False
    return len(registry) <= 255


def _split_digest(text: str) -> tuple[str, Digest | None]:
    rest, at, digest_text = text.partition("@")
    return (rest, Digest.parse(digest_text)) if at else (rest, None)


def _split_tag(path: str, shown: str) -> tuple[str, str | None]:
    head, slash, last = path.rpartition("/")
    name, colon, tag = last.partition(":")
    if not colon:
        return path, None
    if not _TAG.fullmatch(tag):
        raise _invalid(shown, f"has a malformed tag {tag!r}")
    return head + slash + name, tag
