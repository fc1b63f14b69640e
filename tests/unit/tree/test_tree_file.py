"""The serialised tree against a plain dict, and its bytes on disk."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi.errors import ContentError, UnsupportedModelError
from csi.oci.digest import Digest
from csi.tree import file_format, model
from csi.tree.file_format import Tree
from csi.tree.model import BlobSpec, Encoding, EntryKind, TreeFile, TreeSymlink

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
    assert dict.fromkeys(sorted(found)) == dict.fromkeys(sorted(path for path, _ in tree.walk_files()))
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
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ContentError):
        Tree(bytes(content))


@given(st.binary(max_size=300))
def test_anything_else_is_refused(content: bytes) -> None:
    with pytest.raises(ContentError):
        Tree(content)


GZIPPED = BlobSpec(Digest("sha512", "ab" * 64), 1 << 20, Encoding.GZIP, 1 << 33, "r.example/parent")
CONTENT: list[TreeFile | TreeSymlink] = [
    TreeFile("config.json", BlobSpec(Digest.of(b"c"), 10), 0, 10, mtime_s=7),
    TreeFile("bin/run", GZIPPED, 3, 1 << 32, executable=True),
    TreeSymlink("bin/walk", "../config.jsön", mtime_s=9),
]


def test_links_encodings_and_origins_come_back() -> None:
    tree = Tree(file_format.dump(model.build(CONTENT)))
    link = tree.entry(5)
    assert (link.kind, link.target, link.size_bytes) == (EntryKind.SYMLINK, "../config.jsön".encode(), 15)
    assert (link.name, link.mtime_s, link.blob, link.blob_offset) == (b"walk", 9, -1, 0)
    assert set(tree.blobs) == {BlobSpec(Digest.of(b"c"), 10), GZIPPED}
    assert tree.blobs[tree.entry(4).blob] == GZIPPED
    assert (tree.files, tree.total_bytes) == (2, (1 << 32) + 10)


def test_a_file_in_an_encoded_blob_lies_within_what_it_decodes_to() -> None:
    with pytest.raises(UnsupportedModelError, match="outside"):
        model.build([TreeFile("a", GZIPPED, 1 << 33, 1)])


@pytest.mark.parametrize("spec", [(Encoding.GZIP, None), (Encoding.IDENTITY, 5)])
def test_only_an_encoded_blob_has_a_decoded_size(spec: tuple[Encoding, int | None]) -> None:
    with pytest.raises(ValueError, match="decoded size"):
        BlobSpec(Digest.of(b"x"), 10, *spec)


@pytest.mark.parametrize("target", ["", "a" * 4096, "a\0b"])
def test_a_target_no_kernel_would_take_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match="target"):
        file_format.dump(model.build([TreeSymlink("a", target)]))


def test_the_bytes_on_disk_are_those_of_version_2() -> None:
    """A live mount's later workers read this file. Changed on purpose? Bump VERSION and keep reading version 2."""
    content = file_format.dump(model.build(CONTENT))
    assert hashlib.sha256(content).hexdigest() == "6b4eded58a0c7517c5c9ca01680da2e04522603aa379d7447ade1dcd61cd6b23"


def test_a_file_of_version_1_is_still_read() -> None:
    """Mounts made by an earlier version may live: their trees never change."""
    tree = Tree(bytes.fromhex((Path(__file__).parents[2] / "data" / "tree-version-1.hex").read_text()))
    assert [(path, entry.inode) for path, entry in tree.walk_files()] == [("config.json", 3), ("bin/run", 4)]
    assert (tree.files, tree.total_bytes) == (2, (1 << 32) + 10)
    assert tree.blobs == (BlobSpec(Digest.of(b"c"), 10), BlobSpec(Digest("sha512", "ab" * 64), 1 << 33))
    assert tree.entry(4).executable
    assert tree.entry(4).blob_offset == 3
