"""The endpoint: families from a supervisor's status, addresses, and real scrapes over HTTP."""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from csi.driver import calls
from csi.driver.exporter import Exporter, NodeCollector, mount_families, parse_address
from csi.errors import InvalidVolumeError
from csi.observe.metrics import TABLE

MIB = 1 << 20
MOUNT: dict[str, Any] = {
    "mount_id": "ab" * 16,
    "reference": "registry.example.com:5000/team/model:v1@sha256:" + "c" * 64,
    "digest": "sha256:" + "c" * 64,
    "verify": "chunk",
    "dead": False,
    "targets": ["/a", "/b"],
    "worker_resting": True,
    "memory_budget_bytes": 28 * MIB,
    "worker_restarts": 3,
    "fetcher_restarts": 0,
    "reads": {"reads": 7, "read_bytes": 70, "waited_reads": 2, "failed_reads": 1},
    "progress": {
        "fetched_bytes": 5 * MIB,
        "retries": 4,
        "blobs": [
            {"size_bytes": 5 * MIB, "blocks": 2, "present_blocks": 2, "state": "verified"},
            {"size_bytes": 8 * MIB, "blocks": 2, "present_blocks": 1, "state": "filling"},
        ],
    },
}


def samples(mounts: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    return {
        (sample.name, sample.labels.get("state", "")): sample.value
        for family in mount_families(mounts)
        for sample in family.samples
    }


def test_a_mount_is_told_as_the_supervisor_tells_it() -> None:
    found = samples([MOUNT])
    assert found["modelmount_mount_targets", ""] == 2
    assert found["modelmount_mount_size_bytes", ""] == 13 * MIB
    assert found["modelmount_mount_cached_bytes", ""] == 9 * MIB
    assert found["modelmount_mount_resting", ""] == 1
    assert found["modelmount_mount_memory_budget_bytes", ""] == 28 * MIB
    assert found["modelmount_mount_blobs", "verified"] == 1
    assert found["modelmount_mount_blobs", "filling"] == 1
    assert found["modelmount_mount_failed_reads_total", ""] == 1
    assert found["modelmount_mount_worker_restarts_total", ""] == 3
    assert found["modelmount_mount_fetch_retries_total", ""] == 4
    assert found["modelmount_mount_damaged_blocks_total", ""] == 0


def test_a_worker_that_does_not_answer_yet_is_no_error() -> None:
    found = samples([MOUNT | {"reads": {}, "progress": {}}])
    assert found["modelmount_mount_reads_total", ""] == 0
    assert found["modelmount_mount_size_bytes", ""] == 0


def test_the_model_is_its_repository_without_version() -> None:
    labels = (
        next(family for family in mount_families([MOUNT]) if family.name == "modelmount_mount_info").samples[0].labels
    )
    assert labels["model"] == "registry.example.com:5000/team/model"
    assert labels["verify"] == "chunk"


@pytest.mark.parametrize(
    ("address", "expected"),
    [("127.0.0.1:9808", ("127.0.0.1", 9808)), ("[::]:1", ("::", 1)), ("0.0.0.0:0", ("0.0.0.0", 0))],
)
def test_an_address_is_host_and_port(address: str, expected: tuple[str, int]) -> None:
    assert parse_address(address) == expected


@pytest.mark.parametrize("address", ["", "9808", ":9808", "host:", "host:http", "host:65536"])
def test_a_wrong_address_is_refused(address: str) -> None:
    with pytest.raises(InvalidVolumeError, match="metrics address"):
        parse_address(address)


def fetch(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as response:
        return str(response.read().decode())


def test_a_scrape_without_keeper_and_supervisor_says_so(tmp_path: Path) -> None:
    async def scrape() -> tuple[str, str]:
        exporter = Exporter("127.0.0.1:0", NodeCollector(str(tmp_path), str(tmp_path), "1.2.3"))
        exporter.start()
        try:
            calls.ended("NodePublishVolume", "OK", 0.2)
            text = await asyncio.to_thread(fetch, exporter.port, "/metrics")
            health = await asyncio.to_thread(fetch, exporter.port, "/healthz")
            with pytest.raises(urllib.error.HTTPError, match="404"):
                await asyncio.to_thread(fetch, exporter.port, "/")
        finally:
            await asyncio.to_thread(exporter.stop)
        return text, health

    text, health = asyncio.run(scrape())
    assert health == "ok\n"
    families = {family.name: family for family in text_string_to_metric_families(text)}
    up = {sample.labels["component"]: sample.value for sample in families["modelmount_component_up"].samples}
    assert up == {"keeper": 0, "supervisor": 0}
    assert families["modelmount_build_info"].samples[0].labels == {"version": "1.2.3"}
    assert families["modelmount_data_free_bytes"].samples[0].value > 0
    told = {name for name in families if not name.endswith("_created")}
    assert told <= {metric.name.removesuffix("_total") for metric in TABLE}


def test_a_blocked_event_loop_is_not_healthy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csi.driver.exporter._LOOP_PATIENCE_S", 0.2)

    async def probe() -> str:
        exporter = Exporter("127.0.0.1:0", NodeCollector(str(tmp_path), str(tmp_path), "1"))
        exporter.start()
        try:
            fetch(exporter.port, "/healthz")  # this call blocks the loop itself
        except urllib.error.HTTPError as exc:
            return str(exc.code)
        finally:
            exporter.stop()
        return "healthy"

    assert asyncio.run(probe()) == "500"
