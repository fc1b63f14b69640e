"""Writes the pages that are made from tables in the code. `--check` fails when one is stale."""

from __future__ import annotations

import sys
from pathlib import Path

from csi.observe import metrics

DOCS = Path(__file__).resolve().parent

_METRICS = """# Metrics

Written by `docs/generate.py` from `csi/observe/metrics.py`; do not edit. What to do about each: [operate.md](operate.md).

`modelmount node --metrics-address HOST:PORT` serves them at `/metrics` (the chart does, at `node.metrics.port`), and its own
health at `/healthz`. The supervisor opens no port: the node asks it at each scrape. `stable` metrics keep name, labels and
meaning until the next major version. Labels of a mount: `mount` is its id, `model` the repository, `digest` the manifest's.
Counters of a mount begin again at 0 when its worker or fetcher is replaced, and end with the mount.

"""


def pages() -> dict[Path, str]:
    """Path and content of every generated page."""
    return {DOCS / "metrics.md": _METRICS + metrics.as_markdown()}


def main() -> int:
    """Write, or with `--check` compare."""
    stale = [path for path, content in pages().items() if not path.exists() or path.read_text("utf-8") != content]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.name} is stale: make docs", file=sys.stderr)
        return 1 if stale else 0
    for path, content in pages().items():
        path.write_text(content, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
