"""Where the blobs of a mount come from: from the model's own registries, any of which will do, and those of a parent kit
from the parent's repository alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from csi.errors import ControlError
from csi.oci.digest import Digest
from csi.stream.ports import ManifestBytes, ModelSource, RangeReader
from csi.tree.model import BlobSpec


@dataclass(frozen=True, slots=True)
class Origins:
    """`parents` by origin (`registry/repository`)."""

    own: Sequence[ModelSource] = ()
    parents: Mapping[str, ModelSource] = field(default_factory=dict)

    def all(self) -> list[ModelSource]:
        """Every source."""
        return [*self.own, *self.parents.values()]

    def of(self, origin: str) -> Sequence[ModelSource]:
        """The sources for one blob; an empty origin is the model's own. Raises: ControlError for one that is not known."""
        if not origin:
            return self.own
        if origin not in self.parents:
            raise ControlError(f"fetcher: nothing of this mount comes from {origin}")
        return [self.parents[origin]]

    def for_blobs(self, specs: Sequence[BlobSpec]) -> Sequence[ModelSource]:
        """Sources that each have all of these blobs, by asking for every blob where it is."""
        elsewhere = {spec.digest: self.of(spec.origin)[0] for spec in specs if spec.origin}
        return [_RoutedSource(source, elsewhere) for source in self.own] if elsewhere else self.own


class _RoutedSource:
    """A `ModelSource` that has some blobs of other repositories too. Closing those is their holder's business."""

    def __init__(self, own: ModelSource, elsewhere: Mapping[Digest, ModelSource]) -> None:
        self._own, self._elsewhere = own, elsewhere

    @property
    def origin(self) -> str:
        """The model's own."""
        return self._own.origin

    def fetch_manifest(self, tag: str | None, digest: Digest | None, timeout_s: float) -> ManifestBytes:
        """The model's own. See `ModelSource`."""
        return self._own.fetch_manifest(tag, digest, timeout_s)

    def referrers(self, digest: Digest, artifact_type: str, timeout_s: float) -> tuple[Digest, ...]:
        """Of the model's own. See `ModelSource`."""
        return self._own.referrers(digest, artifact_type, timeout_s)

    def open_range(self, digest: Digest, size_bytes: int, offset: int, length: int) -> RangeReader:
        """See `ModelSource`."""
        return self._elsewhere.get(digest, self._own).open_range(digest, size_bytes, offset, length)

    def close(self) -> None:
        """See `ModelSource`."""
        self._own.close()
