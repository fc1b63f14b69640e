"""Any cluster a KUBECONFIG leads to. What only a node's owner could do (killing containers, a reboot) is skipped there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from e2e.api import KubernetesApi


class RemoteCluster(KubernetesApi):
    """`kubectl proxy` speaks to the API for us, so every way of logging in works. Use as a context manager."""

    def __init__(self, kubeconfig: Path, state_dir: str) -> None:
        self._state_dir = state_dir
        kubectl = shutil.which("kubectl")
        assert kubectl is not None, "a KUBECONFIG is given, but there is no kubectl on the PATH"
        self._proxy = subprocess.Popen(
            [kubectl, "proxy", "--port=0"],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"KUBECONFIG": str(kubeconfig)},
        )
        assert self._proxy.stdout is not None
        found = re.search(r"127\.0\.0\.1:\d+", self._proxy.stdout.readline())
        assert found is not None, "kubectl proxy did not start; does the KUBECONFIG work?"
        super().__init__(f"http://{found[0]}", kubeconfig, kubectl)

    @property
    def state_dir(self) -> str:
        return self._state_dir

    def stop(self) -> None:
        """End the proxy."""
        self._proxy.terminate()
        self._proxy.wait(10)
        if self._proxy.stdout is not None:
            self._proxy.stdout.close()
