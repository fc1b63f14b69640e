"""`modelmount worker`, `fetcher` and `store`: started by the supervisor, never by hand."""

from __future__ import annotations

import argparse
from typing import Any

from csi.observe import logs


def add_parser(subparsers: Any) -> None:
    """Register the verbs."""
    for name, what in (
        ("worker", "serves one mount"),
        ("fetcher", "fetches the blobs of one mount"),
        ("store", "shares proven blobs between mounts, keeps the cache within its limits"),
    ):
        parser = subparsers.add_parser(name, help=f"{what} (started by the supervisor)")
        parser.add_argument("--control-fd", type=int, required=True, help="the socket to the supervisor")
        parser.add_argument("--data-dir", required=True, help="where the cache lies")
        parser.add_argument("--read-dir", action="append", default=[], help="a fetcher may read below it too")
        parser.add_argument("--jail", choices=["require", "degrade"], default="require")
        parser.add_argument("--memory-mib", type=int, default=0, help="private memory it may use (0: no limit)")
        parser.add_argument("--uid", type=int, help="become this user before the first message")
        parser.add_argument("--gid", type=int, help="and this group")
        parser.add_argument(
            "--nursery", action="store_true", help="fork one for every socket that comes over the socket"
        )
        parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
        parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Import first, then give up every right, then listen."""
    logs.set_up(args.verb, args.log_level)
    if args.verb == "worker":
        from csi.worker.main import run as serve
    elif args.verb == "store":
        from csi.store.main import run as serve
    else:
        from csi.fetcher.main import run as serve
    from csi.jail.confinement import Confinement, Policy, Role
    from csi.jail.privileges import import_late, raise_descriptor_limit

    raise_descriptor_limit()
    import_late()
    confinement = Confinement(
        role=Role(args.verb),
        policy=Policy(args.jail),
        data_dir=args.data_dir,
        read_dirs=args.read_dir,
        uid=args.uid,
        gid=args.gid,
        memory_mib=args.memory_mib,
    )

    def live(control_fd: int) -> int:
        return serve(control_fd, confinement.enter())

    if args.nursery:
        from csi.supervisor import nursery

        return nursery.run(args.control_fd, live)
    return live(args.control_fd)
