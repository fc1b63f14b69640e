"""`modelmount VERB ...`. Only the module of the verb that is called is imported, so that the keeper stays standard
library only, and a worker does not carry a gRPC server.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence

from csi.errors import InvalidVolumeError, ModelMountError

# verb → module; in the order of --help
_VERBS = {
    "push": "csi.cli.push",
    "inspect": "csi.cli.inspect",
    "ls": "csi.cli.inspect",
    "index": "csi.cli.index",
    "mount": "csi.cli.mount",
    "umount": "csi.cli.mount",
    "status": "csi.cli.status",
    "doctor": "csi.cli.doctor",
    "cache": "csi.cli.cache",
    "uninstall": "csi.cli.uninstall",
    "node": "csi.cli.node",
    "controller": "csi.cli.controller",
    "keeper": "csi.cli.keeper",
    "supervisor": "csi.cli.supervisor",
    "worker": "csi.cli.child",
    "fetcher": "csi.cli.child",
    "store": "csi.cli.child",
    "nursery": "csi.cli.child",
}


def build_parser(verbs: Sequence[str] = tuple(_VERBS)) -> argparse.ArgumentParser:
    """The parser with the given verbs only."""
    parser = argparse.ArgumentParser(
        prog="modelmount",
        description="AI models in OCI registries as volumes: there at once, streamed on first access, verified.",
        epilog="Every verb has its own --help. Exit status: 0 done, 1 failed, 2 wrong usage.",
    )
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version and end")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for module in dict.fromkeys(_VERBS[verb] for verb in verbs):
        importlib.import_module(module).add_parser(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit status; errors of ours are one line, without a traceback."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser([given[0]]) if given and given[0] in _VERBS else build_parser()
    args = parser.parse_args(given)
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except ModelMountError as exc:
        print(f"modelmount {args.verb}: {exc}", file=sys.stderr)
        return 2 if isinstance(exc, InvalidVolumeError) else 1
    except KeyboardInterrupt:
        return 130


class _ShowVersion(argparse.Action):
    """Looks the version up only when asked: what reads the installed packages costs every process 3 MiB."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"modelmount {_version()}")
        parser.exit()


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("modelmount")
    except PackageNotFoundError:
        return "unknown (not installed)"


if __name__ == "__main__":
    sys.exit(main())
