"""`modelmount push`: a directory of model files becomes a ModelPack artifact that streams well."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from csi.cli import login
from csi.cli.sizes import size_text
from csi.credentials import Credentials
from csi.errors import InvalidVolumeError, UnsupportedModelError
from csi.integrity import index
from csi.integrity.index import BlobHashes
from csi.oci.modelpack import ModelDescription, PackedModel, SourceFile, pack
from csi.oci.paths import check_member_path
from csi.oci.reference import Reference

if TYPE_CHECKING:
    from csi.registry.pushing import ModelSink, PushProgress

_DEFAULT_TAG = "latest"
_SHOWN_HIDDEN = 5
_REDRAW_S = 0.1


def add_parser(subparsers: Any) -> None:
    """Register the verb."""
    parser = subparsers.add_parser(
        "push",
        help="push model files to a registry",
        description="Push a directory (or one file) as a CNCF ModelPack artifact: one uncompressed layer per file, and a "
        "block index so that every byte can be checked before it is read. The same files get the same digest. Files the "
        "repository has already are not sent again. Hidden files are left out.",
        epilog="Prints the pinned reference, ready for a volume's 'reference' attribute.",
    )
    parser.add_argument("source", metavar="SOURCE", help="a directory of model files, or one file")
    parser.add_argument(
        "reference",
        metavar="REFERENCE",
        help="registry/repository[:tag], or oci-layout:/directory[:tag]; the tag is 'latest' when none is given",
    )
    parser.add_argument("--plain-http", action="store_true", help="speak plain HTTP (loopback registries need no flag)")
    login.add_flags(parser)
    login.add_hosts_flag(parser)
    parser.add_argument("--name", help="the model's name, into its config")
    parser.add_argument("--model-version", metavar="VERSION", help="the model's version, into its config")
    parser.add_argument(
        "--annotation", action="append", default=[], metavar="KEY=VALUE", help="a manifest annotation; may be repeated"
    )
    parser.add_argument("--dry-run", action="store_true", help="hash and pack, send nothing")
    parser.add_argument("--output", choices=["text", "json"], default="text", help="what stdout gets (default: text)")
    parser.set_defaults(run=run)


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file on disk and where it goes in the model."""

    disk_path: str
    path: str


def run(args: argparse.Namespace) -> int:
    """Hash, pack, upload; progress on stderr, the outcome on stdout. Returns 0.

    Raises: InvalidVolumeError for wrong usage, any other ModelMountError for what failed.
    """
    reference = Reference.parse(args.reference)
    if reference.digest is not None:
        raise InvalidVolumeError(
            f"reference {args.reference!r}: has a digest, but the digest is the outcome of a push; name a tag or nothing",
            field="reference",
        )
    description = ModelDescription(
        name=args.name, version=args.model_version, annotations=_annotations(args.annotation)
    )
    credentials = login.credentials_of(args, reference)
    found, hidden = find_files(args.source)
    if hidden:
        shown = ", ".join(hidden[:_SHOWN_HIDDEN]) + (", …" if len(hidden) > _SHOWN_HIDDEN else "")
        print(f"left out as hidden: {shown}", file=sys.stderr)
    progress = _Progress()
    disk_paths = {file.path: file.disk_path for file in found}
    try:
        hashed = [_hash(file, progress) for file in found]
        sources = [
            SourceFile(file.path, blob.digest, blob.size_bytes) for file, blob in zip(found, hashed, strict=True)
        ]
        model = pack(sources, description, index.dump(hashed))
        progress.start(sum(file.size_bytes for file in model.files))
        states: Mapping[str, str] = {}
        if not args.dry_run:
            states = _send(_open_sink(args, reference, credentials), reference, model, disk_paths, progress)
    finally:
        progress.clear()
    _report(args.output, reference, model, states)
    if args.dry_run:
        print("dry run: nothing was sent", file=sys.stderr)
    return 0


def find_files(source: str) -> tuple[list[FoundFile], list[str]]:
    """The regular files to push, and the hidden ones and hidden directories left out; both in path order.

    A link to a file inside the directory is pushed as that file. Names are checked here, before anything is hashed.

    Raises: UnsupportedModelError for nothing to push, a link out of the directory or to a directory, something that is
    not a regular file, or a name that could not be mounted.
    """
    if os.path.isfile(source):
        return [FoundFile(source, check_member_path(os.path.basename(source), "source"))], []
    if not os.path.isdir(source):
        raise UnsupportedModelError(f"{source}: no such file or directory")
    root = os.path.realpath(source)
    found, hidden = [], []
    for directory, subdirectories, names in os.walk(root, onerror=_unreadable):
        hidden += [os.path.join(directory, name) + "/" for name in subdirectories if name.startswith(".")]
        subdirectories[:] = sorted(name for name in subdirectories if not name.startswith("."))
        for name in subdirectories:
            if os.path.islink(os.path.join(directory, name)):
                raise UnsupportedModelError(
                    f"{os.path.join(directory, name)}: is a link to a directory; push a copy of it (cp -rL)"
                )
        for name in sorted(names):
            path = os.path.join(directory, name)
            if name.startswith("."):
                hidden.append(path)
                continue
            _check_file(root, path)
            found.append(FoundFile(path, check_member_path(os.path.relpath(path, root), "source")))
    if not found:
        raise UnsupportedModelError(f"{source}: has no files to push" + (", only hidden ones" if hidden else ""))
    found.sort(key=lambda file: file.path)
    return found, sorted(os.path.relpath(path, root) + ("/" if path.endswith("/") else "") for path in hidden)


