"""Which volume capabilities a model can have: a mounted file system, any access mode, and mount options that are true
of every mount already.
"""

from __future__ import annotations

from csi.errors import InvalidVolumeError
from csi.wire import csi_pb2

MOUNT_FLAGS = frozenset({"ro", "nosuid", "nodev", "noexec", "noatime", "nodiratime"})
"""What a pod, PersistentVolume or StorageClass may ask for. Silently ignoring others would hide typing errors."""


def check_capability(capability: csi_pb2.VolumeCapability, field: str = "volume_capability") -> None:
    """Any access mode will do; the mount is read-only whatever it is.

    Raises: InvalidVolumeError naming the field.
    """
    if capability.HasField("block"):
        raise InvalidVolumeError(
            f"{field}: a model is a file system; ask for volumeMode Filesystem, not Block", field=f"{field}.block"
        )
    if not capability.HasField("mount"):
        raise InvalidVolumeError(f"{field}: access type mount is missing", field=f"{field}.mount")
    if not capability.HasField("access_mode") or not capability.access_mode.mode:
        raise InvalidVolumeError(f"{field}: access_mode is missing", field=f"{field}.access_mode")
    refused = sorted(set(capability.mount.mount_flags) - MOUNT_FLAGS)
    if refused:
        name = refused[0].partition("=")[0][:40]  # the CSI spec allows secrets in the values of mount flags
        raise InvalidVolumeError(
            f"mountOptions: {name!r} is not supported; allowed: {', '.join(sorted(MOUNT_FLAGS))}",
            field=f"{field}.mount.mount_flags",
        )


def described(capability: csi_pb2.VolumeCapability) -> list[object]:
    """What of it a repeated call must repeat, as a JSON value."""
    return [int(capability.access_mode.mode), capability.mount.fs_type, sorted(capability.mount.mount_flags)]
