"""From our errors to gRPC status codes. Total over the tree of `csi.errors` (a test walks it).

kubelet treats CANCELLED, DEADLINE_EXCEEDED, UNAVAILABLE, RESOURCE_EXHAUSTED and ABORTED as "may have worked, will be
asked again"; every other code as final: it forgets the volume without calling NodeUnpublishVolume.

Source: CSI 1.13 spec, "Error Scheme" and the tables of each RPC; kubelet's volume plugin for CSI.
"""

from __future__ import annotations

import grpc

from csi import errors

_CODE: dict[type[errors.ModelMountError], grpc.StatusCode] = {
    errors.ModelMountError: grpc.StatusCode.INTERNAL,
    errors.InvalidVolumeError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.VolumeTooSmallError: grpc.StatusCode.OUT_OF_RANGE,
    errors.VolumeNotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.VolumeConflictError: grpc.StatusCode.ALREADY_EXISTS,
    errors.OperationPendingError: grpc.StatusCode.ABORTED,
    errors.ModelPreparingError: grpc.StatusCode.UNAVAILABLE,
    errors.RegistryError: grpc.StatusCode.INTERNAL,
    errors.ModelNotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.RegistryAuthError: grpc.StatusCode.UNAUTHENTICATED,
    errors.RegistryUnavailableError: grpc.StatusCode.UNAVAILABLE,
    errors.ContentError: grpc.StatusCode.DATA_LOSS,
    errors.DigestMismatchError: grpc.StatusCode.DATA_LOSS,
    errors.SizeMismatchError: grpc.StatusCode.DATA_LOSS,
    errors.UnsupportedModelError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.PolicyDeniedError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.CacheError: grpc.StatusCode.UNAVAILABLE,
    errors.MountError: grpc.StatusCode.INTERNAL,
    errors.DependencyMissingError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ControlError: grpc.StatusCode.UNAVAILABLE,
}


def status_of(error: errors.ModelMountError) -> grpc.StatusCode:
    """The code for an error. Raises: KeyError for a class without an entry (a bug a test finds)."""
    # Whoever came without credentials has none that could be wrong.
    if isinstance(error, errors.RegistryAuthError) and (
        error.fields.get("status") == 403 or "anonymous" in error.fields
    ):
        return grpc.StatusCode.PERMISSION_DENIED
    if isinstance(error, errors.MountError) and "target_path" in error.fields and "errno" not in error.fields:
        # The target is occupied: nothing broke, somebody must look at that directory.
        return grpc.StatusCode.FAILED_PRECONDITION
    return _CODE[type(error)]
