"""Which manifest of an index is the model. Never a guess: where several could be meant, the error lists them.

No standard says how a quantization or a precision is chosen, so a volume may name its variant: by an annotation, a type, a
platform or a digest, whatever the packer wrote.

Source: OCI image-spec image-index.md; attestations as BuildKit lists them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from csi.errors import UnsupportedModelError
from csi.oci.digest import Digest
from csi.oci.manifest import Index, IndexEntry, Manifest, attachment_refused, parse

MAX_DEPTH = 4
"""How many indexes may lie in each other."""

_MAX_LISTED = 8
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}


class SentManifest(Protocol):
    """The bytes of a manifest or an index, and what its registry calls them."""

    @property
    def data(self) -> bytes: ...

    @property
    def media_type(self) -> str: ...


_Sent = TypeVar("_Sent", bound=SentManifest)


def chosen(root: _Sent, selector: str, fetch: Callable[[Digest], _Sent]) -> tuple[_Sent, Manifest]:
    """The one manifest that `root` is or leads to on this machine: bytes and content. `fetch` gets another manifest of the
    same repository.

    Raises: as `pick`, `csi.oci.manifest.parse` and `fetch`; UnsupportedModelError for a selector where there is no index,
    and for more than MAX_DEPTH indexes in each other.
    """
    platform = platform_of(os.uname().sysname, os.uname().machine)
    sent = root
    for depth in range(MAX_DEPTH + 1):
        parsed = parse(sent.data, sent.media_type)
        if isinstance(parsed, Manifest):
            if selector and not depth:
                raise UnsupportedModelError("manifest: a single model, not an index; leave out 'variant'")
            return sent, parsed
        entry = pick(parsed, selector if not depth else "", platform)
        sent = fetch(entry.descriptor.digest)
    raise UnsupportedModelError(f"more than {MAX_DEPTH} indexes lie in each other; name the model by digest")


def platform_of(system: str, machine: str) -> str:
    """`Linux`, `x86_64` (as uname says) → `linux/amd64`, as indexes say."""
    return f"{system.lower()}/{_ARCHITECTURES.get(machine, machine)}"


def pick(index: Index, selector: str, platform: str) -> IndexEntry:
    """The one entry that `selector` (empty: none) leaves over; else the one for `platform` where every candidate has a
    platform; else the only candidate. Signatures, attestations and the like are never candidates.

    A selector is a list of terms, separated by commas, that must all fit: `key=value` for an annotation (whose name may be
    shortened to what follows a dot or slash in it), anything else for a digest, an artifact type, a platform or the value
    of any annotation.

    Raises: UnsupportedModelError listing the candidates where none or several are left.
    """
    candidates = [entry for entry in index.entries if entry.attachment is None]
    if not candidates:
        if index.entries and (what := index.entries[0].attachment):
            raise attachment_refused(what, index.media_type)
        raise UnsupportedModelError(
            "this reference is an index of no models; push the model again", media_type=index.media_type
        )
    chosen = candidates
    if selector:
        terms = [term.strip() for term in selector.split(",")]
        chosen = [entry for entry in candidates if all(_fits(entry, term) for term in terms)]
        if not chosen:
            raise _undecided(index, f"no manifest of it fits variant {selector[:200]!r}", candidates)
    if _several(chosen) and all(entry.platform for entry in chosen):
        here = [entry for entry in chosen if entry.platform == platform or entry.platform.startswith(f"{platform}/")]
        chosen = here or chosen
    if _several(chosen):
        why = f"{len(chosen)} of them fit variant {selector[:200]!r}" if selector else f"{len(chosen)} could be meant"
        raise _undecided(index, why, chosen)
    return chosen[0]


def _several(entries: Sequence[IndexEntry]) -> bool:
    """A manifest that is listed twice is one."""
    return len({entry.descriptor.digest for entry in entries}) > 1


def _fits(entry: IndexEntry, term: str) -> bool:
    annotations = entry.descriptor.annotations
    key, equals, value = term.partition("=")
    if equals:
        return any(
            text == value and (name == key or name.endswith((f".{key}", f"/{key}")))
            for name, text in annotations.items()
        )
    return term in (str(entry.descriptor.digest), entry.artifact_type, entry.platform, *annotations.values())


def _undecided(index: Index, why: str, candidates: Sequence[IndexEntry]) -> UnsupportedModelError:
    listed = "; ".join(entry.shown() for entry in candidates[:_MAX_LISTED])
    return UnsupportedModelError(
        f"this reference is an index of {len(index.entries)} manifests, and {why}; name one by digest, or by the "
        f"attribute 'variant': {listed}{'; …' if len(candidates) > _MAX_LISTED else ''}",
        media_type=index.media_type,
    )
