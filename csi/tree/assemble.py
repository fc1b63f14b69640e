"""From a plan and the members of its archives to a tree, by the rules of the kind of model.

    image      a file system in layers: the later layer wins, whiteouts remove what lower layers have (whatever their place
               in their own layer), a duplicate within a layer wins over the earlier one, devices are left out; `/` and
               `..` in links and members mean the image's root, and links in the way are followed, as in a container
    artifact   files from many places that must not disagree: one name twice is an error unless it is the very same bytes,
               so are a file that is also a directory, devices, whiteouts, names or links that lead outside

Nothing is ever unpacked, so a name cannot write anywhere; the rules keep one manifest from meaning two trees. Modes are
0444, 0555 with any x bit; owners are the mount's. Work and memory grow with the number of members and no faster.

Source: OCI image-spec layer.md (whiteouts, hard links); what extractors learnt from their path-traversal advisories.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Mapping

from csi.errors import UnsupportedModelError
from csi.oci.archive.member import Member, MemberKind
from csi.oci.formats.plan import LayerPlan, ModelPlan, Packing
from csi.oci.globs import Globs
from csi.oci.paths import check_member_path
from csi.oci.view import View
from csi.tree.links import LinkSettler, Walker
from csi.tree.model import BlobSpec, Encoding, EntryKind, TreeBuilder, TreeContent, check_extent

MAX_ENTRIES = 1_000_000
"""Files, directories and links of one model."""

_MAX_WARNINGS = 32
_MAX_LISTED = 12
_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"
_MTIME_LIMIT_S = 2**40
_ENCODINGS = {
    Packing.RAW: Encoding.IDENTITY,
    Packing.TAR: Encoding.IDENTITY,
    Packing.TAR_GZIP: Encoding.GZIP,
    Packing.TAR_ZSTD: Encoding.ZSTD,
}

_ROOT = TreeBuilder.ROOT
_FILE, _DIRECTORY, _SYMLINK = int(EntryKind.FILE), int(EntryKind.DIRECTORY), int(EntryKind.SYMLINK)


def assemble(
    plan: ModelPlan,
    members: Mapping[int, Iterable[Member]] | None = None,
    *,
    decoded_bytes: Mapping[int, int] | None = None,
    view: View | None = None,
    warn: Callable[[str], None] | None = None,
    max_entries: int = MAX_ENTRIES,
) -> TreeContent:
    """The tree. `members` has, by layer position, what each archive of the plan holds, in archive order; of an image they
    are iterated twice. `decoded_bytes` has the size of the tar stream of each compressed layer. `warn` is told what was
    left out or looks odd, a bounded number of times.

    Raises: UnsupportedModelError naming the layer and the entry, why it cannot be mounted, and what to do.
    """
    chosen = view or View()
    assembly = _Assembly(plan, _Warnings(warn), max_entries)
    for warning in plan.warnings:
        assembly.warn(warning)
    for position, layer in enumerate(plan.layers):
        if layer.packing is Packing.RAW:
            assembly.add_raw(position, layer)
        else:
            assembly.add_archive(position, layer, (members or {})[position], (decoded_bytes or {}).get(position))
    return assembly.finish(chosen)


class _Warnings:
    """A bounded number of them, each said once."""

    def __init__(self, warn: Callable[[str], None] | None) -> None:
        self._warn = warn or (lambda text: None)
        self._said: set[str] = set()
        self._left_out = 0

    def say(self, text: str) -> None:
        if text in self._said:
            return
        if len(self._said) < _MAX_WARNINGS:
            self._said.add(text)
            self._warn(text)
        else:
            self._left_out += 1

    def close(self) -> None:
        if self._left_out:
            self._warn(f"and {self._left_out} more warnings like these")


class _Assembly:
    def __init__(self, plan: ModelPlan, warnings: _Warnings, max_entries: int) -> None:
        self._overlay = plan.is_overlay
        self._warnings = warnings
        self._max_entries = max_entries
        self._builder = TreeBuilder()
        self._walker = Walker(self._builder)
        self._directories: dict[str, int] = {"": _ROOT}  # by path as written, links followed
        self._base = ""  # of the layer that is being added
        self._first_node = 0  # of the layer that is being added
        self._encodings: dict[object, Encoding] = {}
        self._seen_archives: set[object] = set()
        self.warn = warnings.say

    # --- one layer ----------------------------------------------------------------------------------------------

    def add_raw(self, position: int, layer: LayerPlan) -> None:
        """A layer that is one file."""
        what = f"layers[{position}]"
        path = check_member_path(layer.path, what)
        self._refuse_whiteout_names(path, what)
        size_bytes = layer.descriptor.size_bytes
        spec = BlobSpec(layer.descriptor.digest, size_bytes, origin=layer.origin)
        blob = self._blob(spec, what)
        self._first_node = len(self._builder)
        directory, name = self._place(path, what)
        held = self._builder.children[directory].get(name)
        if held is not None:
            if self._is_same(held, blob, 0, size_bytes):
                return
            raise self._named_twice(held, what)
        self._check_count()
        self._builder.add_file(directory, name, blob, 0, size_bytes, layer.mtime_s, layer.executable)

    def add_archive(
        self, position: int, layer: LayerPlan, members: Iterable[Member], decoded_bytes: int | None
    ) -> None:
        """A layer that is an archive of `members`."""
        if layer.maybe_file:
            raise ValueError(f"layers[{position}] was not settled")
        what = f"layers[{position}]"
        if not self._overlay:
            key = (layer.descriptor.digest, layer.base, layer.member_root)
            if key in self._seen_archives:  # the same layer listed twice
                return
            self._seen_archives.add(key)
        encoding = _ENCODINGS[layer.packing]
        if encoding is Encoding.IDENTITY:
            spec = BlobSpec(layer.descriptor.digest, layer.descriptor.size_bytes, origin=layer.origin)
        else:
            spec = BlobSpec(
                layer.descriptor.digest, layer.descriptor.size_bytes, encoding, decoded_bytes, origin=layer.origin
            )
        blob = self._blob(spec, what)
        self._first_node = len(self._builder)
        if self._overlay:
            self._apply_whiteouts(members, what)
        add = self._add_overlay_member if self._overlay else self._add_member
        self._base = layer.base
        root = layer.member_root
        for member in members:
            path = member.path.rstrip("/") if member.path.endswith("/") else member.path
            if path in (".", "") and member.kind is MemberKind.DIRECTORY:
                continue
            if self._overlay:
                path = self._overlay_path(path, what)
                if not path:
                    continue
            else:
                path = check_member_path(path, what)
            if root and path != root and not path.startswith(f"{root}/"):
                raise UnsupportedModelError(
                    f"{what}: entry {path[:200]!r} lies outside the packed directory {root[:200]!r}; pack the model again",
                    path=path[:200],
                )
            if layer.base:
                path = check_member_path(f"{layer.base}/{path}", what)
            add(member, path, blob, spec, what)

    def _overlay_path(self, path: str, what: str) -> str:
        """A name in an image, as every runtime reads it: `/bin//sh` is `bin/sh`. Empty, with a warning, for one that Linux
        allows and we do not show: base images have a few, and nobody wants a model without them to be refused.
        """
        if path.startswith("/") or "//" in path or "/./" in path:
            path = "/".join(part for part in path.split("/") if part not in ("", "."))
        try:
            return check_member_path(path, what)
        except UnsupportedModelError as exc:
            if not path or ".." in path.split("/"):
                raise
            self.warn(f"{exc.message.partition('; ')[0]}; left out")
            return ""

    def _add_member(self, member: Member, path: str, blob: int, spec: BlobSpec, what: str) -> None:
        """Of an artifact: nothing may be in the way, except a directory of a directory."""
        builder = self._builder
        self._refuse_whiteout_names(path, what)
        directory, name = self._place(path, what)
        held = builder.children[directory].get(name)
        kind = member.kind
        if kind is MemberKind.DIRECTORY:
            self._add_directory(directory, name, held, path, member, what)
            return
        if kind is MemberKind.SPECIAL:
            raise UnsupportedModelError(
                f"{what}: {path[:200]!r} is a device, fifo or socket; pack the model again without it", path=path[:200]
            )
        if held is not None:
            is_of_lower_layer = kind is MemberKind.FILE and held < self._first_node
            if is_of_lower_layer and self._is_same(held, blob, member.offset, member.size_bytes):
                return
            raise self._named_twice(held, what)
        self._add_leaf(directory, name, path, member, blob, spec, what)

    def _add_overlay_member(self, member: Member, path: str, blob: int, spec: BlobSpec, what: str) -> None:
        """Of an image: what is in the way goes, except a directory of a directory."""
        builder = self._builder
        if _WHITEOUT in path and _is_whiteout(path):
            return
        directory, name = self._place(path, what)
        held = builder.children[directory].get(name)
        if held is not None:
            if member.kind is MemberKind.DIRECTORY and builder.kinds[held] == _DIRECTORY:
                builder.mtimes[held] = _mtime(member)
                return
            if held >= self._first_node:
                self.warn(f"{what}: {path[:200]!r} is there twice; the later entry is shown")
            if member.kind is MemberKind.HARDLINK and self._link_source(member, path, what) == held:
                return  # a file linked to itself stays as it is
            self._remove(directory, name)
        if member.kind is MemberKind.DIRECTORY:
            self._add_directory(directory, name, None, path, member, what)
        elif member.kind is MemberKind.SPECIAL:
            self.warn(f"{what}: {path[:200]!r} is a device, fifo or socket; left out")
        else:
            self._add_leaf(directory, name, path, member, blob, spec, what)

    def _add_leaf(
        self, directory: int, name: bytes, path: str, member: Member, blob: int, spec: BlobSpec, what: str
    ) -> None:
        builder = self._builder
        if len(builder) > self._max_entries:
            self._check_count()
        if member.kind is MemberKind.FILE:
            offset, length = member.offset, member.size_bytes
            if offset < 0 or length < 0 or offset + length > spec.content_bytes:
                check_extent(path, spec, offset, length)
            builder.add_file(directory, name, blob, offset, length, _mtime(member), member.executable)
        elif member.kind is MemberKind.SYMLINK:
            builder.add_symlink(directory, name, self._target(member, path, what), _mtime(member))
        else:
            builder.add_alias(directory, name, self._link_source(member, path, what))

    def _add_directory(
        self, directory: int, name: bytes, held: int | None, path: str, member: Member, what: str
    ) -> None:
        builder = self._builder
        if held is None:
            self._check_count()
            self._directories[path] = builder.add_directory(directory, name, _mtime(member))
        elif builder.kinds[held] == _DIRECTORY:
            builder.mtimes[held] = _mtime(member)
        else:
            raise self._named_twice(held, what)

    def _target(self, member: Member, path: str, what: str) -> bytes:
        try:
            target = member.link_target.encode()
        except UnicodeEncodeError:
            target = b""
        if not 0 < len(target) < 4096 or b"\0" in target:
            raise UnsupportedModelError(
                f"{what}: link {path[:200]!r} has a target of {len(target)} bytes that no kernel would take; pack the "
                "model again",
                path=path[:200],
            )
        return target

    def _link_source(self, member: Member, path: str, what: str) -> int:
        """The node a hard link names: it must be there already, in this layer or a lower one."""
        text = member.link_target.lstrip("/") if self._overlay else member.link_target
        text = check_member_path(text, f"{what}: link target of {path[:200]!r}")
        if self._base:
            text = f"{self._base}/{text}"
        head, _, last = text.rpartition("/")
        directory = self._find_directory(head)
        source = None if directory is None else self._builder.children[directory].get(last.encode())
        if source is None or self._builder.kinds[source] == _DIRECTORY:
            raise UnsupportedModelError(
                f"{what}: {path[:200]!r} is a hard link to {text[:200]!r}, and no file of that name comes before it; pack "
                "the model again",
                path=path[:200],
            )
        return source

    # --- directories --------------------------------------------------------------------------------------------

    def _place(self, path: str, what: str) -> tuple[int, bytes]:
        """The directory that `path` lies in, made where it is missing, and the last name of it."""
        head, _, last = path.rpartition("/")
        directory = self._directories.get(head)
        return self._make_directory(head, what) if directory is None else directory, last.encode()

    def _make_directory(self, path: str, what: str) -> int:
        if (found := self._directories.get(path)) is not None:
            return found
        head, _, last = path.rpartition("/")
        parent = self._make_directory(head, what)
        name = last.encode()
        builder = self._builder
        held = builder.children[parent].get(name)
        if held is not None and self._overlay and builder.kinds[held] == _SYMLINK:
            walk = self._walker.walk(parent, name)
            held = walk.node
            if walk.looped:
                raise UnsupportedModelError(
                    f"{what}: {path[:200]!r} is a link in a circle, and also the directory of other entries",
                    path=path[:200],
                )
            if held is None:
                missing = check_member_path(b"/".join(walk.missing).decode(), what)
                self._directories[path] = held = self._make_directory(missing, what)
                return held
        if held is not None and self._overlay and builder.kinds[held] == _FILE:
            self._remove(parent, name)
            held = None
        if held is None:
            self._check_count()
            held = builder.add_directory(parent, name)
        elif builder.kinds[held] != _DIRECTORY:
            raise UnsupportedModelError(
                f"{what}: {path[:200]!r} is a file or link, and also the directory of other entries; pack the model again",
                path=path[:200],
            )
        self._directories[path] = held
        return held

    def _find_directory(self, path: str) -> int | None:
        """The directory of that path, if there is one; nothing is made."""
        if (found := self._directories.get(path)) is not None:
            return found
        builder = self._builder
        node = _ROOT
        for part in path.encode().split(b"/"):
            below = builder.children[node].get(part)
            if below is not None and self._overlay and builder.kinds[below] == _SYMLINK:
                below = self._walker.walk(node, part).node
            if below is None or builder.kinds[below] != _DIRECTORY:
                return None
            node = below
        return node

    def _remove(self, directory: int, name: bytes) -> None:
        """With all that is below it. Paths may lead elsewhere afterwards."""
        node = self._builder.children[directory].pop(name)
        if self._builder.kinds[node] != _FILE:
            self._directories = {"": _ROOT}

    # --- whiteouts ----------------------------------------------------------------------------------------------

    def _apply_whiteouts(self, members: Iterable[Member], what: str) -> None:
        """Before anything of the layer is added, so that they act on lower layers only."""
        for member in members:
            if _WHITEOUT not in member.path:
                continue
            head, _, last = self._overlay_path(member.path.rstrip("/"), what).rpartition("/")
            if not last.startswith(_WHITEOUT):
                continue
            name = last[len(_WHITEOUT) :]
            if name in ("", ".", ".."):
                raise UnsupportedModelError(
                    f"{what}: whiteout {member.path[:200]!r} names nothing", path=member.path[:200]
                )
            directory = self._find_directory(head)
            if directory is None:
                continue
            if last == _OPAQUE:
                for held in list(self._builder.children[directory]):
                    self._remove(directory, held)
            elif not name.startswith(_WHITEOUT) and name.encode() in self._builder.children[directory]:
                self._remove(directory, name.encode())

    def _refuse_whiteout_names(self, path: str, what: str) -> None:
        if _WHITEOUT in path and any(part.startswith(_WHITEOUT) for part in path.split("/")):
            raise UnsupportedModelError(
                f"{what}: {path[:200]!r} means a deletion in container images, and this is none; rename the file",
                path=path[:200],
            )

    # --- the whole ----------------------------------------------------------------------------------------------

    def finish(self, view: View) -> TreeContent:
        """The view's tree: links made safe, what is not shown taken out."""
        builder = self._builder
        root = self._view_root(view.sub_path)
        nodes = self._below(root)
        left_out = self._left_out(nodes, root, view.files)
        settler = LinkSettler(builder, root, lambda node: not left_out[node], clamps=self._overlay)
        links = (node for node in nodes if builder.kinds[node] == _SYMLINK and not left_out[node])
        for why in settler.settle(links):
            self.warn(why)
        for node in nodes:
            if left_out[node]:
                builder.children[builder.parents[node]].pop(builder.names[node], None)
        if not self._overlay:
            self._warn_of_lookalikes(root, nodes)
        self._warnings.close()
        content = builder.finish(root)
        if not content.blobs:
            raise UnsupportedModelError(
                f"there are no files{f' below subPath {view.sub_path[:200]!r}' if view.sub_path else ' in this model'}"
            )
        return content

    def _view_root(self, sub_path: str) -> int:
        if not sub_path:
            return _ROOT
        walk = self._walker.walk(_ROOT, check_member_path(sub_path, "subPath").encode())
        node = walk.node
        if node is None or self._builder.kinds[node] != _DIRECTORY or (walk.climbed and not self._overlay):
            raise UnsupportedModelError(
                f"subPath {sub_path[:200]!r} is not a directory of this model; at its top there are {self._listed(_ROOT)}",
                path=sub_path[:200],
            )
        return node

    def _below(self, root: int) -> list[int]:
        """Every node below a directory; a directory before what is in it."""
        children = self._builder.children
        found = list(children[root].values())
        for node in found:
            if below := children.get(node):
                found.extend(below.values())
        return found

    def _left_out(self, nodes: list[int], root: int, files: Globs) -> bytearray:
        """By node: 1 for what no pattern wants, and for directories with nothing that is wanted."""
        builder = self._builder
        left_out = bytearray(len(builder) + len(nodes))  # links may become files yet
        if not files:
            return left_out
        skip = len(builder.path(root)) + 1 if root != _ROOT else 0
        wanted = False
        for node in reversed(nodes):
            if builder.kinds[node] == _DIRECTORY:
                left_out[node] = all(left_out[below] for below in builder.children[node].values())
            else:
                left_out[node] = not files.match(builder.path(node)[skip:])
                wanted = wanted or not left_out[node]
        if not wanted:
            raise UnsupportedModelError(
                f"no file of the model fits files {','.join(files.patterns)[:200]!r}; there are {self._listed(root)}"
            )
        return left_out

    def _warn_of_lookalikes(self, root: int, nodes: list[int]) -> None:
        """Names that differ only by case, or by how an accent is written: two files here, and one on other systems."""
        builder = self._builder
        for directory in (root, *nodes):
            below = builder.children.get(directory)
            if not below or len({_folded(name) for name in below}) == len(below):
                continue
            first: dict[str, bytes] = {}
            for name in sorted(below):
                twin = first.setdefault(_folded(name), name)
                if twin != name:
                    self.warn(f"{twin.decode()!r} and {name.decode()!r} differ by case or accents only")
                    break

    # --- conflicts ----------------------------------------------------------------------------------------------

    def _is_same(self, held: int, blob: int, offset: int, length: int) -> bool:
        builder = self._builder
        return (
            builder.kinds[held] == _FILE
            and builder.blob[held] == blob
            and builder.offsets[held] == offset
            and builder.lengths[held] == length
        )

    def _named_twice(self, held: int, what: str) -> UnsupportedModelError:
        path = self._builder.path(held)[:200]
        kind = "a directory" if self._builder.kinds[held] == _DIRECTORY else "there"
        return UnsupportedModelError(
            f"{what}: {path!r} is {kind} already, from another entry; pack the model again with every name once",
            path=path,
        )

    def _blob(self, spec: BlobSpec, what: str) -> int:
        """A blob is stored one way only: readers find its bytes by digest."""
        if self._encodings.setdefault(spec.digest, spec.encoding) is not spec.encoding:
            raise UnsupportedModelError(
                f"{what}: blob {spec.digest.short()} is listed as an archive and also as a file; pack the model again"
            )
        return self._builder.add_blob(spec)

    def _check_count(self) -> None:
        if len(self._builder) > self._max_entries:
            raise UnsupportedModelError(
                f"the model has more than {self._max_entries} files, directories and links; pack fewer files per model"
            )

    def _listed(self, directory: int) -> str:
        names = [name.decode() for name in sorted(self._builder.children[directory])]
        return (", ".join(names[:_MAX_LISTED]) or "no entries") + (", …" if len(names) > _MAX_LISTED else "")


def _mtime(member: Member) -> int:
    return member.mtime_s if 0 <= member.mtime_s < _MTIME_LIMIT_S else 0


def _folded(name: bytes) -> str:
    return name.decode().lower() if name.isascii() else unicodedata.normalize("NFC", name.decode()).casefold()


def _is_whiteout(path: str) -> bool:
    """A whiteout, or what some tools keep beside them (`.wh..wh.plnk/…`)."""
    return path.rpartition("/")[2].startswith(_WHITEOUT) or any(
        part.startswith(f"{_WHITEOUT}{_WHITEOUT}") for part in path.split("/")
    )
