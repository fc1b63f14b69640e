"""The rules of trees: what layers and members become, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from csi.errors import UnsupportedModelError
from csi.oci.archive.member import Member, MemberKind
from csi.oci.descriptor import Descriptor
from csi.oci.digest import Digest
from csi.oci.formats.plan import LayerPlan, ModelFormat, ModelPlan, Packing
from csi.oci.globs import Globs
from csi.oci.view import View
from csi.tree import file_format
from csi.tree.assemble import assemble
from csi.tree.file_format import Tree
from csi.tree.model import Encoding, EntryKind

SIZE = 1 << 20


def file(path: str, offset: int = 512, size: int = 3, **more: Any) -> Member:
    return Member(path, MemberKind.FILE, offset, size, **more)


def folder(path: str, mtime_s: int = 0) -> Member:
    return Member(path, MemberKind.DIRECTORY, 0, 0, mtime_s=mtime_s)


def link(path: str, target: str) -> Member:
    return Member(path, MemberKind.SYMLINK, 0, 0, target)


def hardlink(path: str, target: str) -> Member:
    return Member(path, MemberKind.HARDLINK, 0, 0, target)


def device(path: str) -> Member:
    return Member(path, MemberKind.SPECIAL, 0, 0)


def raw(path: str, content: bytes = b"x", **more: Any) -> LayerPlan:
    return LayerPlan(descriptor=Descriptor("a/b", Digest.of(content), len(content)), path=path, **more)


def archive(number: int = 0, packing: Packing = Packing.TAR, **more: Any) -> LayerPlan:
    return LayerPlan(descriptor=Descriptor("a/tar", Digest.of(bytes([number])), SIZE), packing=packing, **more)


def shown(tree: Tree) -> dict[str, Any]:
    """Path → (blob index, offset, size) of files, the target of links, None for directories."""
    found: dict[str, Any] = {}
    for inode in range(2, len(tree) + 1):
        entry = tree.entry(inode)
        match entry.kind:
            case EntryKind.FILE:
                found[tree.path(inode)] = (entry.blob, entry.blob_offset, entry.size_bytes)
            case EntryKind.SYMLINK:
                found[tree.path(inode)] = entry.target.decode()
            case _:
                found[tree.path(inode)] = None
    return found


def tree_of(plan: ModelPlan, *members: Sequence[Member], warnings: list[str] | None = None, **more: Any) -> Tree:
    said: list[str] = [] if warnings is None else warnings
    tree = Tree(file_format.dump(assemble(plan, dict(enumerate(members)), warn=said.append, **more)))
    assert warnings is not None or not said, said
    return tree


def image(*layers: Sequence[Member], **more: Any) -> dict[str, Any]:
    plans = tuple(archive(number) for number in range(len(layers)))
    return shown(tree_of(ModelPlan(format=ModelFormat.IMAGE, layers=plans, is_overlay=True), *layers, **more))


def artifact(*layers: Sequence[Member], **more: Any) -> dict[str, Any]:
    plans = tuple(archive(number) for number in range(len(layers)))
    return shown(tree_of(ModelPlan(format=ModelFormat.MODELPACK, layers=plans), *layers, **more))


def files(*layers: LayerPlan) -> dict[str, Any]:
    return shown(tree_of(ModelPlan(format=ModelFormat.MODELPACK, layers=layers)))


def refused(make: Any, *layers: Any, **more: Any) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        make(*layers, **more)
    assert str(caught.value).isprintable()
    return str(caught.value)


# --- raw layers -------------------------------------------------------------------------------------------------


def test_one_file_named_twice_is_one_and_two_of_one_name_are_refused() -> None:
    assert files(raw("a", b"1"), raw("./a", b"1")) == {"a": (0, 0, 1)}
    assert "layers[1]: 'a' is there already" in refused(files, raw("a", b"1"), raw("a", b"2"))


@pytest.mark.parametrize("paths", [("a", "a/b"), ("a/b/c", "a"), ("a/b", "x", "a/b/c/d")])
def test_a_name_cannot_be_file_and_directory(paths: tuple[str, ...]) -> None:
    message = refused(files, *(raw(path, path.encode()) for path in paths))
    assert "directory" in message


def test_names_that_only_look_alike_do_not_conflict() -> None:
    warnings: list[str] = []
    layers = tuple(raw(path, path.encode()) for path in ("a", "ab/c", "a.d/e", "A", "e\u0301", "\u00e9"))
    found = tree_of(ModelPlan(format=ModelFormat.ORAS, layers=layers), warnings=warnings)
    assert found.files == 6
    assert warnings == ["'A' and 'a' differ by case or accents only"]


def test_time_and_executable_bit_are_kept() -> None:
    plan = ModelPlan(format=ModelFormat.MODELPACK, layers=(raw("run", mtime_s=5, executable=True),))
    entry = tree_of(plan).entry(2)
    assert (entry.mtime_s, entry.executable) == (5, True)


def test_a_blob_is_stored_one_way_only() -> None:
    zipped = archive(7, Packing.TAR_GZIP)
    same = LayerPlan(descriptor=zipped.descriptor, path="as-it-is")
    plan = ModelPlan(format=ModelFormat.ORAS, layers=(same, zipped))
    with pytest.raises(UnsupportedModelError, match="archive and also as a file"):
        assemble(plan, {1: [file("a")]}, decoded_bytes={1: SIZE})


# --- archives of artifacts --------------------------------------------------------------------------------------


def test_members_files_folders_and_links() -> None:
    tree = artifact([folder("./"), folder("./d/", 9), file("./d/f", 1024, 7), link("d/l", "f"), hardlink("h", "d/f")])
    assert tree == {"d": None, "d/f": (0, 1024, 7), "d/l": "f", "h": (0, 1024, 7)}


def test_encoded_layers_have_offsets_in_what_they_decode_to() -> None:
    plan = ModelPlan(format=ModelFormat.KITOPS, layers=(archive(0, Packing.TAR_ZSTD),))
    tree = tree_of(plan, [file("a", SIZE * 4, 9)], decoded_bytes={0: SIZE * 5})
    assert (tree.blobs[0].encoding, tree.blobs[0].decoded_bytes) == (Encoding.ZSTD, SIZE * 5)


def test_a_base_and_a_root_of_members() -> None:
    plan = ModelPlan(format=ModelFormat.KITOPS, layers=(archive(base="old/kit"),))
    assert shown(tree_of(plan, [file("a"), hardlink("b", "a")])) == {
        "old": None,
        "old/kit": None,
        "old/kit/a": (0, 512, 3),
        "old/kit/b": (0, 512, 3),
    }
    rooted = ModelPlan(format=ModelFormat.ORAS, layers=(archive(member_root="d"),))
    assert set(shown(tree_of(rooted, [folder("d"), file("d/a")]))) == {"d", "d/a"}
    assert "outside the packed directory 'd'" in refused(tree_of, rooted, [file("da/x")])


def test_the_same_layer_listed_twice_is_one() -> None:
    plan = ModelPlan(format=ModelFormat.MODELPACK, layers=(archive(), archive()))
    assert shown(tree_of(plan, [file("a")], [file("a")])) == {"a": (0, 512, 3)}


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([[file("a"), file("a")]], "'a' is there already"),
        ([[file("a")], [file("a")]], "layers[1]: 'a' is there already"),
        ([[file("a"), file("a/b")]], "'a' is a file or link, and also the directory"),
        ([[file("a/b"), file("a")]], "'a' is a directory already"),
        ([[file("a"), folder("a")]], "'a' is there already"),
        ([[link("a", "b"), file("a/c"), folder("b")]], "'a' is a file or link, and also"),
        ([[device("null")]], "'null' is a device"),
        ([[file(".wh.a")]], "means a deletion"),
        ([[file("a/.wh..wh..opq")]], "means a deletion"),
        ([[file(".wh.d/x")]], "means a deletion"),
        ([[file("../a")]], "leads out of the model"),
        ([[file("/a")]], "is absolute"),
        ([[file("a/../b")]], "leads out"),
        ([[file("a\\b")]], "backslash"),
        ([[file("a//b")]], "empty or '.' segment"),
        ([[file("")]], "is empty"),
        ([[hardlink("b", "a"), file("a")]], "no file of that name comes before it"),
        ([[hardlink("b", "../../etc/passwd")]], "leads out of the model"),
        ([[folder("d"), hardlink("b", "d")]], "no file of that name"),
        ([[link("l", "")]], "no kernel would take"),
        ([[link("l", "a" * 4096)]], "no kernel would take"),
        ([[link("l", "/etc/passwd"), file("a")]], "link 'l' → '/etc/passwd' leads out of the model"),
        ([[link("d/l", "../../etc"), file("a")]], "leads out of the model"),
        ([[link("d/up", ".."), link("l", "d/up/.."), file("a")]], "link 'l' → 'd/up/..' leads out of the model"),
        ([[link("a", "b"), link("b", "a"), file("c")]], "leads in a circle"),
        ([[file("a", SIZE - 1, 2)]], "outside its blob"),
        ([[folder("only")]], "there are no files"),
    ],
)
def test_what_an_artifact_may_not_hold(layers: list[list[Member]], message: str) -> None:
    assert message in refused(artifact, *layers)


def test_links_of_an_artifact_that_stay_inside_are_kept_as_they_are() -> None:
    members = [folder("a/b"), file("a/f"), link("a/b/up", "../f"), link("top", "a/b/../f"), link("no", "a/nothing/x")]
    found = artifact(members)
    assert (found["a/b/up"], found["top"], found["no"]) == ("../f", "a/b/../f", "a/nothing/x")


# --- images -----------------------------------------------------------------------------------------------------


def test_the_later_layer_wins() -> None:
    assert image([file("a", 512), file("b")], [file("a", 1024)]) == {"a": (1, 1024, 3), "b": (0, 512, 3)}


def test_directories_merge_and_take_the_later_time() -> None:
    plan = ModelPlan(format=ModelFormat.IMAGE, layers=(archive(0), archive(1)), is_overlay=True)
    tree = tree_of(plan, [folder("d", 5), file("d/a")], [folder("d", 6), file("d/b")])
    assert set(shown(tree)) == {"d", "d/a", "d/b"}
    assert tree.entry(2).mtime_s == 6


@pytest.mark.parametrize("order", [1, -1])
def test_whiteouts_act_on_lower_layers_only_wherever_they_stand(order: int) -> None:
    lower = [file("d/old"), file("d/gone"), file("keep")]
    upper = [file("d/.wh.gone"), file("d/gone", 2048), file("d/.wh.absent"), file(".wh.nothing/deeper")]
    assert image(lower, upper[::order]) == {
        ".wh.nothing": None,
        ".wh.nothing/deeper": (1, 512, 3),
        "d": None,
        "d/gone": (1, 2048, 3),
        "d/old": (0, 512, 3),
        "keep": (0, 512, 3),
    }


@pytest.mark.parametrize("order", [1, -1])
def test_an_opaque_directory_hides_all_that_was_in_it(order: int) -> None:
    upper = [file("d/.wh..wh..opq"), file("d/new"), file("other")]
    assert set(image([file("d/a"), file("d/e/b")], upper[::order])) == {"d", "d/new", "other"}


def test_leftovers_of_old_storage_drivers_are_no_files() -> None:
    leftovers = [file(".wh..wh.aufs"), folder(".wh..wh.plnk"), file(".wh..wh.plnk/12.34"), file("a")]
    assert set(image(leftovers)) == {"a"}


@pytest.mark.parametrize("name", [".wh.", ".wh...", "d/.wh.."])
def test_a_whiteout_of_nothing_is_refused(name: str) -> None:
    assert "names nothing" in refused(image, [file("d/x")], [file(name)])


def test_a_file_replaces_a_directory_and_the_other_way_round() -> None:
    for lower in ("x/a/b", "x"):
        assert image([file(lower)], [file("x/a", 1024)]) == {"x": None, "x/a": (0, 1024, 3)}
    assert image([file("x"), file("y")], [folder("x")]) == {"x": None, "y": (0, 512, 3)}


def test_a_directory_that_came_back_is_a_new_one() -> None:
    layers = [[file("d/a")], [file(".wh.d")], [file("d/b")]]
    assert set(image(*layers)) == {"d", "d/b"}


def test_the_later_of_two_entries_in_one_layer_wins_with_a_warning() -> None:
    warnings: list[str] = []
    assert image([file("a", 512), file("a", 1024)], warnings=warnings) == {"a": (0, 1024, 3)}
    assert warnings == ["layers[0]: 'a' is there twice; the later entry is shown"]


def test_devices_are_left_out_and_hide_what_was_there() -> None:
    warnings: list[str] = []
    assert set(image([file("dev/x"), file("a")], [device("dev/x")], warnings=warnings)) == {"a", "dev"}
    assert warnings == ["layers[1]: 'dev/x' is a device, fifo or socket; left out"]


def test_hard_links_reach_into_lower_layers_and_outlive_their_target() -> None:
    found = image([file("a", 1024)], [hardlink("b", "/a"), hardlink("c", "b")], [file(".wh.a")])
    assert found == {"b": (0, 1024, 3), "c": (0, 1024, 3)}
    assert "no file of that name" in refused(image, [file("a")], [hardlink("b", "gone")])
    assert image([file("a"), hardlink("a", "a")], warnings=[]) == {"a": (0, 512, 3)}


def test_a_hard_link_to_a_link_is_that_link() -> None:
    assert image([file("a"), link("l", "a"), hardlink("m", "l")]) == {"a": (0, 512, 3), "l": "a", "m": "a"}


def test_names_are_those_of_the_root() -> None:
    assert set(image([file("/bin//tool"), file("./etc/./x"), folder("/")])) == {"bin", "bin/tool", "etc", "etc/x"}
    assert "leads out" in refused(image, [file("../x")])
    assert "leads out" in refused(image, [file("a/../../x")])


def test_names_that_linux_allows_and_we_do_not_show_are_left_out() -> None:
    warnings: list[str] = []
    assert set(image([file("system-systemd\\x2d.slice"), file("a")], warnings=warnings)) == {"a"}
    assert len(warnings) == 1
    assert "has a backslash; left out" in warnings[0]


def test_entries_below_a_linked_directory_go_where_the_link_leads() -> None:
    base = [folder("usr/lib"), link("lib", "usr/lib"), link("opt", "/usr/new"), file("usr/lib/a")]
    found = image(base, [file("lib/b", 1024), file("opt/c", 2048), file("lib/.wh.a")])
    assert found == {
        "lib": "usr/lib",
        "opt": "usr/new",
        "usr": None,
        "usr/lib": None,
        "usr/lib/b": (0, 1024, 3),
        "usr/new": None,
        "usr/new/c": (0, 2048, 3),
    }
    assert "link in a circle" in refused(image, [link("a", "b"), link("b", "a")], [file("a/x")])


@pytest.mark.parametrize(
    ("path", "target", "expected"),
    [
        ("l", "/a/f", "a/f"),
        ("a/b/l", "/a/f", "../f"),
        ("a/b/l", "/", "../.."),
        ("l", "/", "."),
        ("a/b/l", "../../../../a/f", "../f"),
        ("a/b/l", "../f", "../f"),
        ("a/b/l", "/etc/mtab", "../../etc/mtab"),
        ("l", "../../../proc/mounts", "proc/mounts"),
        ("l", "a/b/../f", "a/b/../f"),
    ],
)
def test_links_in_an_image_mean_its_root_and_never_leave_the_volume(path: str, target: str, expected: str) -> None:
    assert image([folder("a/b"), file("a/f"), link(path, target)])[path] == expected


def test_a_link_through_a_link_to_the_root_cannot_climb_out() -> None:
    found = image([link("a/up", "/"), link("l", "a/up/../../etc/passwd"), file("f")])
    assert (found["a/up"], found["l"]) == ("..", "etc/passwd")


def test_links_in_a_circle_are_left_out_of_an_image() -> None:
    warnings: list[str] = []
    assert set(image([link("a", "/b"), link("b", "/a"), file("c")], warnings=warnings)) == {"c"}
    assert "leads in a circle; left out" in warnings[0]


# --- views ------------------------------------------------------------------------------------------------------

CAR = [
    file("bin/sh"),
    file("models/blobs/1", 1024, 10),
    link("models/hf/model.bin", "../blobs/1"),
    link("models/model.file", "/models/blobs/1"),
    link("srv", "models"),
]


@pytest.mark.parametrize("sub_path", ["models", "srv", "models/"])
def test_a_sub_path_becomes_the_root(sub_path: str) -> None:
    assert image(CAR, view=View.parse({"subPath": sub_path})) == {
        "blobs": None,
        "blobs/1": (0, 1024, 10),
        "hf": None,
        "hf/model.bin": "../blobs/1",
        "model.file": "blobs/1",
    }


def test_a_link_out_of_the_sub_path_becomes_the_file_it_leads_to() -> None:
    assert image(CAR, view=View(sub_path="models/hf")) == {"model.bin": (0, 1024, 10)}


def test_a_link_out_of_the_sub_path_to_a_directory_is_refused_and_to_nothing_left_out() -> None:
    message = refused(image, [*CAR, link("models/hf/all", "../blobs")], view=View(sub_path="models/hf"))
    assert "link 'models/hf/all' → '../blobs' leads out of subPath to the directory 'models/blobs'" in message
    warnings: list[str] = []
    assert set(image([*CAR, link("models/hf/x", "/etc/x")], view=View(sub_path="models/hf"), warnings=warnings)) == {
        "model.bin"
    }
    assert warnings == ["link 'models/hf/x' → '/etc/x' leads out of the volume, to nothing; left out"]


def test_links_of_an_artifact_out_of_the_sub_path() -> None:
    members = [file("blobs/1", 1024, 10), link("hf/model.bin", "../blobs/1"), link("hf/in", "./model.bin")]
    assert artifact(members, view=View(sub_path="hf")) == {"in": (0, 1024, 10), "model.bin": (0, 1024, 10)}


@pytest.mark.parametrize("sub_path", ["nothing", "bin/sh", "models/blobs/1/x"])
def test_a_sub_path_that_is_no_directory_says_what_there_is(sub_path: str) -> None:
    message = refused(image, CAR, view=View(sub_path=sub_path))
    assert message == f"subPath {sub_path!r} is not a directory of this model; at its top there are bin, models, srv"


def test_only_blobs_that_are_shown_are_part_of_the_tree() -> None:
    layers = (raw("a/x", b"1"), raw("b/y", b"2"))
    plan = ModelPlan(format=ModelFormat.MODELPACK, layers=layers)
    assert [blob.digest for blob in tree_of(plan, view=View(sub_path="b")).blobs] == [Digest.of(b"2")]
    assert [blob.digest for blob in tree_of(plan, view=View(files=Globs.parse("a/*"))).blobs] == [Digest.of(b"1")]


def test_files_are_chosen_by_pattern() -> None:
    layers = tuple(raw(path, path.encode()) for path in ("a.json", "a.bin", "onnx/b.bin", "onnx/deep/c.json"))
    plan = ModelPlan(format=ModelFormat.MODELPACK, layers=layers)

    def chosen(patterns: str, sub_path: str = "") -> set[str]:
        return set(shown(tree_of(plan, view=View(sub_path=sub_path, files=Globs.parse(patterns)))))

    assert chosen("*.json") == {"a.json"}
    assert chosen("**/*.json") == {"a.json", "onnx", "onnx/deep", "onnx/deep/c.json"}
    assert chosen("b.bin", "onnx") == {"b.bin"}
    assert "there are a.bin, a.json, onnx" in refused(chosen, "*.gguf")


def test_a_chosen_link_to_a_file_left_out_becomes_the_file() -> None:
    members = [file("blobs/1", 1024, 10), link("model.bin", "blobs/1"), link("all", "blobs"), link("other", "x")]
    warnings: list[str] = []
    assert artifact(members, view=View(files=Globs.parse("model.bin,all")), warnings=warnings) == {
        "model.bin": (0, 1024, 10)
    }
    assert "to a directory without any chosen file; left out" in warnings[0]


# --- limits -----------------------------------------------------------------------------------------------------


def test_the_number_of_entries_is_limited() -> None:
    members = [file(f"d/{number}") for number in range(100)]
    assert len(artifact(members, max_entries=102)) == 101
    assert "more than 100 files, directories and links" in refused(artifact, members, max_entries=100)


def test_warnings_are_bounded() -> None:
    warnings: list[str] = []
    image([file("a"), *(device(f"d{number}") for number in range(1000))], warnings=warnings)
    assert len(warnings) == 33
    assert warnings[-1] == "and 968 more warnings like these"


def test_links_cannot_make_work_without_end() -> None:
    """Chains of links that double the work at each step: 2^n components from n links."""
    chain = [link(f"l{number}", f"l{number + 1}/l{number + 1}") for number in range(60)]
    many = [link(f"m{number}", "/".join(["l0"] * 1000)) for number in range(2000)]
    assert set(image([file("a"), *chain, *many], warnings=[])) >= {"a"}
