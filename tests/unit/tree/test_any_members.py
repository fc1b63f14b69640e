"""Any plan and any members give a sound tree or our error; images against a model that does what extracting would do."""

from __future__ import annotations

import posixpath

from hypothesis import given
from hypothesis import strategies as st

from csi.errors import ContentError
from csi.oci.archive.member import Member, MemberKind
from csi.oci.descriptor import Descriptor
from csi.oci.digest import Digest
from csi.oci.formats.plan import LayerPlan, ModelFormat, ModelPlan, Packing
from csi.oci.globs import Globs
from csi.oci.view import View
from csi.tree import file_format
from csi.tree.assemble import assemble
from csi.tree.file_format import Tree
from csi.tree.model import EntryKind

SIZE = 1 << 16

_names = st.sampled_from(["a", "b", "c", "models", ".", "..", ".wh.a", ".wh..wh..opq", ".wh.", "x\\y", "é", ""])
_paths = st.lists(_names, min_size=1, max_size=4).map("/".join) | st.text(max_size=6)
_targets = st.lists(st.sampled_from(["a", "b", "c", "..", ".", "models", "a/.."]), min_size=1, max_size=5).map("/".join)
_any_target = _targets | _targets.map(lambda text: "/" + text) | st.text(max_size=4)
_members = st.builds(
    Member,
    _paths,
    st.sampled_from(list(MemberKind)),
    st.integers(0, SIZE),
    st.integers(0, 10),
    _any_target,
    st.booleans(),
    st.integers(-5, 2**62),
)
_layers = st.lists(st.lists(_members, max_size=8), min_size=1, max_size=3)
_views = st.builds(
    View,
    sub_path=st.sampled_from(["", "", "a", "models", "a/b"]),
    files=st.sampled_from([Globs(), Globs(), Globs.parse("*"), Globs.parse("**/b,a")]),
)


def plan_of(count: int, *, is_overlay: bool, base: str = "") -> ModelPlan:
    layers = tuple(
        LayerPlan(descriptor=Descriptor("t", Digest.of(bytes([n])), SIZE), packing=Packing.TAR, base=base)
        for n in range(count)
    )
    return ModelPlan(format=ModelFormat.IMAGE, layers=layers, is_overlay=is_overlay)


def tree_or_error(layers: list[list[Member]], view: View, *, is_overlay: bool, base: str = "") -> Tree | ContentError:
    try:
        plan = plan_of(len(layers), is_overlay=is_overlay, base=base)
        return Tree(file_format.dump(assemble(plan, dict(enumerate(layers)), view=view)))
    except ContentError as exc:
        return exc


def follow(tree: Tree, inode: int, path: str) -> tuple[int | None, bool]:
    """As the kernel walks it: where it ends, and whether it left the mount on the way."""
    todo = path.split("/")[::-1]
    if path.startswith("/"):
        return None, True
    hops = 0
    while todo:
        part = todo.pop()
        if part in ("", "."):
            continue
        if part == "..":
            if inode == 1:
                return None, True
            inode = tree.entry(inode).parent
            continue
        found = tree.lookup(inode, part.encode())
        if found is None:
            return None, False
        if found.kind is EntryKind.SYMLINK:
            hops += 1
            if hops > 40:
                return None, False
            target = found.target.decode()
            if target.startswith("/"):
                return None, True
            todo += target.split("/")[::-1]
            continue
        inode = found.inode
    return inode, False


def check(tree: Tree) -> None:
    for inode in range(1, len(tree) + 1):
        entry = tree.entry(inode)
        assert entry.name not in (b".", b"..")
        assert b"/" not in entry.name
        assert b"\\" not in entry.name
        if entry.kind is EntryKind.SYMLINK:
            _, left = follow(tree, entry.parent, entry.target.decode())
            assert not left, f"{tree.path(inode)} → {entry.target!r} leaves the mount"
        if entry.kind is EntryKind.FILE:
            assert entry.blob_offset + entry.size_bytes <= tree.blobs[entry.blob].content_bytes
    assert tree.files > 0


