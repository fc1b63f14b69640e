"""The suite against a cluster it did not start, with this machine's own as that cluster.

    python -m e2e.external [COMMAND...]      (in name spaces as `make e2e-external` makes them; default: make e2e KUBECONFIG=…)

Starts a one-node cluster and a registry, says in the environment what a user of any cluster would say (KUBECONFIG,
MODELMOUNT_E2E_REGISTRY, MODELMOUNT_E2E_VALUES), runs the command and takes the cluster away again.
`make e2e-external RUN="sleep infinity"` is a cluster to try things in; Ctrl-C ends it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from e2e.conftest import BINARIES, IMAGE_ARCHIVE, OTHER_ARCHIVE, OTHER_IMAGE
from e2e.helm import ROOT
from e2e.images import PROVISIONER_IMAGE, busybox_image
from e2e.local_cluster import ADDRESS, LocalCluster
from e2e.remote_cluster import RemoteCluster
from registry_process import RegistryProcess, find_or_install_registry


def main(command: list[str]) -> int:
    """The command's exit status."""
    directory = ROOT / ".e2e"
    shutil.rmtree(directory, ignore_errors=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
    with contextlib.ExitStack() as stack:
        cluster = LocalCluster(directory, BINARIES)
        stack.callback(cluster.stop)
        cluster.start()
        for archive in (IMAGE_ARCHIVE, OTHER_ARCHIVE):
            cluster.import_image(archive)
        # Under the name by which a cluster with a way to the internet would pull it.
        cluster.import_image(busybox_image(Path("/bin/busybox").read_bytes(), RemoteCluster.reader_image))
        registry = RegistryProcess(find_or_install_registry(ROOT / ".tools"), directory / "registry")
        stack.callback(registry.stop)
        registry.start(f"{ADDRESS}:5000")
        values = {
            "kubeletDir": str(cluster.kubelet_dir),
            "stateDir": cluster.state_dir,
            "dataDir": str(cluster.data_dir),
            "controller.provisioner.image": PROVISIONER_IMAGE,
            "cache.minFreePercent": 1,
        }
        told = {
            "KUBECONFIG": str(cluster.kubeconfig),
            "MODELMOUNT_E2E_REGISTRY": registry.host,
            "MODELMOUNT_E2E_OTHER_IMAGE": OTHER_IMAGE,
            "MODELMOUNT_E2E_VALUES": json.dumps(values),
            "PATH": f"{BINARIES}:{os.environ['PATH']}",
        }
        for name, value in told.items():
            print(f"export {name}='{value}'", flush=True)
        print(f"nsenter --target {os.getpid()} --mount --net   # from another terminal", flush=True)
        default = ["make", "e2e", f"KUBECONFIG={cluster.kubeconfig}"]
        try:
            return subprocess.run(command or default, env=os.environ | told, cwd=ROOT).returncode
        except KeyboardInterrupt:
            return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
