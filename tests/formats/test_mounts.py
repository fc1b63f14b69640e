"""Every artifact of the collection, published over CSI and compared byte for byte; and the hostile ones, refused."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable

import grpc
import pytest
from formats import artifacts, hostile
from formats.artifacts import ARTIFACTS, Artifact
from formats.mounted import mounted
from formats.places import push
from registry_process import RegistryProcess
from support.node_process import NodeProcess

pytestmark = [pytest.mark.fuse, pytest.mark.registry]


@pytest.mark.parametrize("make", ARTIFACTS.values(), ids=ARTIFACTS)
def test_what_was_pushed_is_what_is_mounted(
    make: Callable[[], Artifact], docker_registry: RegistryProcess, modelmount_node: NodeProcess
) -> None:
    found = make()
    reference = push(found, docker_registry.host, f"mounts/{make.__name__.replace('_', '-')}")
    target = modelmount_node.target()
    modelmount_node.publish(reference, target, attributes=found.attributes)
    assert mounted(target) == found.shows


def test_links_lead_to_the_files_they_name(docker_registry: RegistryProcess, modelmount_node: NodeProcess) -> None:
    reference = push(artifacts.docker_car(), docker_registry.host, "mounts/links")
    target = modelmount_node.target()
    modelmount_node.publish(reference, target, attributes={"subPath": "models/hf/snapshots/main"})
    assert mounted(target) == {"model.gguf": artifacts.body("blobs/1")}
    whole = modelmount_node.target()
    modelmount_node.publish(reference, whole, "vol-2")
    for path in ("models/model.file", "models/hf/snapshots/main/model.gguf", "models/again.gguf"):
        assert (whole / path).read_bytes() == artifacts.body("blobs/1")
    assert os.readlink(whole / "models/model.file") == "blobs/1"
    done = subprocess.run(["find", "-L", str(whole), "-type", "l"], capture_output=True, text=True, check=True)
    assert done.stdout == "", "a link that leads nowhere"


def test_two_views_of_one_model_are_two_mounts(docker_registry: RegistryProcess, modelmount_node: NodeProcess) -> None:
    found = artifacts.modctl()
    reference = push(found, docker_registry.host, "mounts/views")
    views: list[dict[str, str]] = [{}, {"files": "*.json,src/**"}, {"subPath": "src"}]
    shown = []
    for number, attributes in enumerate(views):
        target = modelmount_node.target()
        modelmount_node.publish(reference, target, f"vol-{number}", attributes=attributes)
        shown.append(mounted(target))
    assert shown[0] == found.shows
    assert shown[1] == {path: found.shows[path] for path in ("config.json", "src", "src/run.py")}
    assert shown[2] == {"run.py": found.shows["src/run.py"]}
    assert len({mount["mount_id"] for mount in modelmount_node.status()}) == 3


@pytest.mark.parametrize("make", hostile.ARTIFACTS.values(), ids=hostile.ARTIFACTS)
def test_what_must_not_be_mounted_is_refused_with_the_reason(
    make: Callable[[], hostile.Hostile], docker_registry: RegistryProcess, modelmount_node: NodeProcess
) -> None:
    found = make()
    reference = push(found.artifact, docker_registry.host, f"hostile/{make.__name__.replace('_', '-')}")
    target = modelmount_node.target()
    with pytest.raises(grpc.RpcError) as caught:
        modelmount_node.publish(reference, target, attributes=found.artifact.attributes)
    assert isinstance(caught.value, grpc.Call)
    assert found.says in str(caught.value.details())
    assert caught.value.code() in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.DATA_LOSS)
    assert not os.path.ismount(target)
