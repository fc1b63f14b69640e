"""What of a model a volume shows: which variant of an index, which directory, which files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from csi.errors import InvalidVolumeError, UnsupportedModelError
from csi.oci.globs import Globs
from csi.oci.paths import check_member_path

KEYS = ("variant", "subPath", "files")
_MAX_VARIANT_LENGTH = 512


@dataclass(frozen=True, slots=True)
class View:
    """All of it by default. `variant` is a selector (see `csi.oci.formats.index.pick`), `sub_path` the directory that
    becomes the volume's root, `files` which files below it there are.
    """

    variant: str = ""
    sub_path: str = ""
    files: Globs = field(default_factory=Globs)

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> View:
        """From a mapping that may have KEYS, each a text; absent and empty are the same. Inverse of `texts`.

        Raises: InvalidVolumeError naming the key.
        """
        variant, sub_path, files = (given.get(key, "") for key in KEYS)
        for key, text in zip(KEYS, (variant, sub_path, files), strict=True):
            if not isinstance(text, str) or not text.isprintable():
                raise InvalidVolumeError(f"{key} is not a text of printable characters", field=key)
        if len(variant) > _MAX_VARIANT_LENGTH:
            raise InvalidVolumeError(f"variant has more than {_MAX_VARIANT_LENGTH} characters", field="variant")
        if sub_path:
            try:
                sub_path = check_member_path(sub_path.rstrip("/"), "subPath")
            except UnsupportedModelError:
                raise InvalidVolumeError(
                    f"subPath {sub_path[:200]!r}: expected a directory of the model, relative, without '..'",
                    field="subPath",
                ) from None
        return cls(variant.strip(), sub_path, Globs.parse(files) if files else Globs())

    def __bool__(self) -> bool:
        """Whether it is less than the whole model, or one of several."""
        return bool(self.variant or self.sub_path or self.files)

    @property
    def texts(self) -> dict[str, str]:
        """What `parse` takes, without what is empty. Equal views, equal texts."""
        values = (self.variant, self.sub_path, ",".join(self.files.patterns))
        return {key: value for key, value in zip(KEYS, values, strict=True) if value}


WHOLE_MODEL = View()
"""Everything, of the only variant."""