@given(_layers, _views)
def test_any_image_is_a_sound_tree_or_our_error(layers: list[list[Member]], view: View) -> None:
    found = tree_or_error(layers, view, is_overlay=True)
    if isinstance(found, Tree):
        check(found)


@given(_layers, _views, st.sampled_from(["", "d", "d/e"]))
def test_any_artifact_is_a_sound_tree_or_our_error(layers: list[list[Member]], view: View, base: str) -> None:
    found = tree_or_error(layers, view, is_overlay=False, base=base)
    if isinstance(found, Tree):
        check(found)
        names = [tree_name for inode in range(2, len(found) + 1) for tree_name in [found.entry(inode).name]]
        assert not any(name.startswith(b".wh.") for name in names)


_plain = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=3)
_plain_paths = _plain.map("/".join)
_plain_members = st.one_of(
    st.builds(Member, _plain_paths, st.just(MemberKind.FILE), st.integers(0, 1000), st.integers(0, 10)),
    st.builds(Member, _plain_paths, st.just(MemberKind.DIRECTORY), st.just(0), st.just(0)),
    st.builds(
        Member,
        _plain.map(lambda parts: "/".join([*parts[:-1], ".wh." + parts[-1]])),
        st.just(MemberKind.FILE),
        st.just(0),
        st.just(0),
    ),
    st.builds(
        Member,
        _plain.map(lambda parts: "/".join([*parts[:-1], ".wh..wh..opq"])),
        st.just(MemberKind.FILE),
        st.just(0),
        st.just(0),
    ),
)


class Extracted:
    """A directory that layers are unpacked into, one after another, as the image-spec says."""

    def __init__(self) -> None:
        self.entries: dict[str, tuple[int, int, int] | None] = {}

    def remove(self, path: str) -> None:
        for held in list(self.entries):
            if held == path or held.startswith(path + "/"):
                del self.entries[held]

    def apply(self, layer: int, members: list[Member]) -> None:
        for member in members:
            head, name = posixpath.split(member.path)
            if name == ".wh..wh..opq":
                for held in list(self.entries):
                    if held.startswith(head + "/" if head else ""):
                        self.entries.pop(held)
            elif name.startswith(".wh."):
                self.remove(posixpath.join(head, name[4:]))
        for member in members:
            parts = member.path.split("/")
            if parts[-1].startswith(".wh."):
                continue
            for depth in range(1, len(parts)):
                parent = "/".join(parts[:depth])
                if self.entries.get(parent, ()) is not None:
                    self.remove(parent)
                    self.entries[parent] = None
            if member.kind is MemberKind.DIRECTORY:
                if self.entries.get(member.path, ()) is not None:
                    self.remove(member.path)
                    self.entries[member.path] = None
                continue
            self.remove(member.path)
            self.entries[member.path] = (layer, member.offset, member.size_bytes)


@given(st.lists(st.lists(_plain_members, max_size=8), min_size=1, max_size=4))
def test_an_image_is_what_extracting_its_layers_in_order_leaves(layers: list[list[Member]]) -> None:
    expected = Extracted()
    for number, members in enumerate(layers):
        expected.apply(number, members)
    found = tree_or_error(layers, View(), is_overlay=True)
    if not any(entry is not None for entry in expected.entries.values()):
        assert isinstance(found, ContentError)
        return
    assert isinstance(found, Tree), found
    layer_of = {
        blob.digest: number
        for number in range(len(layers))
        for blob in found.blobs
        if blob.digest == Digest.of(bytes([number]))
    }
    shown: dict[str, tuple[int, int, int] | None] = {}
    for inode in range(2, len(found) + 1):
        entry = found.entry(inode)
        is_file = entry.kind is EntryKind.FILE
        place = layer_of[found.blobs[entry.blob].digest] if is_file else 0
        shown[found.path(inode)] = (place, entry.blob_offset, entry.size_bytes) if is_file else None
    assert shown == expected.entries
