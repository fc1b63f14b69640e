"""Metrics and health of a node over HTTP: `/metrics` for Prometheus, `/healthz` for kubelet's liveness probe.

One endpoint per node, in its stateless process: what mounts, workers and fetchers count is asked of the supervisor at
each scrape, which opens no port of its own. Health says that this process answers and nothing more: a probe that knew
of mounts or registries would turn a slow registry into a node without a driver.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import socketserver
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, Histogram, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from csi.control.keeper import KeeperClient
from csi.control.supervisor import SupervisorClient
from csi.driver import calls
from csi.errors import InvalidVolumeError, ModelMountError
from csi.observe import metrics
from csi.observe.metrics import Kind, Metric
from csi.oci.reference import Reference

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

log = logging.getLogger(__name__)

_LOOP_PATIENCE_S = 5.0
_BUCKETS_S = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)  # kubelet gives up at 120

REGISTRY = CollectorRegistry()
_calls = Histogram(
    metrics.CSI_CALL_SECONDS.name,
    metrics.CSI_CALL_SECONDS.meaning,
    metrics.CSI_CALL_SECONDS.labels,
    registry=REGISTRY,
    buckets=_BUCKETS_S,
)


def count_call(rpc: str, code: str, seconds: float) -> None:
    """A CSI call has ended."""
    _calls.labels(rpc, code).observe(seconds)


class NodeCollector(Collector):
    """Asks keeper and supervisor when Prometheus asks us. A process that does not answer is a 0, never an error."""

    def __init__(self, state_dir: str, data_dir: str, version: str) -> None:
        self._keeper, self._supervisor = KeeperClient(state_dir), SupervisorClient(state_dir)
        self._data_dir, self._version = data_dir, version

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """Every family of the table but the histogram."""
        mounts: list[dict[str, Any]] | None = None
        keeper_up = supervisor_up = False
        with contextlib.suppress(ModelMountError, OSError):
            keeper_up = bool(self._keeper.ping())
        with contextlib.suppress(ModelMountError, OSError):
            mounts, supervisor_up = self._supervisor.status(), True
        yield _gauge(metrics.BUILD_INFO, [((self._version,), 1)])
        yield _gauge(metrics.COMPONENT_UP, [(("keeper",), keeper_up), (("supervisor",), supervisor_up)])
        with contextlib.suppress(OSError):
            found = os.statvfs(self._data_dir)
            yield _gauge(metrics.DATA_SIZE, [((), found.f_blocks * found.f_frsize)])
            yield _gauge(metrics.DATA_FREE, [((), found.f_bfree * found.f_frsize)])
        yield from mount_families(mounts or [])


def mount_families(mounts: list[dict[str, Any]]) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
    """From the supervisor's status."""
    labelled = [(_labels(mount), mount) for mount in mounts]
    yield _gauge(metrics.MOUNT_INFO, [((*labels, str(mount["verify"])), 1) for labels, mount in labelled])
    yield _gauge(metrics.MOUNT_TARGETS, [(labels, len(mount["targets"])) for labels, mount in labelled])
    yield _gauge(metrics.MOUNT_DEAD, [(labels, bool(mount["dead"])) for labels, mount in labelled])
    size, cached, states = [], [], []
    for labels, mount in labelled:
        blobs = mount["progress"].get("blobs", [])
        size.append((labels, sum(blob["size_bytes"] for blob in blobs)))
        cached.append((labels, cached_bytes(blobs)))
        for state in sorted({blob["state"] for blob in blobs}):
            states.append(((*labels, state), sum(blob["state"] == state for blob in blobs)))
    yield _gauge(metrics.MOUNT_SIZE, size)
    yield _gauge(metrics.MOUNT_CACHED, cached)
    yield _gauge(metrics.MOUNT_RESTING, [(labels, bool(mount.get("worker_resting"))) for labels, mount in labelled])
    yield _gauge(
        metrics.MOUNT_MEMORY_BUDGET, [(labels, mount.get("memory_budget_bytes", 0)) for labels, mount in labelled]
    )
    yield _gauge(metrics.MOUNT_BLOBS, states)
    passed = [(labels, len((mount.get("passthrough") or {}).get("blobs", ()))) for labels, mount in labelled]
    yield _gauge(metrics.MOUNT_PASSED_BLOBS, passed)
    for metric in metrics.MOUNT_COUNTERS:
        family = CounterMetricFamily(metric.name.removesuffix("_total"), metric.meaning, labels=metric.labels)
        for labels, mount in labelled:
            family.add_metric(labels, float(_value_at(mount, metric.source)))
        yield family


