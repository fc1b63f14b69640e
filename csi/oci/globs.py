"""Patterns for files of a model: `*.safetensors`, `tokenizer*`, `onnx/**`, `**/config.json`.

`*` and `?` stay within one name, `[…]` is a class, `**` stands for any number of directories. Whoever writes a pattern is
a stranger, so matching takes no backtracking beyond the last star: time is at most pattern times path.

Source: the doublestar patterns that `modctl fetch --patterns` takes.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from csi.errors import InvalidVolumeError

MAX_PATTERNS = 64
_MAX_PATTERN_LENGTH = 512


@dataclass(frozen=True, slots=True)
class Globs:
    """Which files of a model are wanted. None given: all of them."""

    patterns: tuple[str, ...] = ()
    _compiled: tuple[_Pattern, ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def parse(cls, text: str) -> Globs:
        """Patterns separated by commas; a leading `./` is dropped, blanks around them too.

        Raises: InvalidVolumeError for an empty, absolute or too long pattern, `.` or `..` in it, or too many.
        """
        patterns = tuple(part.strip().removeprefix("./") for part in text.split(","))
        if len(patterns) > MAX_PATTERNS:
            raise InvalidVolumeError(
                f"files: {len(patterns)} patterns, at most {MAX_PATTERNS} are allowed", field="files"
            )
        for pattern in patterns:
            segments = pattern.split("/")
            if len(pattern) > _MAX_PATTERN_LENGTH or any(segment in ("", ".", "..") for segment in segments):
                raise InvalidVolumeError(
                    f"files: pattern {pattern[:80]!r} is empty, too long, absolute, or has an empty, '.' or '..' part; "
                    "expected patterns such as *.safetensors, onnx/**, separated by commas",
                    field="files",
                )
        return cls(patterns, tuple(_Pattern(pattern) for pattern in patterns))

    def __bool__(self) -> bool:
        return bool(self.patterns)

    def match(self, path: str) -> bool:
        """Whether any pattern fits the whole of `path` (relative, with `/`)."""
        segments = path.split("/")
        return any(pattern.match(segments) for pattern in self._compiled)


class _Pattern:
    def __init__(self, text: str) -> None:
        self._segments: list[Callable[[str], object] | None] = [
            None if segment == "**" else re.compile(fnmatch.translate(segment), re.DOTALL).match
            for segment in text.split("/")
        ]

    def match(self, segments: Sequence[str]) -> bool:
        """Greedy: only the last `**` that was met ever takes one segment more."""
        at = here = 0
        star = -1
        taken = 0
        while here < len(segments):
            test = self._segments[at] if at < len(self._segments) else _nothing
            if test is None:
                star, taken = at, here
                at += 1
            elif test(segments[here]):
                at += 1
                here += 1
            elif star >= 0:
                taken += 1
                at, here = star + 1, taken
            else:
                return False
        return all(test is None for test in self._segments[at:])


def _nothing(segment: str) -> bool:
    return False
