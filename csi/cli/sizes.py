"""Sizes for people."""

from __future__ import annotations


def size_text(size_bytes: int) -> str:
    """`612 B`, `90.9 MB`, in powers of 1000 as registries and vendors count."""
    if size_bytes < 1000:
        return f"{size_bytes} B"
    size = size_bytes / 1e3
    for unit in ("kB", "MB", "GB"):
        if size < 999.95:
            return f"{size:.1f} {unit}"
        size /= 1e3
    return f"{size:.1f} TB"
