"""Names for files of formats that have none: by media type, numbered where a type comes more than once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from csi.oci.descriptor import Descriptor
from csi.oci.digest import Digest


class MadeUpNames:
    """`names` maps a media type to the name of its only layer, and a pattern with `number` (from 1) and `count` for
    several. A blob that is listed twice is one file.
    """

    def __init__(self, names: Mapping[str, tuple[str, str]], layers: Iterable[Descriptor]) -> None:
        by_type: dict[str, dict[Digest, None]] = {}
        for layer in layers:
            if layer.media_type.lower() in names:
                by_type.setdefault(layer.media_type.lower(), {})[layer.digest] = None
        self._names: dict[tuple[str, Digest], str] = {}
        for media_type, digests in by_type.items():
            only, pattern = names[media_type]
            for number, digest in enumerate(digests, 1):
                name = only if len(digests) == 1 else pattern.format(number=number, count=len(digests))
                self._names[media_type, digest] = name

    def of(self, layer: Descriptor) -> str | None:
        """None for a layer that was not among `layers`, or of a type without a name."""
        return self._names.get((layer.media_type.lower(), layer.digest))
