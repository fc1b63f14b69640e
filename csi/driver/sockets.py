"""Paths of the gRPC sockets kubelet connects to."""

from __future__ import annotations

import os
import socket

from csi.errors import ControlError, InvalidVolumeError

DRIVER_NAME = "csi.modelmount.dev"
_SUN_PATH_MAX = 107  # bytes, unix(7); kubelet connects by the plain path, so there is no way around it


def endpoint_path(endpoint: str) -> str:
    """The path of a `unix:` endpoint. Raises: InvalidVolumeError for any other, or one too long for a socket."""
    path = endpoint.removeprefix("unix://") if endpoint.startswith("unix://") else endpoint.removeprefix("unix:")
    if endpoint == path or not path.startswith("/"):
        raise InvalidVolumeError(
            f"CSI endpoint {endpoint!r}: expected unix:///absolute/path.sock (CSI_ENDPOINT or --endpoint)",
            field="endpoint",
        )
    return short_enough(path)


def registration_paths(directory: str) -> tuple[str, str]:
    """The registration socket, and its hidden name until it answers: kubelet passes over hidden files.

    Raises: InvalidVolumeError when they are too long for a socket.
    """
    name = f"{DRIVER_NAME}-reg.sock"
    return short_enough(os.path.join(directory, name)), short_enough(os.path.join(directory, f".{name}"))


def short_enough(path: str) -> str:
    """`path`. Raises: InvalidVolumeError when no socket can have it."""
    if len(os.fsencode(path)) > _SUN_PATH_MAX:
        raise InvalidVolumeError(
            f"socket path {path!r} has {len(os.fsencode(path))} bytes; the kernel allows {_SUN_PATH_MAX}: choose a "
            "shorter directory",
            field="endpoint",
        )
    return path


def clear_socket(path: str) -> None:
    """Remove a socket nobody listens on. Raises: ControlError when somebody does."""
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except FileNotFoundError:
            return
        except OSError:
            os.unlink(path)
            return
    raise ControlError(f"another CSI driver listens on {path}; stop it, or choose another --endpoint")
