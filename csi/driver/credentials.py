"""Registry credentials from the secrets of a CSI call."""

from __future__ import annotations

from collections.abc import Mapping

from csi.credentials import Credentials, Keyring, of_secret
from csi.oci.reference import Reference

TOKENS_KEY = "csi.storage.k8s.io/serviceAccount.tokens"


def keyring_of(given: Mapping[str, str]) -> Keyring:
    """What the secret that a volume names has. Raises: InvalidVolumeError for a malformed one."""
    secret = {key: value for key, value in given.items() if key != TOKENS_KEY}
    return of_secret(secret) if secret else Keyring()


def candidates(keyring: Keyring, reference: Reference) -> Credentials:
    """Those for the reference's repository; a directory needs none."""
    return () if reference.is_layout else keyring.candidates(reference.registry, reference.repository)
