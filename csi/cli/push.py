"""`modelmount push`: a directory of model files becomes a ModelPack artifact that streams well."""

from __future__ import annotations

import argparse
import getpass
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from csi.errors import InvalidVolumeError, ModelMountError, UnsupportedModelError
from csi.oci.digest import Digest
from csi.oci.modelpack import ModelDescription, PackedModel, SourceFile, pack
from csi.oci.reference import Reference


def add_parser(subparsers: Any) -> None:
    """Register the verb."""
    parser = subparsers.add_parser(
        "push",
        help="push model files to a registry",
        description="Push a directory (or one file) as a CNCF ModelPack artifact: one uncompressed layer per file, the "
        "same digest for the same files. Files the repository has already are not sent again. Hidden files are left out.",
        epilog="Prints the pinned reference, ready for a volume's 'reference' attribute.",
    )
    parser.add_argument("source", help="a directory of model files, or one file")
    parser.add_argument("reference", help="registry/repository:tag, or oci-layout:/directory[:tag]")
    parser.add_argument("--plain-http", action="store_true", help="speak plain HTTP (loopback registries need no flag)")
    parser.add_argument("--username", help="registry user")
    parser.add_argument("--password-stdin", action="store_true", help="read the registry password from stdin")
    parser.add_argument("--name", help="the model's name, into its config")
    parser.add_argument("--model-version", metavar="VERSION", help="the model's version, into its config")
    parser.add_argument(
        "--annotation", action="append", default=[], metavar="KEY=VALUE", help="a manifest annotation; may be repeated"
    )
    parser.add_argument("--dry-run", action="store_true", help="hash and pack, send nothing")
    parser.add_argument("--output", choices=["text", "json"], default="text")
    parser.set_defaults(run=run)


@dataclass(frozen=True, slots=True)
class _Found:
    """A file on disk and where it goes in the model."""

    disk_path: str
    path: str


def run(args: argparse.Namespace) -> int:
    """Hash, pack, upload."""
    reference = Reference.parse(args.reference)
    if reference.digest is not None:
        raise InvalidVolumeError(f"reference {args.reference!r}: push to a tag; the digest is the outcome of a push")
    description = ModelDescription(
        name=args.name, version=args.model_version, annotations=_annotations(args.annotation)
    )
    found, hidden = find_files(args.source)
    if hidden and args.output == "text":
        print(f"left out {len(hidden)} hidden files, such as {hidden[0]}", file=sys.stderr)
    disk_paths = {file.path: file.disk_path for file in found}
    model = pack([_hash(file) for file in found], description)
    states = {} if args.dry_run else _send(args, reference, model, disk_paths)
    _report(args, reference, model, states)
    return 0


def find_files(source: str) -> tuple[list[_Found], list[str]]:
    """The regular files to push, and the hidden ones left out, both in path order.

    Raises: UnsupportedModelError for nothing to push, a link out of the directory, a device or an unreadable file.
    """
    if os.path.isfile(source):
        return [_Found(source, os.path.basename(source))], []
    if not os.path.isdir(source):
        raise UnsupportedModelError(f"{source}: no such file or directory")
    root = os.path.realpath(source)
    found, hidden = [], []
    for directory, subdirectories, names in os.walk(root, onerror=_unreadable):
        hidden += [os.path.join(directory, name) + "/" for name in subdirectories if name.startswith(".")]
        subdirectories[:] = sorted(name for name in subdirectories if not name.startswith("."))
        for name in subdirectories:
            if os.path.islink(os.path.join(directory, name)):
                raise UnsupportedModelError(f"{directory}/{name}: is a link to a directory; copy the files instead")
        for name in sorted(names):
            path = os.path.join(directory, name)
            if name.startswith("."):
                hidden.append(path)
                continue
            real = os.path.realpath(path)
            if not real.startswith(root + os.sep):
                raise UnsupportedModelError(f"{path}: is a link out of {source}; copy the file instead")
            if not os.path.isfile(real):
                raise UnsupportedModelError(f"{path}: is not a regular file")
            found.append(_Found(path, os.path.relpath(path, root)))
    if not found:
        raise UnsupportedModelError(f"{source}: has no files to push" + (" but hidden ones" if hidden else ""))
    return found, [os.path.relpath(path, root) for path in hidden]


def _unreadable(error: OSError) -> None:
    raise UnsupportedModelError(f"{error.filename}: {error.strerror}")


