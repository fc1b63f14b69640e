"""`modelmount mount` and `modelmount umount`: a volume by hand, without Kubernetes.

Uses the keeper and supervisor of this node where they run (--state-dir), else starts both in the background for as
long as something is mounted this way.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

from csi.cli import login, supervisor
from csi.cli.state_dir import BY_HAND
from csi.cli.view_flags import add_view_flags, view_of
from csi.credentials import Keyring
from csi.errors import ControlError, InvalidVolumeError, MountError

_DATA_DIR = "/var/cache/modelmount-by-hand"
_START_TIMEOUT_S = 20.0


def add_parser(subparsers: Any) -> None:
    """Register both verbs."""
    mount = subparsers.add_parser(
        "mount",
        help="mount a model at a directory, without Kubernetes",
        description="Mount a model read-only at a directory. Files are there at once and stream when they are read.",
    )
    mount.add_argument("reference", help="registry/repository:tag, …@sha256:…, or oci-layout:/directory")
    mount.add_argument("directory", help="an empty or new directory")
    login.add_flags(mount)
    mount.add_argument(
        "--verify",
        choices=["chunk", "whole", "eager"],
        help="check every block before it is read; every file once it is complete; every file before the mount is there "
        "(default: chunk where the model has a block index, else whole)",
    )
    mount.add_argument(
        "--prefetch", choices=["full", "ondemand"], default="full", help="ondemand: fetch only what is read"
    )
    add_view_flags(mount)
    mount.add_argument("--output", choices=["text", "json"], default="text")
    supervisor.add_flags(mount)
    umount = subparsers.add_parser(
        "umount", help="unmount what 'modelmount mount' mounted", description="Unmount a model mounted by hand."
    )
    umount.add_argument("directory")
    for parser in (mount, umount):
        parser.add_argument("--state-dir", default=BY_HAND, help="sockets and records (default %(default)s)")
        parser.set_defaults(data_dir=_DATA_DIR)
    umount.add_argument("--data-dir", help="cache and pins, as given to mount (default %(default)s)", default=_DATA_DIR)
    mount.set_defaults(run=run_mount)
    umount.set_defaults(run=run_umount)


def run_mount(args: argparse.Namespace) -> int:
    """Publish, as kubelet would, with the directory as volume id."""
    from csi.cli.process_tree import require_root
    from csi.driver.publisher import PublishRequest
    from csi.driver.server import open_publisher
    from csi.volume import parse_attributes

    require_root()
    wanted = {"reference": args.reference, "prefetch": args.prefetch}
    wanted |= {"verify": args.verify} if args.verify else {}
    attributes = parse_attributes(wanted | view_of(args).texts)
    reference = attributes.reference
    target_path = _target(args.directory)
    os.makedirs(os.path.dirname(target_path), exist_ok=True)
    args.layout_root = ["/"]  # references are typed by root here, not by a tenant
    _start_background(args)
    publisher = open_publisher(args.state_dir, args.data_dir)
    credentials = login.credentials_of(args, reference)
    request = PublishRequest(
        volume_id=f"by-hand {target_path}"[:120],
        target_path=target_path,
        attributes=attributes,
        arguments=json.dumps([str(reference), args.verify, args.prefetch, attributes.view.texts]),
        credentials=credentials,
        keyring=Keyring(tuple(("", one) for one in credentials)).named(reference.registry),
    )
    try:
        published = asyncio.run(publisher.publish(request))
    except BaseException:
        _stop_background_if_idle(args.state_dir)
        raise
    if args.output == "json":
        print(
            json.dumps(
                {
                    "digest": published.digest,
                    "directory": target_path,
                    "files": published.files,
                    "reference": str(reference),
                    "total_bytes": published.total_bytes,
                }
            )
        )
    else:
        print(f"{reference.origin}@{published.digest}")
        print(f"{published.files} files, {published.total_bytes / 1e6:,.1f} MB at {target_path}")
    return 0


def run_umount(args: argparse.Namespace) -> int:
    """Unpublish; stop the background processes with the last mount."""
    from csi.cli.process_tree import require_root
    from csi.driver.server import open_publisher

    require_root()
    target_path = _target(args.directory)
    publisher = open_publisher(args.state_dir, args.data_dir)
    if publisher.at(target_path) is None:
        raise InvalidVolumeError(
            f"{args.directory}: nothing was mounted there by 'modelmount mount' (state in {args.state_dir})"
        )
    asyncio.run(publisher.unpublish(f"by-hand {target_path}"[:120], target_path))
    _stop_background_if_idle(args.state_dir)
    return 0


def _target(directory: str) -> str:
    """Links in the parent are followed here, by the person who typed them; the last component is taken as it is."""
    absolute = os.path.abspath(directory)
    return os.path.join(os.path.realpath(os.path.dirname(absolute)), os.path.basename(absolute))


def _start_background(args: argparse.Namespace) -> None:
    """Keeper and supervisor, unless they run. Their log goes to a file beside the sockets."""
    from csi.control.keeper import KeeperClient
    from csi.control.supervisor import SupervisorClient

    keeper, supervised = KeeperClient(args.state_dir), SupervisorClient(args.state_dir)
    os.makedirs(args.state_dir, mode=0o700, exist_ok=True)
    log_path = os.path.join(args.state_dir, "log")
    commands = {
        "keeper": (keeper.ping, ["keeper", f"--state-dir={args.state_dir}"]),
        "supervisor": (supervised.ping, ["supervisor", f"--state-dir={args.state_dir}", *supervisor.flags_of(args)]),
    }
    for name, (ping, command) in commands.items():
        if _answers(ping):
            continue
        with open(log_path, "ab") as log_file:
            child = subprocess.Popen(
                [sys.executable, "-m", "csi.cli.main", *command],
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                cwd="/",
            )
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not _answers(ping):
            if child.poll() is not None or time.monotonic() > deadline:
                with open(log_path, encoding="utf-8", errors="replace") as log_file:
                    last = (log_file.read().strip().splitlines() or ["no message"])[-1]
                raise MountError(f"the {name} did not start: {last}")
            time.sleep(0.02)


def _stop_background_if_idle(state_dir: str) -> None:
    """With nothing mounted any more nothing stays running, and the state directory goes."""
    from csi.control.keeper import KeeperClient
    from csi.control.supervisor import SupervisorClient

    keeper, supervised = KeeperClient(state_dir), SupervisorClient(state_dir)
    try:
        if supervised.status():
            return
        pids = [supervised.ping(), int(str(keeper.ping()["pid"]))]
    except ControlError:
        return
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + _START_TIMEOUT_S
        while os.path.exists(f"/proc/{pid}/root") and time.monotonic() < deadline:
            time.sleep(0.02)
    if state_dir == BY_HAND:
        import shutil

        shutil.rmtree(state_dir, ignore_errors=True)


def _answers(ping: Any) -> bool:
    try:
        ping()
    except ControlError:
        return False
    return True
