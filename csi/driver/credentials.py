"""Registry credentials from the secrets of a CSI call."""

from __future__ import annotations

from collections.abc import Mapping

from csi.errors import InvalidVolumeError

TOKENS_KEY = "csi.storage.k8s.io/serviceAccount.tokens"


def credentials_of(given: Mapping[str, str]) -> dict[str, str] | None:
    """`username` and `password` of the secret a volume names. Raises: InvalidVolumeError for half of them."""
    secrets = {key: value for key, value in given.items() if key != TOKENS_KEY}
    if not secrets:
        return None
    if "username" not in secrets or "password" not in secrets:
        raise InvalidVolumeError(
            f"nodePublishSecretRef: the secret has the keys {', '.join(sorted(secrets))}; expected username and "
            "password (type kubernetes.io/basic-auth)",
            field="secrets",
        )
    return {"username": secrets["username"], "password": secrets["password"]}
