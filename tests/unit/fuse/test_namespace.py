"""What requests about each kind of entry get."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from csi.fuse.port import Namespace, NoSuchEntryError, mode_of
from csi.oci.digest import Digest
from csi.tree import file_format, model
from csi.tree.file_format import Tree
from csi.tree.model import BlobSpec, TreeFile, TreeSymlink

DIRECTORY, FILE, LINK = 2, 3, 4
NAMESPACE = Namespace(
    Tree(
        file_format.dump(
            model.build(
                [
                    TreeSymlink("model", "a/b"),
                    TreeFile("file", BlobSpec(Digest.of(b""), 0), 0, 0),
                    TreeFile("a/b", BlobSpec(Digest.of(b""), 0), 0, 0),
                ]
            )
        )
    )
)


def test_a_symlink_is_read_not_opened() -> None:
    assert NAMESPACE.readlink(LINK) == b"a/b"
    assert stat.S_ISLNK(mode_of(NAMESPACE.entry(LINK)))
    with pytest.raises(NoSuchEntryError) as caught:
        NAMESPACE.open(LINK, os.O_RDONLY)
    assert caught.value.errno == errno.ELOOP
    with pytest.raises(NoSuchEntryError) as caught:
        NAMESPACE.lookup(LINK, b"b")
    assert caught.value.errno == errno.ENOTDIR


@pytest.mark.parametrize("inode", [DIRECTORY, FILE])
def test_nothing_else_has_a_target(inode: int) -> None:
    with pytest.raises(NoSuchEntryError) as caught:
        NAMESPACE.readlink(inode)
    assert caught.value.errno == errno.EINVAL
