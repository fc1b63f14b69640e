"""`modelmount worker`, `fetcher` and `store`: started by the supervisor, never by hand."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from csi.observe import logs

if TYPE_CHECKING:
    from csi.jail.confinement import Level


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
        parser.add_argument("--index-key", action="append", default=[], help="a fetcher takes indexes signed by it")
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
    prepared = _imported(args)
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
        serve = prepared()  # what it reads of files it reads before it is confined
        return serve(control_fd, confinement.enter())

    if args.nursery:
        from csi.supervisor import nursery

        return nursery.run(args.control_fd, live)
    return live(args.control_fd)


def _imported(args: argparse.Namespace) -> Callable[[], Callable[[int, Level], int]]:
    """Everything that the process will use; what it returns is called in each."""
    if args.verb == "worker":
        from csi.worker.main import run as serve_mount

        return lambda: serve_mount
    if args.verb == "store":
        from csi.store.main import run as keep_cache

        return lambda: keep_cache
    from csi.fetcher.main import run as fetch

    if not args.index_key:
        return lambda: fetch
    from csi.fetcher.signed_indexes import SignedIndexes

    return lambda: functools.partial(fetch, signed_indexes=SignedIndexes.from_paths(args.index_key))
