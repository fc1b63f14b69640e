"""A real FUSE mount served by `backend_worker`, and the part of keeper and supervisor that a test plays itself."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from csi.fuse.handshake import RESEND_MESSAGE, BackendName, can_resend
from csi.keeper import syscalls
from csi.keeper.superblock import open_superblock
from csi.tree import file_format, model

TESTS = Path(__file__).resolve().parents[1]
TIMEOUT_S = 30.0
WATCHDOG_S = 80.0


class BackendMount:
    """Use as a context manager; leaving unmounts."""

    def __init__(
        self, directory: Path, backend: BackendName, files: Iterable[model.TreeFile | model.TreeSymlink]
    ) -> None:
        self.path = directory / "mnt"
        self.path.mkdir()
        self.backend = backend
        self._tree_path = directory / "tree"
        self._tree_path.write_bytes(file_format.dump(model.build(files)))
        self._superblock = open_superblock(str(self.path), 128, backend)
        self.fuse_fd, self.table_fd, self.device = (
            self._superblock.fd,
            self._superblock.table_fd,
            self._superblock.device,
        )
        self.can_resend = can_resend(self._superblock.init)
        self._mounted = True
        self.worker: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> BackendMount:
        # A reader that nobody answers cannot be interrupted, and neither can the test that waits for it.
        self._watchdog = threading.Timer(WATCHDOG_S, self._abort)
        self._watchdog.start()
        self.start()
        return self

    def _abort(self) -> None:
        subprocess.run(["umount", "-f", str(self.path)], check=False, capture_output=True)

    def __exit__(self, *exc: object) -> None:
        self._watchdog.cancel()
        self.unmount()
        self._superblock.close()
        if self.worker is not None:
            self.kill()

    def start(self) -> None:
        """Start a worker and wait until it serves."""
        read_end, write_end = os.pipe()
        self.worker = subprocess.Popen(
            [
                *(sys.executable, str(TESTS / "support" / "backend_worker.py"), self.backend),
                *(str(self.fuse_fd), str(self.table_fd), self._superblock.init.raw.hex(), str(self._tree_path)),
            ],
            pass_fds=[self.fuse_fd, self.table_fd],
            stdin=subprocess.PIPE,
            stdout=write_end,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}"},
        )
        os.close(write_end)
        self._lines = os.fdopen(read_end, "rb", buffering=0)
        self.expect("serving")

    def command(self, line: str) -> None:
        """Send one line."""
        assert self.worker is not None
        assert self.worker.stdin is not None
        self.worker.stdin.write(line.encode() + b"\n")

    def expect(self, word: str, timeout_s: float = TIMEOUT_S) -> str:
        """The next line, which begins with `word`."""
        line = b""
        while not line.endswith(b"\n"):
            assert select.select([self._lines], [], [], timeout_s)[0], f"the worker did not say {word!r}"
            byte = self._lines.read(1)
            assert byte, f"the worker ended before it said {word!r}"
            line += byte
        text = line.decode().strip()
        assert text.startswith(word), text
        return text

    def waiting(self) -> int:
        """Reads that wait in the worker."""
        self.command("waiting")
        return int(self.expect("waiting").split()[1])

    def wait_for_waiting(self, count: int) -> None:
        """Until so many reads wait."""
        deadline = time.monotonic() + TIMEOUT_S
        while (waiting := self.waiting()) < count:
            assert time.monotonic() < deadline, f"{waiting} of {count} reads wait"
            time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL."""
        assert self.worker is not None
        self.worker.kill()
        self._reap()

    def died(self, within_s: float) -> bool:
        """Whether the worker ends by itself, and then it is gone; False after `within_s`."""
        assert self.worker is not None
        try:
            self.worker.wait(within_s)
        except subprocess.TimeoutExpired:
            return False
        self._reap()
        return True

    def _reap(self) -> None:
        assert self.worker is not None
        self.worker.wait(TIMEOUT_S)
        assert self.worker.stdin is not None
        self.worker.stdin.close()
        self._lines.close()
        self.worker = None

    def hand_over(self) -> None:
        """A planned replacement: the old worker finishes, then the new one starts.

        libfuse may drop a request that it received while it was told to end, so pyfuse3 needs RESEND here too.
        """
        self.command("stop")
        self.expect("stopped")
        self._reap()
        self.start_after_crash()

    def start_after_crash(self) -> None:
        """What the supervisor does after a crash. The raw backend gets no RESEND, on any kernel."""
        if self.backend is BackendName.PYFUSE3 and self.can_resend:
            os.write(self.fuse_fd, RESEND_MESSAGE)
        self.start()

    def unmount(self) -> None:
        """Detach; the connection ends with its last user."""
        if self._mounted:
            self._mounted = False
            os.close(self._superblock.root_fd)  # a user, too
            self._superblock.root_fd = -1
            syscalls.detach(str(self.path))
