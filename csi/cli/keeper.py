"""`modelmount keeper`. Imports the standard library only."""

from __future__ import annotations

import argparse
from typing import Any

from csi.cli.supervisor import STORE_UID
from csi.observe import logs


def add_parser(subparsers: Any) -> None:
    """Register the verb."""
    parser = subparsers.add_parser(
        "keeper",
        help="the privileged process: mounts, and keeps every /dev/fuse descriptor",
        description="The one privileged process of a node. Mounts, binds, unmounts; keeps every /dev/fuse descriptor.",
    )
    parser.add_argument("--state-dir", default="/run/modelmount", help="socket and mount points (default %(default)s)")
    parser.add_argument(
        "--target-root",
        action="append",
        metavar="DIR",
        help="bind models only below this directory; may be repeated (default /)",
    )
    parser.add_argument(
        "--take-over",
        action="store_true",
        help="take every mount over from the keeper that runs, which then ends (default: refuse to start beside it)",
    )
    parser.add_argument(
        "--backing-uid",
        type=int,
        default=STORE_UID,
        metavar="UID",
        help="whose files the kernel may read for a mount by itself: the store's user (default %(default)s)",
    )
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        help="the supervisor's data directory, to show complete models as plain files of its cache (default none: never)",
    )
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM."""
    from csi.cache.paths import sealed_path
    from csi.keeper.main import KeeperSettings, serve

    logs.set_up("keeper", args.log_level)
    serve(
        KeeperSettings(
            state_dir=args.state_dir,
            target_roots=tuple(args.target_root or ["/"]),
            backing_uid=args.backing_uid,
            take_over=args.take_over,
            sealed_dir=f"{args.data_dir}/cache/{sealed_path()}" if args.data_dir else None,
        )
    )
    return 0
