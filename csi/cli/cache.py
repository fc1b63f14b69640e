"""`modelmount cache`: what this node keeps, and what of it may go."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from csi.cli import login
from csi.cli.state_dir import HELP, running_state_dir
from csi.errors import UnsupportedModelError


def add_parser(subparsers: Any) -> None:
    """Register the verb and its own verbs."""
    parser = subparsers.add_parser(
        "cache",
        help="show, check and trim the node's cache",
        description="The node's cache: proven blobs, which all mounts share, and what single mounts have fetched. What a "
        "mount uses is never removed.",
    )
    verbs = parser.add_subparsers(dest="cache_verb", required=True, metavar="VERB")
    for name, text in (
        ("ls", "list what is kept"),
        ("df", "how full the cache is, and its limits"),
        ("prune", "remove everything that no mount uses and nobody pinned"),
        ("verify", "hash every shared blob again; what is damaged is removed, and fetched again when it is wanted"),
    ):
        _add(verbs, name, text)
    for name, text in (("pin", "never evict the blobs of a model"), ("unpin", "let them be evicted again")):
        verb = _add(verbs, name, text)
        verb.add_argument("what", metavar="REFERENCE|DIGEST", help="a model, or the digest of one blob")
        login.add_flags(verb)
        verb.add_argument("--plain-http-host", action="append", default=[], metavar="HOST[:PORT]")


def _add(verbs: Any, name: str, text: str) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text.capitalize() + ".")
    verb.add_argument("--state-dir", default=running_state_dir(), help=HELP)
    verb.add_argument("--output", choices=["text", "json"], default="text")
    verb.set_defaults(run=run)
    return verb


def run(args: argparse.Namespace) -> int:
    """Ask the node; returns 1 when `verify` found damage."""
    from csi.control.supervisor import SupervisorClient

    client = SupervisorClient(args.state_dir)
    fields: dict[str, Any] = {}
    if args.cache_verb in ("pin", "unpin"):
        fields = {"digests": _digests_of(args), "label": args.what}
    result = client.cache(args.cache_verb, **fields)
    if args.output == "json":
        print(json.dumps(result, sort_keys=True))
    else:
        print("\n".join(_lines(args.cache_verb, result)))
    return 1 if any(not blob["right"] for blob in result.get("blobs", ())) else 0


def _digests_of(args: argparse.Namespace) -> list[str]:
    """The blobs of a model, asked of its registry; a digest names itself."""
    from csi.oci.digest import Digest
    from csi.oci.manifest import parse_manifest
    from csi.oci.reference import Reference
    from csi.registry.address_rules import AddressRules
    from csi.registry.sources import SourceSettings, open_source

    if args.what.startswith(("sha256:", "sha512:")):
        return [str(Digest.parse(args.what))]
    reference = Reference.parse(args.what)
    if reference.is_layout:
        raise UnsupportedModelError(f"{args.what}: name a model in a registry, or the digest of a blob")
    settings = SourceSettings(
        rules=AddressRules(plain_http_hosts=frozenset(args.plain_http_host)),
        credentials=login.credentials_of(args, reference),
    )
    source = open_source(reference, settings)
    try:
        manifest = parse_manifest(source.fetch_manifest(reference.tag, reference.digest, 20.0).data)
    finally:
        source.close()
    return [str(layer.digest) for layer in manifest.layers]


def _lines(verb: str, result: dict[str, Any]) -> list[str]:
    if verb == "df":
        used, limit = result["used_bytes"], result["limit_bytes"]
        return [
            f"used      {_mb(used)}" + (f" of {_mb(limit)}" if limit else ""),
            f"reserved  {_mb(result['reserved_bytes'])} for mounts that are being filled",
            f"room      {_mb(result['room_bytes'])}",
            f"disk      {_mb(result['free_bytes'])} free of {_mb(result['total_bytes'])}, "
            f"{_mb(result['floor_bytes'])} stay free",
            f"evicted   {_mb(result['evicted_bytes'])} since the store started",
        ]
    if verb == "verify":
        return [f"{'right' if blob['right'] else 'DAMAGED, removed':16}  {blob['digest']}" for blob in result["blobs"]]
    if verb in ("pin", "unpin"):
        return [f"{digest}  {label}" for digest, label in sorted(result["pins"].items())] or ["nothing is pinned"]
    entries = sorted(result["removed" if verb == "prune" else "entries"], key=lambda entry: -entry["last_used"])
    return [_entry_line(entry) for entry in entries] or ["nothing"]


def _entry_line(entry: dict[str, Any]) -> str:
    state = "in use" if entry["in_use"] else "pinned" if entry["pinned"] else "unused"
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry["last_used"]))
    line = f"{entry['kind']:4}  {_mb(entry['size_bytes']):>14}  {state:6}  {when}  {entry['name']}"
    return f"{line}  of {entry['domain']}" if entry.get("domain") else line


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"
