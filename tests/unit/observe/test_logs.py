"""JSON lines with context."""

from __future__ import annotations

import asyncio
import json
import logging

from csi.observe import logs


def line(**extra: object) -> dict[str, object]:
    record = logging.getLogger("csi.test").makeRecord(
        "csi.test", logging.INFO, "f", 1, "said %s", ("so",), None, extra=extra
    )
    found: dict[str, object] = json.loads(logs.JsonFormatter("node").format(record))
    return found


def test_a_record_carries_the_context_of_its_task_and_nobody_elses() -> None:
    async def one(volume_id: str) -> dict[str, object]:
        with logs.context(rpc="NodePublishVolume", volume_id=volume_id, digest=None):
            await asyncio.sleep(0)
            return await asyncio.to_thread(line, attempt=2)

    async def both() -> list[dict[str, object]]:
        return list(await asyncio.gather(one("a"), one("b")))

    found = asyncio.run(both())
    assert [entry["volume_id"] for entry in found] == ["a", "b"]
    assert all(entry["rpc"] == "NodePublishVolume" and entry["attempt"] == 2 for entry in found)
    assert all("digest" not in entry for entry in found)
    assert "volume_id" not in line()
    assert line()["message"] == "said so"


def test_contexts_nest() -> None:
    with logs.context(rpc="outer"), logs.context(rpc="inner", volume_id="v"):
        assert (line()["rpc"], line()["volume_id"]) == ("inner", "v")
