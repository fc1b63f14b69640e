"""Every metric of ModelMount, as one table: the exporter makes them from it, docs/metrics.md is written from it.

Standard library only. Names and units follow Prometheus' conventions; a `stable` metric keeps its name, labels and
meaning until the next major version, a `beta` one may change with a line in the changelog.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """Prometheus' types that we use."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Stability(StrEnum):
    """What a dashboard may rely on."""

    STABLE = "stable"
    BETA = "beta"


@dataclass(frozen=True, slots=True)
class Metric:
    """One row. `source` is where the value lies in the status of a mount (`section.key`), empty for all others."""

    name: str
    kind: Kind
    unit: str
    labels: tuple[str, ...]
    stability: Stability
    meaning: str
    source: str = ""


_MOUNT = ("mount", "model", "digest")
_PER_MOUNT_COUNTERS: tuple[tuple[str, str, Stability, str, str], ...] = (
    ("reads", "reads", Stability.STABLE, "reads.reads", "Reads that reached the worker; what the page cache answers does not."),
    ("read_bytes", "bytes", Stability.STABLE, "reads.read_bytes", "Bytes given to readers by the worker."),
    (
        "waited_reads", "reads", Stability.STABLE, "reads.waited_reads",
        "Reads that had to wait for the registry: bytes not in the node's cache.",
    ),
    (
        "failed_reads", "reads", Stability.STABLE, "reads.failed_reads",
        "Reads that ended with EIO: an application saw a failure. Anything above 0 deserves an alert.",
    ),
    ("fetched_bytes", "bytes", Stability.STABLE, "progress.fetched_bytes", "Bytes fetched from registries."),
    (
        "fetch_retries", "requests", Stability.STABLE, "progress.retries",
        "Registry requests that failed and were tried again.",
    ),
    (
        "cache_errors", "errors", Stability.BETA, "progress.cache_errors",
        "Blocks that could not be written to the cache (a full disk, say); readers got them all the same.",
    ),
    (
        "rejected_blocks", "blocks", Stability.STABLE, "progress.rejected_blocks",
        "Blocks from a registry that did not match the model's block index. No reader saw them.",
    ),
    (
        "damaged_blocks", "blocks", Stability.STABLE, "progress.damaged_blocks",
        "Blocks found damaged in the node's cache and fetched again.",
    ),
    ("opens", "opens", Stability.BETA, "reads.opens", "Files opened through the raw backend."),
    (
        "passed_opens", "opens", Stability.BETA, "reads.passed_opens",
        "Of those, the ones whose bytes the kernel reads from the cache by itself (FUSE passthrough).",
    ),
    ("worker_restarts", "restarts", Stability.STABLE, "worker_restarts", "Workers that died and were replaced."),
    ("fetcher_restarts", "restarts", Stability.STABLE, "fetcher_restarts", "Fetchers that died and were replaced."),
)  # fmt: skip

MOUNT_COUNTERS = tuple(
    Metric(f"modelmount_mount_{name}_total", Kind.COUNTER, unit, _MOUNT, stability, meaning, source)
    for name, unit, stability, source, meaning in _PER_MOUNT_COUNTERS
)

BUILD_INFO = Metric(
    "modelmount_build_info", Kind.GAUGE, "", ("version",), Stability.STABLE, "1; the version of this process."
)
COMPONENT_UP = Metric(
    "modelmount_component_up",
    Kind.GAUGE,
    "",
    ("component",),
    Stability.STABLE,
    "1 when the node's keeper, or supervisor, answers.",
)
CSI_CALL_SECONDS = Metric(
    "modelmount_csi_call_seconds",
    Kind.HISTOGRAM,
    "seconds",
    ("rpc", "code"),
    Stability.STABLE,
    "CSI calls by their gRPC status code, successful or not.",
)
MOUNT_INFO = Metric(
    "modelmount_mount_info",
    Kind.GAUGE,
    "",
    (*_MOUNT, "verify"),
    Stability.STABLE,
    "1 for each mounted model; says how it is verified.",
)
MOUNT_TARGETS = Metric(
    "modelmount_mount_targets", Kind.GAUGE, "", _MOUNT, Stability.STABLE, "Pods' volumes that show the model."
)
MOUNT_DEAD = Metric(
    "modelmount_mount_dead",
    Kind.GAUGE,
    "",
    _MOUNT,
    Stability.STABLE,
    "1 when the mount's connection has ended; the next republish makes it anew.",
)
MOUNT_SIZE = Metric(
    "modelmount_mount_size_bytes", Kind.GAUGE, "bytes", _MOUNT, Stability.STABLE, "Size of the model's blobs."
)
MOUNT_CACHED = Metric(
    "modelmount_mount_cached_bytes", Kind.GAUGE, "bytes", _MOUNT, Stability.STABLE, "How much of it is on this node."
)
MOUNT_RESTING = Metric(
    "modelmount_mount_resting",
    Kind.GAUGE,
    "",
    _MOUNT,
    Stability.BETA,
    "1 while nobody reads it, so that it has no worker; the next read starts one.",
)
MOUNT_MEMORY_BUDGET = Metric(
    "modelmount_mount_memory_budget_bytes",
    Kind.GAUGE,
    "bytes",
    _MOUNT,
    Stability.BETA,
    "What it may hold in memory between registry and readers: its share of --memory-budget; 0 while it has no processes.",
)
MOUNT_BLOBS = Metric(
    "modelmount_mount_blobs",
    Kind.GAUGE,
    "blobs",
    (*_MOUNT, "state"),
    Stability.STABLE,
    "Blobs by state: filling, verified (sha256 matches), poisoned (it does not: reads fail).",
)
MOUNT_PASSED_BLOBS = Metric(
    "modelmount_mount_passed_blobs",
    Kind.GAUGE,
    "blobs",
    _MOUNT,
    Stability.BETA,
    "Blobs that the kernel reads from the cache by itself when their file is opened next.",
)
DATA_SIZE = Metric(
    "modelmount_data_size_bytes", Kind.GAUGE, "bytes", (), Stability.STABLE, "Size of the cache's file system."
)
DATA_FREE = Metric(
    "modelmount_data_free_bytes", Kind.GAUGE, "bytes", (), Stability.STABLE, "What is free there for root's processes."
)

TABLE: tuple[Metric, ...] = (
    BUILD_INFO,
    COMPONENT_UP,
    CSI_CALL_SECONDS,
    MOUNT_INFO,
    MOUNT_TARGETS,
    MOUNT_DEAD,
    MOUNT_SIZE,
    MOUNT_CACHED,
    MOUNT_RESTING,
    MOUNT_MEMORY_BUDGET,
    MOUNT_BLOBS,
    MOUNT_PASSED_BLOBS,
    *MOUNT_COUNTERS,
    DATA_SIZE,
    DATA_FREE,
)


def as_markdown() -> str:
    """The rows of docs/metrics.md."""
    lines = ["| name | type | unit | labels | stability | meaning |", "|---|---|---|---|---|---|"]
    for metric in TABLE:
        labels = ", ".join(f"`{label}`" for label in metric.labels) or "-"
        lines.append(
            f"| `{metric.name}` | {metric.kind} | {metric.unit or '-'} | {labels} | {metric.stability} | {metric.meaning} |"
        )
    return "\n".join(lines) + "\n"
