"""Logs: one JSON object per line on stderr, or plain text on a terminal. Standard library only."""

from __future__ import annotations

import contextlib
import contextvars
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from csi.redact import scrub

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


_NO_CONTEXT: MappingProxyType[str, object] = MappingProxyType({})
_context: contextvars.ContextVar[Mapping[str, object]] = contextvars.ContextVar(
    "modelmount_log_context", default=_NO_CONTEXT
)


@contextlib.contextmanager
def context(**fields: object) -> Iterator[None]:
    """Every record of this task (and of the tasks and threads it starts) carries these fields. None is left out."""
    given = {key: value for key, value in fields.items() if value is not None}
    token = _context.set({**_context.get(), **given})
    try:
        yield
    finally:
        _context.reset(token)


class JsonFormatter(logging.Formatter):
    """`time level role message`, the context, and whatever was given as `extra`."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "role": self._role,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update(_context.get())
        line |= {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return scrub(json.dumps(line, default=str))


class TextFormatter(logging.Formatter):
    """For a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and a traceback where there is one."""
        return scrub(super().format(record))


def set_up(role: str, level: str) -> None:
    """Send every log record of this process to stderr: text on a terminal, JSON elsewhere."""
    handler = logging.StreamHandler(sys.stderr)
    if sys.stderr.isatty():
        handler.setFormatter(TextFormatter(f"%(asctime)s {role} %(levelname)s %(message)s", "%H:%M:%S"))
    else:
        handler.setFormatter(JsonFormatter(role))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
