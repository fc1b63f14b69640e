"""Which models can be shown as plain files: every file one whole blob as the registry has it. No I/O."""

from __future__ import annotations

from csi.oci.digest import Digest
from csi.tree.file_format import Tree
from csi.tree.model import Encoding, EntryKind

MAX_FILES = 20_000
"""Putting together a directory of so many takes a second; more are read through the worker."""


def plain_files(tree: Tree) -> list[tuple[str, Digest, int]]:
    """Path, blob and size of every file. Raises: ValueError with what keeps the model from being shown so."""
    if len(tree) > MAX_FILES:
        raise ValueError(f"it has {len(tree)} files and directories, more than {MAX_FILES}")
    files = []
    for inode in range(1, len(tree) + 1):
        entry = tree.entry(inode)
        if entry.kind is EntryKind.DIRECTORY:
            if not entry.child_count and inode > 1:
                raise ValueError(f"directory {tree.path(inode)!r} is empty")
            continue
        path = tree.path(inode)
        if entry.kind is not EntryKind.FILE:
            raise ValueError(f"{path!r} is a symbolic link")
        blob = tree.blobs[entry.blob]
        whole = entry.blob_offset == 0 and entry.size_bytes == blob.size_bytes and blob.encoding is Encoding.IDENTITY
        if not whole:
            raise ValueError(f"{path!r} is a part of an archive")
        if entry.executable:
            raise ValueError(f"{path!r} is executable")
        files.append((path, blob.digest, blob.size_bytes))
    return files
