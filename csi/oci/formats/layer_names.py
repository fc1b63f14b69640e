"""What a layer's annotations say about the one file it is: name, time, mode. Every format uses the same few.

Source: model-spec docs/annotations.md (and its names before v0.0.7, `org.cnai.*`); OCI image-spec annotations.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from csi.errors import UnsupportedModelError
from csi.oci.descriptor import Descriptor
from csi.oci.formats.plan import LayerPlan
from csi.oci.paths import check_member_path

FILEPATH = "org.cncf.model.filepath"
METADATA = "org.cncf.model.file.metadata+json"
TITLE = "org.opencontainers.image.title"
HIDDEN_DIRECTORY = ".modelmount"
"""What lies below it in a model is ours, and not shown."""

_FILEPATHS = (FILEPATH, "org.cnai.model.filepath")
_METADATAS = (METADATA, "org.cnai.model.file.metadata+json", "org.cnai.model.file.metadata")
_MAX_METADATA_BYTES = 64 * 1024
_MTIME_LIMIT_S = 2**40  # beyond the year 36000 a producer is joking


def name_of(layer: Descriptor) -> str | None:
    """The layer's file name as its packer wrote it, unchecked: `org.cncf.model.filepath`, else `org.cnai.model.filepath`,
    else the name in its file metadata, else `org.opencontainers.image.title`. None where there is none of them.
    """
    for key in _FILEPATHS:
        if name := layer.annotations.get(key):
            return name
    name = metadata_of(layer).get("name")
    return name if name and isinstance(name, str) else layer.annotations.get(TITLE) or None


def contradiction(layer: Descriptor, what: str) -> str | None:
    """A warning for a layer that other programs show under another name than we do."""
    title = layer.annotations.get(TITLE)
    name = name_of(layer) if title else None
    if not title or not name or title == name:
        return None
    return f"{what}: named {name[:200]!r} here, and {title[:200]!r} by programs that look at {TITLE}"


def file_layer(layer: Descriptor, name: str, what: str, category: str = "") -> LayerPlan:
    """The layer as one file called `name`. Raises: UnsupportedModelError for a name that cannot be a path."""
    metadata = metadata_of(layer)
    return LayerPlan(
        descriptor=layer,
        path=check_member_path(name, what),
        mtime_s=_mtime_s(metadata.get("mtime")),
        executable=_is_executable(metadata.get("mode")),
        category=category,
    )


def unnamed(layer: Descriptor, what: str) -> UnsupportedModelError:
    """The refusal of a layer whose file nobody could find."""
    return UnsupportedModelError(
        f"{what}: the layer ({layer.media_type}) has no file name (annotation {FILEPATH} or {TITLE}); pack the model again",
        media_type=layer.media_type,
    )


def is_hidden(path: str) -> bool:
    """Ours: not part of the tree."""
    return path.split("/", 1)[0] == HIDDEN_DIRECTORY


def metadata_of(layer: Descriptor) -> Mapping[str, Any]:
    """The file metadata, as far as it can be read; empty otherwise. Optional information, in every format."""
    for key in _METADATAS:
        text = layer.annotations.get(key)
        if text is not None and len(text) <= _MAX_METADATA_BYTES:
            try:
                value = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict):
                return value
    return {}


def _is_executable(mode: object) -> bool:
    return isinstance(mode, int) and not isinstance(mode, bool) and 0 < mode < 2**32 and bool(mode & 0o111)


def _mtime_s(value: object) -> int:
    """Seconds of an RFC 3339 time; 0 for what is none, or lies before 1970. A time without a zone is UTC."""
    if not isinstance(value, str) or len(value) > 64:
        return 0
    try:
        time = datetime.fromisoformat(value)
        seconds = int(time.replace(tzinfo=time.tzinfo or UTC).timestamp())
    except (ValueError, OverflowError):
        return 0
    return seconds if 0 <= seconds < _MTIME_LIMIT_S else 0
