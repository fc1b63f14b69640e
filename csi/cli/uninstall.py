"""`modelmount uninstall`: what the hooks of the chart run when the release is gone, one `clean` per node and one `await`.

`clean` removes by name what the driver's processes make, and nothing else: a directory that somebody shares with it keeps
what is not ours.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any

from csi import mountinfo
from csi.errors import ControlError, MountError
from csi.mountinfo import MountEntry
from csi.observe import logs

log = logging.getLogger(__name__)

STATE_NAMES = ("keeper.sock", "supervisor.sock", "mounts", "superblocks", "trees", "mounted", "publications", "log")
DATA_NAMES = ("cache", "access", "manifests", "pins", "volumes")
_POLL_S = 0.5


def add_parser(subparsers: Any) -> None:
    """Register the verb and its own verbs."""
    parser = subparsers.add_parser(
        "uninstall",
        help="take away what the driver left on a node (the chart does it after 'helm uninstall')",
        description="Take away what the driver left on a node. The chart's hooks run it after 'helm uninstall'; without helm "
        "run 'clean' as root on each node once keeper and supervisor are stopped.",
    )
    verbs = parser.add_subparsers(dest="uninstall_verb", required=True, metavar="VERB")
    clean = verbs.add_parser(
        "clean",
        help="unmount models, remove sockets, records and the cache of this node",
        description="Wait until keeper and supervisor are gone, then unmount every model and remove sockets, records and the "
        "cache. Pods that still use a model cannot read it any more.",
    )
    clean.add_argument("--state-dir", default="/run/modelmount", help="sockets and records (default %(default)s)")
    clean.add_argument("--data-dir", default="/var/lib/modelmount", help="cache and pins (default %(default)s)")
    clean.add_argument(
        "--target-root",
        action="append",
        metavar="DIR",
        help="unmount models below this directory and the state directory only; may be repeated (default /var/lib/kubelet)",
    )
    clean.add_argument("--keep-cache", action="store_true", help="leave everything in --data-dir")
    clean.add_argument(
        "--timeout", type=float, default=90.0, metavar="S", help="how long to wait for the driver's end (default 90 s)"
    )
    clean.set_defaults(run=_run_clean)
    awaited = verbs.add_parser(
        "await",
        help="wait until a DaemonSet's pods are ready on every node",
        description="Wait until every node's pod of a DaemonSet is ready; say which are not, and fail, when time is up.",
    )
    awaited.add_argument("--namespace", required=True)
    awaited.add_argument("--daemonset", required=True, metavar="NAME")
    awaited.add_argument("--kubeconfig", metavar="FILE", help="the cluster to ask, when not running in one")
    awaited.add_argument("--timeout", type=float, default=180.0, metavar="S", help="default 180 s")
    awaited.set_defaults(run=_run_await)


def _run_clean(args: argparse.Namespace) -> int:
    logs.set_up("uninstall", "info")
    wait_for(lambda: _processes_that_answer(args.state_dir), "still running on this node: ", args.timeout)
    roots = [args.state_dir, *(args.target_root or ["/var/lib/kubelet"])]
    unmounted = _unmount_below([os.path.realpath(root) for root in roots])
    names = _remove(args.state_dir, STATE_NAMES)
    names += [] if args.keep_cache else _remove(args.data_dir, DATA_NAMES)
    print(f"unmounted {unmounted} models, removed {', '.join(names) or 'nothing'}")
    return 0


def _run_await(args: argparse.Namespace) -> int:
    from csi.kube.api import connect
    from csi.kube.daemonsets import nodes_without_ready_pod

    client = connect(args.kubeconfig)
    wait_for(
        lambda: nodes_without_ready_pod(client, args.namespace, args.daemonset),
        "not cleaned, so mounts and the cache may be left there: ",
        args.timeout,
    )
    print("every node is clean")
    return 0


def wait_for(left: Callable[[], list[str]], what: str, timeout_s: float) -> None:
    """Poll until nothing is left. Raises: ControlError naming what is, when time is up."""
    deadline = time.monotonic() + timeout_s
    while names := left():
        if time.monotonic() > deadline:
            raise ControlError(f"{what}{', '.join(names)} (waited {timeout_s:g} s)")
        time.sleep(_POLL_S)


def _processes_that_answer(state_dir: str) -> list[str]:
    from csi.control import endpoint

    found = []
    for name in ("keeper", "supervisor"):
        with contextlib.suppress(ControlError):
            endpoint.connect(os.path.join(state_dir, f"{name}.sock"), 2.0).close()
            found.append(name)
    return found


def _unmount_below(roots: Sequence[str]) -> int:
    """Every model shown below one of them. Never waits for the file system behind it. Raises: MountError."""
    from csi.keeper import syscalls

    count = 0
    for entry in reversed(mountinfo.read()):
        if not is_ours(entry, roots):
            continue
        try:
            syscalls.detach(entry.mount_point)
        except OSError as exc:
            raise MountError(f"unmount of {entry.mount_point} failed: {exc.strerror}", errno=exc.errno) from exc
        count += 1
    return count


def is_ours(entry: MountEntry, roots: Sequence[str]) -> bool:
    """Whether a model is mounted there, below one of `roots`; another driver of the machine has other directories."""
    return mountinfo.is_model(entry) and any(entry.mount_point.startswith(f"{root.rstrip('/')}/") for root in roots)


def _remove(directory: str, names: tuple[str, ...]) -> list[str]:
    """Raises: MountError when something of ours cannot be removed."""
    removed = []
    for name in names:
        path = os.path.join(directory, name)
        try:
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)
        except FileNotFoundError:
            continue
        except OSError as exc:
            raise MountError(f"{path} cannot be removed: {exc.strerror}; remove it by hand", errno=exc.errno) from exc
        removed.append(path)
    with contextlib.suppress(OSError):
        if left := sorted(os.listdir(directory)):
            log.warning("%s keeps what is not ours: %s", directory, ", ".join(left[:20]))
    return removed
