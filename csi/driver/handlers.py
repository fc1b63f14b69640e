"""What every RPC handler shares: our errors become status codes, the rest INTERNAL with a traceback in the log.

A handler parses its request, calls one core method, and maps the result. Messages may be shown to a pod's author.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import grpc

from csi.driver import calls
from csi.driver.requests import described
from csi.driver.status_map import status_of
from csi.errors import InvalidVolumeError, ModelMountError
from csi.observe import logs
from csi.redact import scrub

log = logging.getLogger(__name__)

_Reply = TypeVar("_Reply")
_MAX_ID_BYTES = 128  # CSI spec, "Size Limits"
_MAX_PATH_BYTES = 4096


def rpc(
    handler: Callable[[Any, Any, grpc.aio.ServicerContext], Awaitable[_Reply]],
) -> Callable[[Any, Any, grpc.aio.ServicerContext], Awaitable[_Reply]]:
    """Decorates an RPC handler. Requests are logged without their secrets, at DEBUG."""

    @functools.wraps(handler)
    async def handled(self: Any, request: Any, context: grpc.aio.ServicerContext) -> _Reply:
        started = time.monotonic()
        code = grpc.StatusCode.CANCELLED  # what is left when the caller gives up
        with logs.context(rpc=handler.__name__, volume_id=getattr(request, "volume_id", None)):
            if log.isEnabledFor(logging.DEBUG):
                log.debug("%s %s", handler.__name__, described(request))
            try:
                reply = await handler(self, request, context)
                code = grpc.StatusCode.OK
            except ModelMountError as exc:
                code = status_of(exc)
                log.warning("%s: %s: %s", handler.__name__, code.name, exc)
                await context.abort(code, scrub(str(exc)))
                raise AssertionError("unreachable: abort raises") from exc
            except grpc.aio.AbortError:
                code = context.code()
                raise
            except Exception as exc:
                code = grpc.StatusCode.INTERNAL
                log.exception("%s failed by a bug", handler.__name__)
                await context.abort(code, f"internal error ({type(exc).__name__}); see the node's log")
                raise AssertionError("unreachable: abort raises") from exc
            finally:
                calls.ended(handler.__name__, code.name, time.monotonic() - started)
            log.debug("%s: OK in %.1f ms", handler.__name__, (time.monotonic() - started) * 1000)
        return reply

    return handled


class ToTheEnd:
    """Work that a caller's deadline does not cancel: its next call finds it done, or in progress."""

    def __init__(self) -> None:
        self._running: set[asyncio.Future[Any]] = set()

    async def run(self, work: Coroutine[Any, Any, _Reply]) -> _Reply:
        """The result, for a caller that waits long enough."""
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._finished)
        return await asyncio.shield(task)

    def _finished(self, task: asyncio.Future[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.debug("work ended with %s: %s", type(error).__name__, error)


def required_id(value: str, field: str) -> str:
    """Raises: InvalidVolumeError when missing, or over the 128 bytes of the CSI spec."""
    if not value:
        raise InvalidVolumeError(f"{field} is missing", field=field)
    if len(value.encode()) > _MAX_ID_BYTES:
        raise InvalidVolumeError(
            f"{field} has {len(value.encode())} bytes, the CSI limit is {_MAX_ID_BYTES}", field=field
        )
    return value


def required_path(value: str, field: str) -> str:
    """Raises: InvalidVolumeError when missing, relative, or too long."""
    if not value:
        raise InvalidVolumeError(f"{field} is missing", field=field)
    if not value.startswith("/") or len(value.encode()) > _MAX_PATH_BYTES or "\0" in value:
        raise InvalidVolumeError(f"{field} {value[:200]!r} must be an absolute path of at most 4096 bytes", field=field)
    return value
