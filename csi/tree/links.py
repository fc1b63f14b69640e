"""Symlinks of a tree, made safe: whatever a link says, following it from inside the mount never leaves the mount.

The kernel follows links in the reader's own mount namespace, so a link that climbs out of the volume would show the
reader's files, and an absolute one always does. Text alone cannot tell: `a/b/../..` climbs out where `a/b` is a link to
the root. So every link is walked through the finished tree, as the kernel would.

In an image, `/` is the image's root and `..` stops there, as in a container: such links are written anew, relative. In an
artifact they are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from csi.errors import UnsupportedModelError
from csi.tree.model import MAX_TARGET_BYTES, EntryKind, TreeBuilder

_MAX_HOPS = 40  # Linux's own limit of links in one look-up
_MAX_STEPS = 20_000_000  # components walked for one tree; a hostile one could otherwise take hours


@dataclass(slots=True)
class Walk:
    """Where a path leads. `node` is None when nothing is there: then `missing` is the path of what would be.

    `climbed`: it went above the root, or began there (`/`). `left_view`: on its way it was outside the view. `looped`: the
    kernel gives it up.
    """

    node: int | None
    missing: tuple[bytes, ...] = ()
    climbed: bool = False
    left_view: bool = False
    looped: bool = False


class Walker:
    """Follows paths through a builder's tree, with a limit on all the work it does."""

    def __init__(self, builder: TreeBuilder, view: int = TreeBuilder.ROOT) -> None:
        self._builder = builder
        self._view = view
        self._steps = 0

    def walk(self, start: int, path: bytes) -> Walk:
        """From directory `start` along `path`, links followed, `/` and `..` as in a container.

        Raises: UnsupportedModelError when the links of a tree take too much work altogether.
        """
        builder = self._builder
        kinds, parents, children = builder.kinds, builder.parents, builder.children
        climbed = left_view = path.startswith(b"/")
        node = builder.ROOT if climbed else start
        missing: list[bytes] | None = None
        todo = _parts(path)
        hops = 0
        while todo:
            self._steps += 1
            if self._steps > _MAX_STEPS:
                raise UnsupportedModelError(
                    "the links of this model take too much work to follow; pack it without them"
                )
            part = todo.pop()
            if missing is not None:  # the rest is text
                if part != b"..":
                    missing.append(part)
                elif missing:
                    missing.pop()
            elif part == b"..":
                climbed = climbed or node == builder.ROOT
                left_view = left_view or node == self._view
                node = parents[node]
            elif (below := children.get(node, {}).get(part)) is None:
                missing = [*_path(builder, node), part]
            elif kinds[below] == EntryKind.SYMLINK:
                hops += 1
                if hops > _MAX_HOPS:
                    return Walk(None, (), climbed, left_view, looped=True)
                target = builder.targets[below]
                if target.startswith(b"/"):
                    climbed = left_view = True
                    node = builder.ROOT
                todo += _parts(target)
            else:
                node = below
        if missing is not None:
            return Walk(None, tuple(missing), climbed, left_view)
        return Walk(node, (), climbed, left_view)


class LinkSettler:
    """Makes the links of a view safe. `is_shown(node)` says whether a node of the view is part of it (not left out by a
    filter); `clamps` whether `/` and too many `..` mean the root (images) or are refused (artifacts).
    """

    def __init__(self, builder: TreeBuilder, view: int, is_shown: Callable[[int], bool], *, clamps: bool) -> None:
        self._builder = builder
        self._view = view
        self._view_path = _path(builder, view)
        self._is_shown = is_shown
        self._clamps = clamps
        self._walker = Walker(builder, view)

    def settle(self, links: Iterable[int]) -> list[str]:
        """Change the builder so that every one of these links is safe. Returns what was left out, and why.

        A link out of the view to a file becomes that file.

        Raises: UnsupportedModelError naming a link and what it leads to.
        """
        # All is decided before anything is changed, so that the order of the links decides nothing.
        builder = self._builder
        changes = [(link, change) for link in links if (change := self._decide(link)) is not None]
        left_out = []
        for link, change in changes:
            directory, name = builder.parents[link], builder.names[link]
            match change:
                case bytes():
                    builder.targets[link] = change
                case int():
                    builder.add_alias(directory, name, change)
                case str():
                    left_out.append(f"{self._shown(link)} {change}; left out")
                    del builder.children[directory][name]
        return left_out

    def _decide(self, link: int) -> bytes | int | str | None:
        """None: it stays. Else its new target, the file that takes its place, or why it is left out."""
        builder = self._builder
        walk = self._walker.walk(builder.parents[link], builder.targets[link])
        if walk.looped:
            if self._clamps:
                return "leads in a circle"
            raise self._refused(link, "leads in a circle")
        if walk.climbed and not self._clamps:
            raise self._refused(link, "leads out of the model")
        if walk.node is None:
            if not walk.left_view:
                return None
            if walk.missing[: len(self._view_path)] == self._view_path:
                return self._target(link, walk.missing)
            return "leads out of the volume, to nothing"
        if self._is_in_view(walk.node):
            if self._is_shown(walk.node):
                return self._target(link, _path(builder, walk.node)) if walk.left_view else None
            if builder.kinds[walk.node] != EntryKind.FILE:
                return "leads to a directory without any chosen file"
        if builder.kinds[walk.node] == EntryKind.FILE:
            return walk.node
        raise self._refused(
            link, f"leads out of subPath to the directory {builder.path(walk.node)!r}; choose a subPath that has both"
        )

    def _target(self, link: int, destination: tuple[bytes, ...]) -> bytes | str:
        """The shortest relative way, or why there is none."""
        here = _path(self._builder, self._builder.parents[link])
        common = 0
        while common < min(len(here), len(destination)) and here[common] == destination[common]:
            common += 1
        target = b"/".join([b".."] * (len(here) - common) + list(destination[common:])) or b"."
        return target if len(target) < MAX_TARGET_BYTES else "has a target that is too long"

    def _is_in_view(self, node: int) -> bool:
        parents = self._builder.parents
        while node not in (self._view, TreeBuilder.ROOT):
            node = parents[node]
        return node == self._view

    def _refused(self, link: int, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self._shown(link)} {why}", path=self._builder.path(link)[:200])

    def _shown(self, link: int) -> str:
        target = self._builder.targets[link][:200].decode(errors="replace")
        return f"link {self._builder.path(link)[:200]!r} → {target!r}"


def _parts(path: bytes) -> list[bytes]:
    """Last first."""
    return [part for part in reversed(path.split(b"/")) if part not in (b"", b".")]


def _path(builder: TreeBuilder, node: int) -> tuple[bytes, ...]:
    parts = []
    while node != builder.ROOT:
        parts.append(builder.names[node])
        node = builder.parents[node]
    return tuple(reversed(parts))
