"""The chart's release in a cluster."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from e2e.api import NAMESPACE

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "modelmount"


class Helm:
    """`helm` with configuration of its own below `directory`."""

    def __init__(self, binary: str, directory: Path, kubeconfig: Path | None = None) -> None:
        self._binary = binary
        self._environment = os.environ | {
            f"HELM_{kind}_HOME": str(directory / "helm" / kind.lower()) for kind in ("CONFIG", "DATA", "CACHE")
        }
        if kubeconfig is not None:
            self._environment["KUBECONFIG"] = str(kubeconfig)

    def run(self, *arguments: str, timeout_s: float = 240) -> str:
        """Raises: AssertionError with what helm said."""
        done = subprocess.run(
            [self._binary, *arguments], capture_output=True, text=True, env=self._environment, timeout=timeout_s
        )
        assert done.returncode == 0, f"helm {' '.join(arguments)[:300]}: {done.stderr[-2500:]}\n{done.stdout[-500:]}"
        return done.stdout

    def fails(self, *arguments: str) -> str:
        """What helm says when it refuses. Raises: AssertionError when it does not."""
        done = subprocess.run([self._binary, *arguments], capture_output=True, text=True, env=self._environment)
        assert done.returncode != 0, f"helm {' '.join(arguments)[:300]} should have failed"
        return done.stderr

    def install(self, values: dict[str, Any], chart: Path = CHART) -> None:
        """Install or upgrade with these values."""
        self.run(
            *("upgrade", "--install", "modelmount", str(chart)),
            *("--namespace", NAMESPACE, "--create-namespace"),
            *flags_of(values),
        )

    def rollback(self) -> None:
        """To what was installed before."""
        self.run("rollback", "modelmount", "--namespace", NAMESPACE)

    def uninstall(self) -> None:
        """And wait until its objects are gone."""
        self.run("uninstall", "modelmount", "--namespace", NAMESPACE, "--wait", "--timeout=300s", timeout_s=330)


def flags_of(values: dict[str, Any]) -> list[str]:
    """`--set-json` for each."""
    return [f"--set-json={key}={json.dumps(value)}" for key, value in values.items()]