def _check_file(root: str, path: str) -> None:
    real = os.path.realpath(path)
    if os.path.commonpath([root, real]) != root:
        raise UnsupportedModelError(f"{path}: is a link out of {root}; push a copy of the directory (cp -rL)")
    if not os.path.exists(real):
        raise UnsupportedModelError(f"{path}: is a link to nothing; remove it")
    if not os.path.isfile(real):
        raise UnsupportedModelError(f"{path}: is not a regular file; remove it")


def _unreadable(error: OSError) -> None:
    raise UnsupportedModelError(f"{error.filename}: cannot be read: {error.strerror}") from error


def _hash(file: FoundFile, progress: _Progress) -> BlobHashes:
    progress.hashing(file.path)
    try:
        with open(file.disk_path, "rb", buffering=0) as opened:
            return index.hash_file(opened)
    except OSError as exc:
        raise UnsupportedModelError(f"{file.disk_path}: cannot be read: {exc.strerror}") from exc


def _open_sink(args: argparse.Namespace, reference: Reference, credentials: Credentials) -> ModelSink:
    """Imported here: only a push to a registry needs oras and its libraries."""
    if reference.is_layout:
        from csi.registry.layout_writer import LayoutWriter

        return LayoutWriter(reference)
    from csi.registry.upload import ModelUploader

    hosts = login.hosts_of(args, reference)
    return ModelUploader(reference, plain_http=args.plain_http, credentials=credentials, hosts=hosts)


def _send(
    sink: ModelSink, reference: Reference, model: PackedModel, disk_paths: Mapping[str, str], progress: _Progress
) -> dict[str, str]:
    """What became of each file, by path."""
    states: dict[str, str] = {}
    try:
        for file, layer in zip(model.files, model.layers, strict=True):
            states[file.path] = sink.put_file(layer, disk_paths[file.path], progress.on_progress)
            progress.finished(file, states[file.path])
        sink.finish(model, reference.tag or _DEFAULT_TAG)
    finally:
        sink.close()
    return states


def _report(output: str, reference: Reference, model: PackedModel, states: Mapping[str, str]) -> None:
    pinned = f"{reference.origin}@{model.digest}"
    if output == "text":
        print(pinned)
        return
    files = [
        {
            "digest": str(file.digest),
            "media_type": layer.media_type,
            "path": file.path,
            "size_bytes": file.size_bytes,
            "state": states.get(file.path, "planned"),
        }
        for file, layer in zip(model.files, model.layers, strict=True)
    ]
    outcome = {
        "digest": str(model.digest),
        "files": files,
        "manifest_size_bytes": len(model.manifest),
        "pushed_bytes": sum(file.size_bytes for file in model.files if states.get(file.path) == "uploaded"),
        "reference": pinned,
    }
    print(json.dumps(outcome, sort_keys=True))


def _annotations(given: list[str]) -> dict[str, str]:
    annotations: dict[str, str] = {}
    for text in given:
        key, separator, value = text.partition("=")
        if not separator or not key or key in annotations:
            raise InvalidVolumeError(f"--annotation {text!r}: expected KEY=VALUE, every KEY once", field="annotation")
        annotations[key] = value
    return annotations


class _Progress:
    """On stderr: a bar on a terminal, one line per finished file everywhere."""

    def __init__(self) -> None:
        self._bar = sys.stderr.isatty()
        self._total = 1
        self._before = 0  # bytes of the files that are finished
        self._sent = 0  # of those, bytes that were sent
        self._started = time.monotonic()
        self._drawn_at = 0.0

    def hashing(self, path: str) -> None:
        """A file is being hashed."""
        self._draw(f"hashing {path}")

    def start(self, total_bytes: int) -> None:
        """Hashing is over, so many bytes are to be there in the end."""
        self._total = max(1, total_bytes)
        self._started = time.monotonic()

    def on_progress(self, event: PushProgress) -> None:
        """Some of the current file is there."""
        if not self._bar or time.monotonic() - self._drawn_at < _REDRAW_S:
            return
        done = self._before + event.bytes_done
        rate = (self._sent + event.bytes_done) / max(1e-3, time.monotonic() - self._started) / 1e6
        filled = min(30, 30 * done // self._total)
        self._draw(
            f"{'█' * filled}{'░' * (30 - filled)} {size_text(done)} of {size_text(self._total)}  {rate:,.0f} MB/s  "
            f"{os.path.basename(event.path)}"
        )

    def finished(self, file: SourceFile, state: str) -> None:
        """A file is there."""
        self._before += file.size_bytes
        self._sent += file.size_bytes if state == "uploaded" else 0
        self.clear()
        print(f"{state:8} {size_text(file.size_bytes):>10}  {file.path}", file=sys.stderr)

    def clear(self) -> None:
        """Remove the bar."""
        if self._bar:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def _draw(self, line: str) -> None:
        if self._bar:
            self._drawn_at = time.monotonic()
            line = line[: shutil.get_terminal_size().columns - 1]  # a wrapped line cannot be overwritten
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
