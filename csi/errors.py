"""Every error ModelMount raises on purpose, as one tree.

    ModelMountError
    ├── InvalidVolumeError          the request itself is wrong (field named)
    ├── VolumeTooSmallError         the model is larger than the volume may be
    ├── VolumeNotFoundError         no such volume, or not there
    ├── VolumeConflictError         published already, differently
    ├── OperationPendingError       the same volume or target is being worked on
    ├── ModelPreparingError         layers must be read before the model can be mounted; it goes on meanwhile
    ├── RegistryError
    │   ├── ModelNotFoundError      404: no such repository, tag or digest
    │   ├── RegistryAuthError       401 / 403
    │   └── RegistryUnavailableError  timeout, reset, 429, 5xx
    ├── ContentError
    │   ├── DigestMismatchError     bytes do not hash to their digest
    │   ├── SizeMismatchError       more or fewer bytes than the descriptor says
    │   └── UnsupportedModelError   a manifest, media type or name we do not mount
    ├── PolicyDeniedError           a rule of the cluster says no
    ├── CacheError                  node cache trouble; a reader never sees it
    ├── MountError                  mount(2), /dev/fuse, keeper
    ├── DependencyMissingError      what this process cannot work without is not there
    └── ControlError                a process of ours did not answer, or not in our protocol

Classes carry what a program needs as fields; nobody parses a message. A message says what failed, on which
subject, what was expected and what came, and what to do next. It may reach a pod's author: no secrets, no host
paths beyond the target path, no URL queries.

The maps to gRPC codes (`csi.driver.status_map`) and errnos (`csi.fuse.errno_map`) are total over this tree.
Errors cross process boundaries as `to_wire` / `from_wire` values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class ModelMountError(Exception):
    """Root of the tree. `retryable`: the same call may succeed later without anybody changing anything."""

    retryable: ClassVar[bool] = False

    def __init__(self, message: str, **fields: str | int | None) -> None:
        super().__init__(message)
        self.message = message
        self.fields: dict[str, str | int] = {k: v for k, v in fields.items() if v is not None}

    def __str__(self) -> str:
        return self.message


class InvalidVolumeError(ModelMountError):
    """A field of the request is missing or malformed. Fields: `field`."""


class VolumeTooSmallError(ModelMountError):
    """The model does not fit the limit the volume was asked with. Fields: `limit_bytes`, `size_bytes`."""


class VolumeNotFoundError(ModelMountError):
    """No such volume, or it is not published there. Fields: `volume_id`."""


class VolumeConflictError(ModelMountError):
    """The target is published, or the volume made, already with other arguments. Fields: `target_path`, `volume_id`."""


class OperationPendingError(ModelMountError):
    """Another call works on the same target. Fields: `target_path`."""

    retryable = True


class ModelPreparingError(ModelMountError):
    """The model is not ready to be mounted; the work goes on and the next call joins it. Fields: `percent` (whole),
    `rate_bytes_s`, and `eta_s` once there is a rate.
    """

    retryable = True


class RegistryError(ModelMountError):
    """A registry refused or failed. Fields: `reference`, `status` where there is one."""


class ModelNotFoundError(RegistryError):
    """The registry has no such repository, tag or digest."""


class RegistryAuthError(RegistryError):
    """The registry wants (other) credentials. Fields: `status` 401 or 403; `anonymous` when there were none."""


class RegistryUnavailableError(RegistryError):
    """The registry did not answer, or answered 429 or 5xx."""

    retryable = True


class ContentError(ModelMountError):
    """What the registry sent is not what it should be."""


class DigestMismatchError(ContentError):
    """Fields: `expected`, `actual`, `subject`."""


class SizeMismatchError(ContentError):
    """Fields: `expected`, `actual` (bytes), `subject`."""


class UnsupportedModelError(ContentError):
    """The reference names something ModelMount does not mount. Fields: `media_type` or `path` where known."""


class PolicyDeniedError(ModelMountError):
    """A rule refuses the model. Fields: `rule`, `reason`."""


class CacheError(ModelMountError):
    """The node cache cannot be used (full disk, damage); callers treat it as a miss and count it."""


class MountError(ModelMountError):
    """A mount, unmount or bind failed. Fields: `target_path`, `errno` where there is one."""


class DependencyMissingError(ModelMountError):
    """What this process cannot work without is not there."""


class ControlError(ModelMountError):
    """A process of this node did not answer, or spoke another protocol version."""

    retryable = True


def _tree(cls: type[ModelMountError]) -> dict[str, type[ModelMountError]]:
    found = {cls.__name__: cls}
    for sub in cls.__subclasses__():
        found |= _tree(sub)
    return found


def all_error_classes() -> dict[str, type[ModelMountError]]:
    """Every class of the tree by name, root included."""
    return _tree(ModelMountError)


def to_wire(error: BaseException) -> dict[str, Any]:
    """A JSON value that `from_wire` turns back into the same error. Foreign exceptions become the root class."""
    if isinstance(error, ModelMountError):
        return {"kind": type(error).__name__, "message": error.message, "fields": error.fields}
    return {"kind": "ModelMountError", "message": f"internal error: {type(error).__name__}: {error}", "fields": {}}


def from_wire(value: Mapping[str, Any]) -> ModelMountError:
    """Inverse of `to_wire`. A class this process does not know (a newer peer) becomes the root class."""
    cls = all_error_classes().get(str(value.get("kind")), ModelMountError)
    return cls(str(value.get("message", "unknown error")), **dict(value.get("fields") or {}))
