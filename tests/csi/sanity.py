"""Runs csi-sanity against a real node with real mounts: `python tests/csi/sanity.py PATH-TO-CSI-SANITY`.

The node is served without a controller, so whatever needs one is skipped, by the list below and by nothing else.
csi-sanity's own node tests create their volumes through a controller; the publish cycle itself is tested in
test_node_service.py.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.node_process import NodeProcess

NEEDS_A_CONTROLLER = (
    r"\[Controller Server\]",
    r"\[GroupController Server\]",
    # Two node tests that begin with CreateVolume.
    r"NodeUnpublishVolume should remove target path",
    r"NodeGetVolumeStats should fail when volume does not exist on the specified path",
)


def main() -> int:
    """csi-sanity's exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("binary", type=Path)
    binary = parser.parse_args().binary.absolute()
    with tempfile.TemporaryDirectory(prefix="sanity-") as scratch, NodeProcess(Path(scratch) / "node") as node:
        print(f"skipped without a controller: {', '.join(NEEDS_A_CONTROLLER)}", flush=True)
        return subprocess.run(
            [
                binary,
                f"--csi.endpoint={node.socket_path}",
                f"--csi.mountdir={scratch}/target",
                f"--csi.stagingdir={scratch}/staging",
                f"--ginkgo.skip={'|'.join(NEEDS_A_CONTROLLER)}",
                "--ginkgo.no-color",
            ]
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
