"""`modelmount worker`, `fetcher`, `store`, and the `nursery` they are forked from: started by the supervisor, never by hand."""

from __future__ import annotations

import argparse
import functools
import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from csi.observe import logs

if TYPE_CHECKING:
    from csi.jail.confinement import Level

_LEVELS = ["debug", "info", "warning", "error"]


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
        parser.add_argument("--log-level", default="info", choices=_LEVELS)
        parser.set_defaults(run=run)
    parser = subparsers.add_parser("nursery", help="what the three before are forked from (started by the supervisor)")
    parser.add_argument("--control-fd", type=int, required=True, help="the socket to the supervisor")
    parser.add_argument(
        "--child", action="append", default=[], metavar="'VERB FLAGS'", help="one of them, without its --control-fd"
    )
    parser.add_argument("--log-level", default="info", choices=_LEVELS)
    parser.set_defaults(run=run_nursery)


def run(args: argparse.Namespace) -> int:
    """Import first, then give up every right, then listen."""
    return _ready(args)(args.control_fd)


def run_nursery(args: argparse.Namespace) -> int:
    """Import what all of them need, and fork what is asked for."""
    from csi.supervisor import nursery

    logs.set_up("nursery", args.log_level)
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers(dest="verb", required=True))
    children = {}
    for text in args.child:
        verb, *flags = shlex.split(text)
        # The descriptor is another one for each child.
        parsed = parser.parse_args([verb, *flags, f"--log-level={args.log_level}", "--control-fd=-1"])
        children[verb] = nursery.Kind([verb, *flags], _ready(parsed))
    return nursery.run(args.control_fd, children)


def _ready(args: argparse.Namespace) -> Callable[[int], int]:
    """Everything is imported; what is returned is called in the process itself, with its socket."""
    prepared = _imported(args)
    from csi.jail.confinement import Confinement, Policy, Role
    from csi.jail.privileges import import_late, raise_descriptor_limit

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
        logs.set_up(args.verb, args.log_level)
        raise_descriptor_limit()
        serve = prepared()  # what it reads of files it reads before it is confined
        return serve(control_fd, confinement.enter())

    return live


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
