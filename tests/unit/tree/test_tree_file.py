"""The serialised tree against a plain dict, and its bytes on disk."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi.errors import ContentError, UnsupportedModelError
from csi.oci.digest import Digest
from csi.tree import file_format, model
from csi.tree.file_format import Tree
from csi.tree.model import BlobSpec, EntryKind, TreeFile

BLOB = BlobSpec(Digest.of(b"x"), 1 << 40)


def tree_of(paths: list[str]) -> Tree:
    return Tree(
        file_format.dump(model.build(TreeFile(path, BLOB, number, number + 1) for number, path in enumerate(paths)))
    )


names = st.text(alphabet="ab.é", min_size=1, max_size=3).filter(lambda name: name not in (".", ".."))
paths = st.lists(st.lists(names, min_size=1, max_size=4).map("/".join), unique=True, max_size=30)


def without_conflicts(found: list[str]) -> list[str]:
    return [path for path in found if not any(other.startswith(path + "/") for other in found)]


@given(paths.map(without_conflicts))
def test_every_file_is_found_by_walking_and_by_looking_up(found: list[str]) -> None:
    tree = tree_of(found)
    assert dict.fromkeys(sorted(found)) == dict.fromkeys(sorted(path for path, _ in tree.files()))
    for number, path in enumerate(found):
        inode = 1
        for name in path.encode().split(b"/"):
            found_entry = tree.lookup(inode, name)
            assert found_entry is not None
            assert found_entry.parent == inode
            inode = found_entry.inode
        entry = tree.entry(inode)
        assert (entry.kind, entry.blob_offset, entry.size_bytes) == (EntryKind.FILE, number, number + 1)
        assert tree.path(inode) == path
        assert tree.lookup(inode, b"a") is None, "a file has no children"
    for inode in range(1, len(tree) + 1):
        children = [child.name for child in tree.children(inode)]
        assert children == sorted(set(children))


@given(paths.map(without_conflicts), st.randoms())
def test_the_order_of_layers_does_not_change_a_single_byte(found: list[str], random: object) -> None:
    files = [TreeFile(path, BLOB, 0, 5) for path in found]
    shuffled = list(files)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert file_format.dump(model.build(files)) == file_format.dump(model.build(shuffled))


@pytest.mark.parametrize("pair", [["a", "a/b"], ["a/b", "a"], ["a", "a"]])
def test_a_name_cannot_be_two_things(pair: list[str]) -> None:
    with pytest.raises(UnsupportedModelError):
        tree_of(pair)


def test_a_file_outside_its_blob_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="outside"):
        model.build([TreeFile("a", BlobSpec(Digest.of(b"x"), 10), 5, 6)])


@given(st.data())
def test_damage_anywhere_is_found(data: st.DataObject) -> None:
    content = bytearray(file_format.dump(model.build([TreeFile("a/b", BLOB, 0, 5)])))
    position = data.draw(st.integers(0, len(content) - 1))
    if 72 <= position < 80:
        return  # padding of the header
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ContentError):
        Tree(bytes(content))


@given(st.binary(max_size=300))
def test_anything_else_is_refused(content: bytes) -> None:
    with pytest.raises(ContentError):
        Tree(content)


def test_the_bytes_on_disk_are_those_of_version_1() -> None:
    """A live mount's later workers read this file. Changed on purpose? Bump VERSION and keep reading version 1."""
    content = file_format.dump(
        model.build(
            [
                TreeFile("config.json", BlobSpec(Digest.of(b"c"), 10), 0, 10, mtime_s=7),
                TreeFile("bin/run", BlobSpec(Digest("sha512", "ab" * 64), 1 << 33), 3, 1 << 32, executable=True),
            ]
        )
    )
    assert hashlib.sha256(content).hexdigest() == "079e6b083346f30622b36f538a501aef36b44d1f873567bd8bad6e3de4089e2b"
    tree = Tree(content)
    assert [(path, entry.inode) for path, entry in tree.files()] == [("config.json", 3), ("bin/run", 4)]
    assert tree.blobs[tree.entry(4).blob].digest.algorithm == "sha512"
