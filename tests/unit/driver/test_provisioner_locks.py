"""Creating and deleting one volume exclude each other, whatever each of them calls it."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from csi.credentials import Credentials
from csi.driver.provisioner import CreateRequest, Provisioner, volume_id_of
from csi.driver.volume_files import ProvisionedVolumeFiles
from csi.errors import OperationPendingError
from csi.oci.digest import Digest
from csi.oci.reference import Reference

NAME = "pvc-one"
REQUEST = CreateRequest(name=NAME, parameters={"reference": "registry.example/team/model:v1"}, capabilities=[[1]])


class SlowRegistry:
    """Answers once it is told to."""

    def __init__(self) -> None:
        self.asked, self.answer = threading.Event(), threading.Event()

    def __call__(self, reference: Reference, variant: str, credentials: Credentials) -> tuple[Digest, int]:
        self.asked.set()
        assert self.answer.wait(60)
        return Digest.of(b"manifest"), 1000


def test_a_volume_is_not_deleted_while_it_is_created(tmp_path: Path) -> None:
    registry = SlowRegistry()
    provisioner = Provisioner(ProvisionedVolumeFiles(str(tmp_path)), None, registry)

    async def play() -> None:
        creating = asyncio.create_task(provisioner.create(REQUEST))
        assert await asyncio.to_thread(registry.asked.wait, 60)
        with pytest.raises(OperationPendingError):
            await provisioner.delete(volume_id_of(NAME))
        with pytest.raises(OperationPendingError):
            await provisioner.create(REQUEST)
        registry.answer.set()
        volume = await creating
        assert await provisioner.find(volume.volume_id) == volume
        await provisioner.delete(volume.volume_id)
        await provisioner.delete(volume.volume_id)

    asyncio.run(play())
    assert list(tmp_path.iterdir()) == []
