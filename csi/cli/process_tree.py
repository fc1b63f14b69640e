"""Keeper, supervisor and node as one process tree, for a laptop, tests and small clusters.

The same three commands as in a cluster, with the same sockets between them; this parent only starts them in order,
restarts them when they die, and stops them in reverse. A new keeper gets the connections back from the supervisor.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from csi import heap
from csi.cli import supervisor
from csi.control import endpoint
from csi.control.keeper import SOCKET_NAME as KEEPER_SOCKET
from csi.control.supervisor import SOCKET_NAME as SUPERVISOR_SOCKET
from csi.driver.sockets import endpoint_path
from csi.errors import ControlError, MountError
from csi.jail.privileges import end_with_parent
from csi.supervisor.restarts import Restarts

log = logging.getLogger(__name__)

_START_TIMEOUT_S = 20.0
_STOP_TIMEOUT_S = 10.0
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.5, 30.0
_SOON_S = 5.0  # what ran longer did not end of its start


class ProcessTree:
    """Children by name, in the order they were started."""

    def __init__(self) -> None:
        self._commands: dict[str, list[str]] = {}
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._started: dict[str, float] = {}
        self._restarts: dict[str, Restarts] = {}
        self._due: dict[str, float] = {}

    def start(self, name: str, arguments: Sequence[str], is_up: Callable[[], None]) -> None:
        """Start `modelmount <name>` and wait until `is_up` raises nothing.

        Raises: MountError when it ends instead, ControlError when it is not up within 20 s.
        """
        self._commands[name] = [sys.executable, "-m", "csi.cli.main", name, *arguments]
        self._restarts[name] = Restarts(soon_s=_SOON_S, first_s=_FIRST_DELAY_S, longest_s=_LONGEST_DELAY_S)
        child = self._spawn(name)
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            if child.poll() is not None:
                raise MountError(f"{name} ended at its start with status {child.returncode}; its message is above")
            try:
                is_up()
                return
            except ControlError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def watch(self, stopping: Callable[[], bool]) -> None:
        """Restart what ends until `stopping`. One that cannot come up costs the others nothing."""
        while not stopping():
            now = time.monotonic()
            for name, child in list(self._children.items()):
                if child.poll() is None:
                    continue
                if name not in self._due:
                    ran_s = now - self._started[name]
                    restarts = self._restarts[name]
                    restarts.note_death(ran_s)
                    self._due[name] = now + restarts.delay_s
                    log.error(
                        "%s ended with status %d after %.1f s; it is started again in %g s",
                        *(name, child.returncode, ran_s, restarts.delay_s),
                    )
                if now >= self._due[name]:
                    del self._due[name]
                    self._spawn(name)
            time.sleep(0.05)

    def stop(self) -> None:
        """SIGTERM in reverse order, one after the other; SIGKILL after 10 s."""
        for name, child in reversed(self._children.items()):
            if child.poll() is not None:
                continue
            child.terminate()
            try:
                child.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                log.error("%s did not stop within %g s; it is killed", name, _STOP_TIMEOUT_S)
                child.kill()
                child.wait()

    def _spawn(self, name: str) -> subprocess.Popen[bytes]:
        # A session of its own: Ctrl-C reaches this parent only, which stops the others in order.
        child = subprocess.Popen(
            self._commands[name],
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            preexec_fn=end_with_parent,
        )
        self._children[name] = child
        self._started[name] = time.monotonic()
        return child


def start_keeper_and_supervisor(tree: ProcessTree, args: argparse.Namespace) -> None:
    """The two processes every mount needs, with the flags of `args`."""
    common = [f"--state-dir={args.state_dir}", f"--log-level={args.log_level}"]
    roots = [f"--target-root={root}" for root in args.target_root or []]
    tree.start(
        "keeper", [*common, *roots, f"--data-dir={args.data_dir}"], lambda: _answers(args.state_dir, KEEPER_SOCKET)
    )
    flags = [*common, "--end-mounts", *supervisor.flags_of(args)]  # the keeper ends with the tree, and mounts with it
    tree.start("supervisor", flags, lambda: _answers(args.state_dir, SUPERVISOR_SOCKET))


def run_tree(args: argparse.Namespace) -> int:
    """`modelmount node --all-in-one`."""
    require_root()
    stop_requested = False

    def on_signal(*_: object) -> None:
        nonlocal stop_requested
        stop_requested = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    tree = ProcessTree()
    try:
        start_keeper_and_supervisor(tree, args)
        tree.start(
            "node",
            [
                f"--state-dir={args.state_dir}",
                f"--data-dir={args.data_dir}",
                f"--endpoint={args.endpoint}",
                f"--node-id={args.node_id}",
                f"--sharing={args.sharing}",
                *(f"--token-login={login}" for login in args.token_login),
                *(["--no-events"] if args.no_events else []),
                *([f"--kubeconfig={args.kubeconfig}"] if args.kubeconfig else []),
                *([f"--registration-dir={args.registration_dir}"] if args.registration_dir else ["--no-registration"]),
                *([f"--kubelet-endpoint={args.kubelet_endpoint}"] if args.kubelet_endpoint else []),
                *([f"--metrics-address={args.metrics_address}"] if args.metrics_address else []),
                *(["--remove-startup-taint"] if args.remove_startup_taint else []),
                *(["--with-controller"] if args.with_controller else []),
                *(f"--plain-http-host={host}" for host in args.plain_http_host),
                f"--log-level={args.log_level}",
            ],
            lambda: _listens(endpoint_path(args.endpoint)),
        )
        heap.give_back()
        tree.watch(lambda: stop_requested)
        return 0
    finally:
        tree.stop()


def require_root() -> None:
    """Raises: MountError that says so in one line."""
    if os.geteuid() != 0:
        raise MountError("mounting needs root: run it again with sudo")


def _listens(path: str) -> None:
    """Raises: ControlError when nobody listens on that stream socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except OSError as exc:
            raise ControlError(f"nothing listens on {path} {_START_TIMEOUT_S:g} s after the start: {exc}") from exc


def _answers(state_dir: str, socket_name: str) -> None:
    endpoint.call(os.path.join(state_dir, socket_name), "ping", 2.0)