def cached_bytes(blobs: list[dict[str, Any]]) -> int:
    """Whole blocks on the node, the last of a blob at its real size."""
    return sum(
        blob["size_bytes"]
        if blob["present_blocks"] == blob["blocks"]
        else blob["size_bytes"] * blob["present_blocks"] // max(1, blob["blocks"])
        for blob in blobs
    )


def _labels(mount: dict[str, Any]) -> tuple[str, str, str]:
    return mount["mount_id"], Reference.parse(mount["reference"]).origin, mount["digest"]


def _value_at(mount: dict[str, Any], source: str) -> int:
    """A counter that a worker or fetcher that has just been replaced does not tell yet is 0."""
    value: Any = mount
    for key in source.split("."):
        value = value.get(key, 0) if isinstance(value, dict) else 0
    return int(value or 0)


def _gauge(metric: Metric, samples: Iterable[tuple[tuple[str, ...], float]]) -> GaugeMetricFamily:
    assert metric.kind is Kind.GAUGE
    family = GaugeMetricFamily(metric.name, metric.meaning, labels=metric.labels)
    for labels, value in samples:
        family.add_metric(labels, float(value))
    return family


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        log.debug("http: " + format, *args)


class Exporter:
    """Serves in a thread of its own. Make it on the event loop whose health it tells."""

    def __init__(self, address: str, collector: Collector) -> None:
        host, port = parse_address(address)
        REGISTRY.register(collector)
        self._loop = asyncio.get_running_loop()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        server_class = type("_Server", (_Server,), {"address_family": family})
        try:
            self._server = server_class((host, port), _Quiet)
        except OSError as exc:
            raise InvalidVolumeError(f"metrics address {address!r}: {exc.strerror}", field="metrics-address") from exc
        self._server.set_app(self._application(make_wsgi_app(REGISTRY)))
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._collector = collector

    @property
    def port(self) -> int:
        """The port it listens on; another one than was asked for when that was 0."""
        return int(self._server.server_port)

    def start(self) -> None:
        """Begin to count and to answer."""
        calls.tell(count_call)
        self._thread.start()
        log.info("metrics at port %d", self.port)

    def stop(self) -> None:
        """End the thread and close the port."""
        calls.tell_no_more(count_call)
        self._server.shutdown()
        self._server.server_close()
        REGISTRY.unregister(self._collector)

    def _application(self, metrics_application: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
        def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            match environ.get("PATH_INFO"):
                case "/metrics":
                    return metrics_application(environ, start_response)
                case "/healthz":
                    healthy = self._loop_answers()
                    status = "200 OK" if healthy else "500 Internal Server Error"
                    start_response(status, [("Content-Type", "text/plain")])
                    return [b"ok\n" if healthy else b"the event loop does not answer\n"]
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [b"/metrics or /healthz\n"]

        return application

    def _loop_answers(self) -> bool:
        answered = threading.Event()
        self._loop.call_soon_threadsafe(answered.set)
        return answered.wait(_LOOP_PATIENCE_S)


def parse_address(address: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port`. Raises: InvalidVolumeError."""
    host, separator, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator or not port.isdecimal() or int(port) > 65535 or not host:
        raise InvalidVolumeError(
            f"metrics address {address!r}: expected host:port, such as 127.0.0.1:9808 or [::]:9808",
            field="metrics-address",
        )
    return host, int(port)
