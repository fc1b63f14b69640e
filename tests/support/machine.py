"""A machine with a kubelet and the driver on it, that can be switched off and on again.

Its directory is a mount that is shared between name spaces, as kubelet's is in a cluster: the driver runs in a name space
of its own, where the machine's boot id is what this machine says, and what it mounts is seen by kubelet and by containers
that start later.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
import uuid
from pathlib import Path

from fakes.kubelet import CHART_DRIVER, CSIDriver, FakeKubelet
from support.node_process import NodeProcess, alive, children_of

from csi import mountinfo
from csi.keeper import syscalls

_BOOT = 'mount --make-rprivate /proc && mount --bind {} /proc/sys/kernel/random/boot_id && exec "$@"'


class Machine:
    """Use as a context manager: it is switched on, and nothing is left of it. `directory` must be short, for sockets below
    it.
    """

    def __init__(self, directory: Path, *flags: str, driver: CSIDriver = CHART_DRIVER) -> None:
        self.directory = directory
        self.kubelet = FakeKubelet(directory / "k", driver)
        self._boot_id = directory / "boot_id"
        under = ("unshare", "--mount", "--propagation", "unchanged", "sh", "-c", _BOOT.format(self._boot_id), "boot")
        registration = f"--registration-dir={self.kubelet.plugins_registry}"
        self.node = NodeProcess(directory / "d", registration, *flags, under=under)

    def __enter__(self) -> Machine:
        subprocess.run(["mount", "--bind", self.directory, self.directory], check=True)
        subprocess.run(["mount", "--make-private", self.directory], check=True)
        subprocess.run(["mount", "--make-shared", self.directory], check=True)
        try:
            self.switch_on()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self.node.stop()
        finally:
            self._unmount_all()
            syscalls.detach(str(self.directory))

    def switch_on(self) -> None:
        """A boot: kubelet starts, then the driver, which registers."""
        self._boot_id.write_text(f"{uuid.uuid4()}\n", encoding="ascii")
        self.kubelet.restart()
        self.node.start()
        self.kubelet.wait_registered()

    def switch_off(self, *, run_is_tmpfs: bool = True) -> None:
        """Without warning: every process is killed, every mount is gone; what lay on tmpfs too."""
        family = {self.node.pid, *children_of(self.node.pid)}
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while any(alive(pid) for pid in family):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        self.node.stop()
        self._unmount_all()
        if run_is_tmpfs:
            shutil.rmtree(self.node.state_dir)

    def mounts(self) -> list[str]:
        """Mount points of volumes and superblocks, as kubelet sees them."""
        return [path for path in self._below() if path != str(self.directory)]

    def _below(self) -> list[str]:
        prefix = str(self.directory)
        return [one.mount_point for one in mountinfo.read() if (one.mount_point + "/").startswith(prefix + "/")]

    def _unmount_all(self) -> None:
        while left := self.mounts():
            with contextlib.suppress(OSError):
                syscalls.detach(left[-1])