def _hash(file: _Found) -> SourceFile:
    try:
        with open(file.disk_path, "rb") as opened:
            digest = Digest("sha256", hashlib.file_digest(opened, "sha256").hexdigest())
            size = opened.tell() or os.fstat(opened.fileno()).st_size
    except OSError as exc:
        raise UnsupportedModelError(f"{file.disk_path}: {exc.strerror}") from exc
    return SourceFile(file.path, digest, size)


def _send(
    args: argparse.Namespace, reference: Reference, model: PackedModel, disk_paths: dict[str, str]
) -> dict[str, str]:
    """What became of each file, by path."""
    from csi.registry.layout_writer import LayoutWriter
    from csi.registry.upload import ModelUploader

    progress = _Progress(sum(file.size_bytes for file in model.files), quiet=args.output == "json")
    states: dict[str, str] = {}
    if reference.is_layout:
        writer = LayoutWriter(reference)
        for file in model.files:
            states[file.path] = writer.add_file(file.digest, disk_paths[file.path])
            progress.done(file, states[file.path])
        writer.finish(model)
        return states
    uploader = ModelUploader(reference, plain_http=args.plain_http, credentials=_credentials(args))
    try:
        for file, layer in zip(model.files, model.layers, strict=True):
            try:
                states[file.path] = uploader.upload_file(layer, disk_paths[file.path], progress.bytes_sent(file))
            except OSError as exc:
                raise UnsupportedModelError(f"{disk_paths[file.path]}: {exc.strerror}") from exc
            progress.done(file, states[file.path])
        uploader.upload_bytes(model.config_descriptor, model.config)
        uploader.upload_manifest(model.manifest, [reference.tag or "latest"])
    except ModelMountError:
        progress.clear()
        raise
    finally:
        uploader.close()
    return states


def _report(args: argparse.Namespace, reference: Reference, model: PackedModel, states: dict[str, str]) -> None:
    pinned = f"{reference.origin}@{model.digest}"
    if args.output == "json":
        files = [
            {
                "digest": str(file.digest),
                "media_type": layer.media_type,
                "path": file.path,
                "size_bytes": file.size_bytes,
                "state": states.get(file.path, "packed"),
            }
            for file, layer in zip(model.files, model.layers, strict=True)
        ]
        pushed = sum(file.size_bytes for file in model.files if states.get(file.path) == "uploaded")
        print(
            json.dumps(
                {
                    "digest": str(model.digest),
                    "files": files,
                    "manifest_size_bytes": len(model.manifest),
                    "pushed_bytes": pushed,
                    "reference": pinned,
                },
                sort_keys=True,
            )
        )
        return
    print(pinned)


def _annotations(given: list[str]) -> dict[str, str]:
    annotations = {}
    for text in given:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise InvalidVolumeError(f"--annotation {text!r}: expected KEY=VALUE")
        annotations[key] = value
    return annotations


def _credentials(args: argparse.Namespace) -> Any:
    from csi.registry.auth import Credentials

    if not args.username:
        if args.password_stdin:
            raise InvalidVolumeError("--password-stdin needs --username")
        return None
    password = sys.stdin.readline().rstrip("\n") if args.password_stdin else getpass.getpass("registry password: ")
    return Credentials(args.username, password)


class _Progress:
    """A bar on a terminal, one line per finished file elsewhere, nothing when quiet. On stderr."""

    def __init__(self, total_bytes: int, *, quiet: bool) -> None:
        self._total = max(1, total_bytes)
        self._sent = 0
        self._quiet = quiet
        self._bar = sys.stderr.isatty() and not quiet
        self._started = time.monotonic()
        self._drawn_at = 0.0

    def bytes_sent(self, file: SourceFile) -> Callable[[int], None]:
        """A callback for one file's bytes."""

        def add(count: int) -> None:
            self._sent += count
            if self._bar and time.monotonic() - self._drawn_at > 0.1:
                self._drawn_at = time.monotonic()
                rate = self._sent / max(1e-3, self._drawn_at - self._started) / 1e6
                filled = min(30, 30 * self._sent // self._total)
                print(
                    f"\r\033[K{'█' * filled}{'░' * (30 - filled)} {self._sent / 1e6:,.0f} of {self._total / 1e6:,.0f} MB "
                    f"{rate:,.0f} MB/s  {file.path[-30:]}",
                    end="",
                    file=sys.stderr,
                    flush=True,
                )

        return add

    def done(self, file: SourceFile, state: str) -> None:
        """A file is there."""
        self.clear()
        if not self._quiet:
            print(f"{state:9} {file.size_bytes / 1e6:10,.2f} MB  {file.path}", file=sys.stderr)

    def clear(self) -> None:
        """Remove the bar."""
        if self._bar:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
