"""`modelmount status`: what is mounted on this node, how far each model is, and what went wrong lately."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

from csi.cli.state_dir import HELP, running_state_dir
from csi.control.supervisor import SupervisorClient, cached_bytes
from csi.errors import ControlError, InvalidVolumeError

_WATCH_EVERY_S = 1.0
_BAR_CELLS = 40


def add_parser(subparsers: Any) -> None:
    """Register the verb."""
    parser = subparsers.add_parser(
        "status",
        help="what is mounted, how far it is fetched, what went wrong",
        description="The mounts of this node. Asks the supervisor, never a mounted file system.",
    )
    parser.add_argument("target", nargs="?", help="only the mount shown at this path")
    parser.add_argument("--state-dir", default=running_state_dir(), help=HELP)
    parser.add_argument("--watch", action="store_true", help="on a terminal: look again every second until Ctrl-C")
    parser.add_argument("--output", choices=["text", "json"], default="text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the mounts, once or again and again."""
    client = SupervisorClient(args.state_dir)
    if args.watch:
        if args.output != "text" or not sys.stdout.isatty():
            raise InvalidVolumeError("--watch needs a terminal and --output text; leave it out for one answer")
        return _watch(lambda: client.status(args.target))
    mounts = client.status(args.target)
    if args.output == "json":
        print(json.dumps({"mounts": mounts}, indent=2, sort_keys=True))
        return 0
    if not mounts:
        print("nothing is mounted")
    for mount in mounts:
        print("\n".join(_lines(mount)))
    return 0


def _watch(ask: Callable[[], list[dict[str, Any]]]) -> int:
    """Draw over the last picture, so that nothing flickers and what was on the screen before stays."""
    drawn = 0
    while True:
        try:
            lines = [line for mount in ask() for line in _lines(mount, bar=True)] or ["nothing is mounted"]
        except ControlError as exc:
            lines = [str(exc)]
        columns, rows = shutil.get_terminal_size()
        lines = [line[: columns - 1] for line in lines[: rows - 1]]
        back = f"\x1b[{drawn}A" if drawn else ""
        print(back + "\x1b[J" + "\n".join(lines), flush=True)
        drawn = len(lines)
        time.sleep(_WATCH_EVERY_S)


def progress_of(mount: dict[str, Any]) -> tuple[int, int, str]:
    """Bytes in the cache (whole blocks), bytes of all blobs, and how far their verification is."""
    blobs = mount["progress"].get("blobs", [])
    present, total = cached_bytes(mount)
    states = {blob["state"] for blob in blobs}
    if "poisoned" in states:
        return present, total, "WRONG BYTES: reads fail"
    if mount["verify"] == "chunk":
        return present, total, "every block before it is read"
    verified = sum(blob["state"] == "verified" for blob in blobs)
    if verified == len(blobs) and blobs:
        return present, total, "verified"
    return present, total, f"unverified ({verified} of {len(blobs)} blobs verified)"


def _named(mount: dict[str, Any], role: str) -> str:
    """Its process; while nobody reads there may be none."""
    return f"{role} resting" if mount.get(f"{role}_resting") else f"{role} {mount[f'{role}_pid']}"


def _lines(mount: dict[str, Any], *, bar: bool = False) -> list[str]:
    present, total, verification = progress_of(mount)
    percent = 100 * present / total if total else 100.0
    lines = [
        mount["reference"],
        f"  cached    {percent:5.1f} %  {present / 1e6:,.1f} of {total / 1e6:,.1f} MB, {mount['files']} files",
        f"  verify    {mount['verify']}: {verification}",
        f"  prefetch  {mount['prefetch']}",
        f"  workers   {_named(mount, 'worker')} ({mount['worker_restarts']} restarts), "
        f"{_named(mount, 'fetcher')} ({mount['fetcher_restarts']} restarts)",
        f"  survives  {'a crash of the worker' if mount['can_resend'] else 'planned upgrades only (kernel < 6.9)'}",
    ]
    if passing := mount.get("passthrough"):
        how = (
            f"no: {passing['refusal']}"
            if passing["refusal"]
            else f"{len(passing['blobs'])} blobs, from the next open on"
        )
        lines.append(f"  kernel    {how}")
    if sealed := mount.get("sealed", {}).get("targets"):
        lines.append(f"  sealed    {len(sealed)} of {len(mount['targets'])} volumes show plain files of the cache")
    lines += [f"  layers    {text}" for text in _layer_modes(mount.get("layers", []))]
    lines += [f"  warning   {warning}" for warning in mount.get("warnings", [])]
    if mount.get("preparing"):
        lines.append(f"  preparing {mount['preparing']}")
    lines += [f"  parent    {parent}" for parent in mount.get("parents", [])]
    if mount.get("variant_digest"):
        lines.append(f"  variant   {mount['variant_digest']}")
    if bar:
        filled = int(percent * _BAR_CELLS / 100)
        lines.insert(1, f"  [{'█' * filled}{'·' * (_BAR_CELLS - filled)}]")
    lines += [f"  shown at  {target}" for target in mount["targets"]]
    if error := mount["progress"].get("last_error"):
        lines.append(f"  trouble   {error}")
    for event in mount["events"][-5:]:
        when = time.strftime("%H:%M:%S", time.localtime(event["time"]))
        lines.append(f"  event     {when} {event['reason']}: {event['message']}")
    return lines


def _layer_modes(layers: list[dict[str, Any]]) -> list[str]:
    """Archive layers by how they are read; one that is being read by itself, with how far it is."""
    lines = []
    counts: dict[str, int] = {}
    for layer in layers:
        if layer["done_bytes"] < layer["size_bytes"]:
            percent = 100 * layer["done_bytes"] // layer["size_bytes"]
            lines.append(f"{layer['digest'][:19]} {layer['mode']} {percent} %")
        else:
            counts[layer["mode"]] = counts.get(layer["mode"], 0) + 1
    return [f"{count} {mode}" for mode, count in sorted(counts.items())] + lines
