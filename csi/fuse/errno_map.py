"""From our errors to what a reader of the mount sees. Total over the tree of `csi.errors` (a test walks it).

EIO is the last resort of a read; never EACCES there, which loaders take for a configuration mistake.
"""

from __future__ import annotations

import errno

from csi import errors

_ERRNO: dict[type[errors.ModelMountError], int] = {
    errors.ModelMountError: errno.EIO,
    errors.InvalidVolumeError: errno.EIO,
    errors.VolumeTooSmallError: errno.EIO,
    errors.VolumeNotFoundError: errno.EIO,
    errors.VolumeConflictError: errno.EIO,
    errors.OperationPendingError: errno.EIO,
    errors.ModelPreparingError: errno.EIO,
    errors.RegistryError: errno.EIO,
    errors.ModelNotFoundError: errno.EIO,
    errors.RegistryAuthError: errno.EIO,
    errors.RegistryUnavailableError: errno.EIO,
    errors.ContentError: errno.EIO,
    errors.DigestMismatchError: errno.EIO,
    errors.SizeMismatchError: errno.EIO,
    errors.UnsupportedModelError: errno.EIO,
    errors.PolicyDeniedError: errno.EIO,
    errors.CacheError: errno.EIO,
    errors.MountError: errno.EIO,
    errors.DependencyMissingError: errno.EIO,
    errors.ControlError: errno.EIO,
}


def read_errno(error: errors.ModelMountError) -> int:
    """The errno of a failed read. Raises: KeyError for a class without an entry (a bug a test finds)."""
    return _ERRNO[type(error)]
