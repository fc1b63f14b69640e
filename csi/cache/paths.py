"""Where everything of the cache lies, relative to the cache directory. Imports nothing, as the keeper needs it too."""

from __future__ import annotations

VERSION = 2
"""Of the layout; see `csi.cache.format`."""
_SHARED_DOMAIN = "shared"  # csi.volume's, whose imports would cost the keeper 4 MiB


def domain_path(domain: str) -> str:
    """Where everything of a trust domain lies."""
    return f"v{VERSION}/{domain}"


def area_path(domain: str, mount_id: str) -> str:
    """Where the blobs of one mount lie."""
    return f"{domain_path(domain)}/mounts/{mount_id}"


def sealed_path() -> str:
    """Where the store puts together models to be shown as plain files, by mount id: of the shared domain alone, as nothing is
    proven elsewhere.
    """
    return f"{domain_path(_SHARED_DOMAIN)}/sealed"
