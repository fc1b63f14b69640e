"""The flags that choose what of a model is shown, for every verb that shows one."""

from __future__ import annotations

import argparse

from csi.oci.view import View


def add_view_flags(parser: argparse.ArgumentParser) -> None:
    """`--variant`, `--sub-path` and `--files`, as the volume attributes of these names."""
    parser.add_argument(
        "--variant",
        default="",
        metavar="SELECTOR",
        help="of an index: KEY=VALUE of an annotation, a platform, a digest, or any annotation's value",
    )
    parser.add_argument("--sub-path", default="", metavar="DIRECTORY", help="show only what is below this directory")
    parser.add_argument(
        "--files", default="", metavar="PATTERNS", help="show only these: *.safetensors, onnx/**; separated by commas"
    )


def view_of(args: argparse.Namespace) -> View:
    """Raises: InvalidVolumeError naming the attribute."""
    return View.parse({"variant": args.variant, "subPath": args.sub_path, "files": args.files})
