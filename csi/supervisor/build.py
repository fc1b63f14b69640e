"""The phase of a mount in which worker and fetcher find out what is in the model. We pass descriptors and ask how far it is.

A model of raw files is through in milliseconds. One with compressed layers takes as long as reading them once: then callers
hear how far it is, and the next call joins.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from csi.control import wire
from csi.errors import ModelPreparingError
from csi.oci.digest import Digest
from csi.supervisor.child import Child

_CALL_TIMEOUT_S = 20.0
_POLL_S = 1.0


@dataclass(frozen=True, slots=True)
class SentManifest:
    """A manifest for the worker. `fd` is a sealed memfd, the holder's to close."""

    fd: int
    media_type: str


class BuildPhase:
    """One build. `fetch_manifest` gets another manifest of the model's repository, with the volume's credentials."""

    def __init__(self, subject: str, fetch_manifest: Callable[[Digest], Awaitable[SentManifest]]) -> None:
        self._subject, self._fetch_manifest = subject, fetch_manifest
        self._report: dict[str, Any] = {}

    async def run(
        self,
        worker: Child,
        fetcher: Child,
        manifest: SentManifest,
        parents: Sequence[tuple[str, SentManifest]],
        area_fd: int,
        view: dict[str, str],
        verify: str,
    ) -> tuple[int, dict[str, int]]:
        """The tree (a sealed memfd, the caller's) and its summary. `parents`: what the model builds on, the nearest first, with
        the origin of each (empty for the model's own).

        Raises: what keeps the model from being mounted, from the worker; ControlError when either process dies.
        """
        worker_end, fetcher_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with worker_end, fetcher_end:
            await fetcher.call("build", _CALL_TIMEOUT_S, [fetcher_end.fileno()])
            await worker.call(
                "build",
                _CALL_TIMEOUT_S,
                [manifest.fd, area_fd, worker_end.fileno(), *(parent.fd for _, parent in parents)],
                media_type=manifest.media_type,
                parents=[{"origin": origin, "media_type": parent.media_type} for origin, parent in parents],
                view=view,
                verify=verify,
            )
        while True:
            self._report, fds = await worker.call("built", _CALL_TIMEOUT_S, patience_s=_POLL_S)
            if fds:
                return wire.exactly(fds, 1)[0], wire.field(self._report, "summary", dict)
            if self._report.get("needs"):
                needed = await self._fetch_manifest(Digest.parse(wire.field(self._report, "needs", str)))
                try:
                    await worker.call("provide", _CALL_TIMEOUT_S, [needed.fd], media_type=needed.media_type)
                finally:
                    os.close(needed.fd)

    @property
    def layers(self) -> list[dict[str, Any]]:
        """Every archive layer with its mode and how much of it has been worked through."""
        return list(self._report.get("layers", ()))

    @property
    def warnings(self) -> list[str]:
        """What was left out of the tree or looks odd."""
        return list(self._report.get("warnings", ()))

    @property
    def chosen(self) -> str | None:
        """The digest of the manifest that an index led to."""
        return self._report.get("chosen")

    def not_ready(self) -> ModelPreparingError:
        """What a caller hears who does not want to wait any longer."""
        done, size = int(self._report.get("done_bytes", 0)), int(self._report.get("size_bytes", 0))
        rate = done / max(0.001, float(self._report.get("seconds", 0)))
        eta_s = round((size - done) / rate) if done else None
        percent = 100 * done // size if size else 0
        ready = f", ready in about {eta_s} s" if eta_s is not None else ""
        modes = {layer["mode"] for layer in self.layers if layer["done_bytes"] < layer["size_bytes"]}
        if modes - {"streamed"}:
            what = (
                f"compressed layers are being read: {percent} % of {size / 1e6:,.0f} MB, {rate / 1e6:,.0f} MB/s{ready}"
            )
        elif modes:
            what = f"the headers of its archives are being read: {percent} % of {size / 1e6:,.0f} MB are looked through"
        else:
            what = "it is being mounted" if self.layers else "its manifest is being read"
        return ModelPreparingError(
            f"{self._subject}: {what}; it goes on, and the volume is there when you call again",
            percent=percent,
            rate_bytes_s=round(rate),
            eta_s=eta_s,
        )
