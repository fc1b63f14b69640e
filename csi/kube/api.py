"""The connection to the Kubernetes API, and its errors as ours.

Nothing else imports the client library's errors. Messages name the verb and the object, never a header or a token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import urllib3
from kubernetes import config
from kubernetes.client import ApiClient, Configuration
from kubernetes.client.exceptions import ApiException

from csi.errors import ControlError

TIMEOUT_S = 10.0


def connect(kubeconfig: str | None = None) -> ApiClient:
    """A client for the cluster this process runs in, or the one a kubeconfig file names. No request yet.

    Raises: ControlError when neither is there.
    """
    configuration = Configuration()
    try:
        if kubeconfig is not None:
            config.load_kube_config(kubeconfig, client_configuration=configuration)
        else:
            config.load_incluster_config(client_configuration=configuration)
    except (config.ConfigException, OSError) as exc:
        raise ControlError(
            f"no Kubernetes API: {exc}; run in a pod with a service account, or name a file with --kubeconfig"
        ) from exc
    configuration.retries = 1
    return ApiClient(configuration)


@contextlib.contextmanager
def errors_named(what: str) -> Iterator[None]:
    """Around calls of the client library.

    Raises: ControlError, which kubelet and sidecars take for "ask again"; `status` in its fields when the API answered.
    """
    try:
        yield
    except ApiException as exc:
        hint = "; check the RBAC rules of its service account" if exc.status in (401, 403) else ""
        raise ControlError(
            f"{what}: the Kubernetes API answered {exc.status} {exc.reason}{hint}", status=exc.status
        ) from exc
    except (urllib3.exceptions.HTTPError, OSError) as exc:
        raise ControlError(f"{what}: the Kubernetes API does not answer ({type(exc).__name__})") from exc
