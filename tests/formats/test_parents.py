"""Volumes of kits that build on kits: two registries, mounted and compared; and chains that must not be mounted."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from fakes.registry import FakeRegistry, Fault
from formats.artifacts import CNCF, KIT, Artifact, Contents, Layer, artifact, body, files, packed, raw, tar
from formats.mounted import mounted
from formats.places import push
from registry_process import PASSWORD, USERNAME, RegistryProcess
from support.node_process import NodeProcess

pytestmark = [pytest.mark.fuse, pytest.mark.registry]

LOGIN = {"username": USERNAME, "password": PASSWORD}


def kit(shows: Contents, layers: list[Layer], model: dict[str, Any]) -> Artifact:
    """As kit packs it: digests in the Kitfile, no artifact type."""
    return artifact(f"{KIT}config.v1+json", layers, shows, config={"manifestVersion": "1.0.0", "model": model})


def base(name: str = "w/model.gguf") -> Artifact:
    """A kit with a model of its own, and docs that nobody inherits."""
    layers = [
        Layer(f"{KIT}model.v1.tar", tar(files(name))),
        Layer(f"{KIT}docs.v1.tar", tar(files("base.md"))),
    ]
    return kit({**files(name, "base.md")}, layers, {"path": name, "digest": "sha256:0"})


def middle(parent: str) -> Artifact:
    """Adds an adapter in a compressed archive."""
    part = Layer(f"{KIT}modelpart.v1.tar+gzip", packed(tar(files("adapter/a.bin")), "tar+gzip"))
    model = {"path": parent, "parts": [{"path": "adapter", "digest": "sha256:0"}]}
    return kit(files("adapter/a.bin"), [part], model)


def child(parent: str) -> Artifact:
    """Adds code."""
    return kit(files("run.py"), [Layer(f"{KIT}code.v1.tar", tar(files("run.py")))], {"path": parent})


@pytest.fixture
def other(tmp_path: Path) -> Iterator[FakeRegistry]:
    """A second registry, which needs no login."""
    with FakeRegistry() as registry:
        yield registry


def put(found: Artifact, registry: FakeRegistry, repository: str, tag: str) -> str:
    """Into a registry of this process; the reference by tag."""
    registry.blobs |= found.blobs
    registry.add_manifest(repository, tag, found.data, found.media_type)
    return f"{registry.host}/{repository}:{tag}"


def test_a_chain_through_two_registries_is_mounted_as_one_model(
    docker_registry: RegistryProcess, other: FakeRegistry, modelmount_node: NodeProcess
) -> None:
    host = docker_registry.host
    root = put(base(), other, "kits/root", "1")
    push(middle(root), host, "parents/middle", "1")
    reference = push(child(f"{host}/parents/middle:1"), host, "parents/child")
    target = modelmount_node.target()
    modelmount_node.publish(reference, target)
    assert mounted(target) == files("w/model.gguf", "adapter/a.bin", "run.py")
    (mount,) = modelmount_node.status()
    assert [parent.partition("@")[0] for parent in mount["parents"]] == [f"{host}/parents/middle:1", root]
    assert mount["progress"]["origins"] == [
        f"{host}/parents/child",
        f"{host}/parents/middle",
        f"{other.host}/kits/root",
    ]


def test_a_parent_in_the_same_repository_and_a_modelpack_as_a_parent(
    docker_registry: RegistryProcess, modelmount_node: NodeProcess
) -> None:
    host = docker_registry.host
    layers = [raw(f"{CNCF}weight.v1.raw", "model.safetensors"), raw(f"{CNCF}doc.v1.raw", "README.md")]
    pack = artifact(f"{CNCF}config.v1+json", layers, {}, artifact_type=f"{CNCF}manifest.v1+json")
    push(pack, host, "parents/one", "pack")
    reference = push(child(f"{host}/parents/one:pack"), host, "parents/one", "kit")
    target = modelmount_node.target()
    modelmount_node.publish(reference, target)
    assert mounted(target) == files("model.safetensors", "run.py")


def test_the_same_blob_in_kit_and_parent_is_one(other: FakeRegistry, modelmount_node: NodeProcess) -> None:
    part = Layer(f"{KIT}modelpart.v1.tar", tar(files("part.bin")))
    parent = kit(
        {}, [Layer(f"{KIT}model.v1.tar", tar(files("m.gguf"))), part], {"path": "m.gguf", "digest": "sha256:0"}
    )
    named = put(parent, other, "kits/parent", "1")
    reference = put(kit({}, [part], {"path": named}), other, "kits/child", "1")
    target = modelmount_node.target()
    modelmount_node.publish(reference, target)
    assert mounted(target) == files("m.gguf", "part.bin")


def test_a_moved_tag_of_a_parent_changes_no_published_volume(other: FakeRegistry, tmp_path: Path) -> None:
    named = put(base("old.gguf"), other, "kits/base", "1")
    reference = put(child(named), other, "kits/child", "1")
    with NodeProcess(tmp_path / "node") as node:
        first, again, fresh = node.target(), node.target(), node.target()
        node.publish(reference, first, "vol-1")
        put(base("new.gguf"), other, "kits/base", "1")
        node.publish(reference, again, "vol-1")
        node.publish(reference, fresh, "vol-2")
        assert mounted(first) == mounted(again) == files("old.gguf", "run.py")
        assert mounted(fresh) == files("new.gguf", "run.py")
        assert len({mount["mount_id"] for mount in node.status()}) == 2
        node.stop()
        node.start()
        for target, volume_id in ((first, "vol-1"), (again, "vol-1"), (fresh, "vol-2")):
            node.publish(reference, target, volume_id)
        assert mounted(first) == mounted(again) == files("old.gguf", "run.py")
        assert mounted(fresh) == files("new.gguf", "run.py")
        for target, volume_id in ((first, "vol-1"), (again, "vol-1"), (fresh, "vol-2")):
            node.unpublish(target, volume_id)
        node.publish(reference, first, "vol-1")
        assert mounted(first) == files("new.gguf", "run.py"), "the pin went with the volume's last target"
        node.unpublish_all()


def test_reads_go_on_from_a_new_fetcher_and_with_new_credentials(tmp_path: Path) -> None:
    """The blobs of the parent come from the parent's registry as the user of that registry, to whichever process asks."""
    content = os.urandom(9 << 20)
    with FakeRegistry("ann", "a-password") as own, FakeRegistry("ben", "b-password") as theirs:
        parent = kit({}, [Layer(f"{KIT}model.v1.tar", tar({"m.gguf": content}))], {"path": "m.gguf", "digest": "x"})
        named = put(parent, theirs, "kits/base", "1")
        reference = put(child(named), own, "kits/child", "1")
        auths = {own.host: {"username": "ann", "password": "a-password"},
                 theirs.host: {"username": "ben", "password": "b-password"}}  # fmt: skip
        secrets = {".dockerconfigjson": json.dumps({"auths": auths})}
        with NodeProcess(tmp_path / "node", "--read-deadline=20") as node:
            target = node.target()
            theirs.faults.append(Fault("/blobs/", after=5, times=10_000, status=503))
            node.publish(reference, target, secrets=secrets)
            (mount,) = node.status()
            os.kill(mount["fetcher_pid"], signal.SIGKILL)
            theirs.faults.clear()
            assert (target / "m.gguf").read_bytes() == content
            assert mounted(target) == {"m.gguf": content, **files("run.py")}
            assert not own.requests(str(parent.manifest["layers"][0]["digest"]))
            basic = {seen.authorization for seen in own.seen} & {seen.authorization for seen in theirs.seen}
            assert basic <= {None}, "nobody's login went to the other registry"
            node.unpublish_all()


def refusal(node: NodeProcess, reference: str, **arguments: Any) -> grpc.RpcError:
    target = node.target()
    with pytest.raises(grpc.RpcError) as caught:
        node.publish(reference, target, "refused", **arguments)
    assert not os.path.ismount(target)
    return caught.value


def test_a_private_parent_is_given_only_to_those_who_could_pull_it(
    private_registry: RegistryProcess, other: FakeRegistry, modelmount_node: NodeProcess
) -> None:
    node = modelmount_node
    push_private(base(), private_registry, "parents/base")
    named = f"{private_registry.host}/parents/base:1"
    reference = put(child(named), other, "kits/child", "1")
    secrets = {".dockerconfigjson": json.dumps({"auths": {private_registry.host: LOGIN}})}
    target = node.target()
    node.publish(reference, target, secrets=secrets)
    assert mounted(target) == files("w/model.gguf", "run.py")
    for given in (None, {".dockerconfigjson": json.dumps({"auths": {other.host: LOGIN}})}, LOGIN):
        error = refusal(node, reference, secrets=given)
        assert error.code() == grpc.StatusCode.PERMISSION_DENIED, "there was no login that could be wrong"
        assert f"builds on the kit {named}" in str(error.details())
    second = node.target()
    node.publish(reference, second, "vol-2", secrets=secrets)
    assert mounted(second) == mounted(target)
    assert not any(seen.authorization for seen in other.seen[-4:]), "a login of another registry went nowhere else"


def push_private(found: Artifact, registry: RegistryProcess, repository: str) -> None:
    """With the registry's user."""
    push(found, registry.host, repository, "1", login=(USERNAME, PASSWORD))


def circle(host: str) -> tuple[Artifact, str, grpc.StatusCode, str]:
    return child(f"{host}/kits/refused:1"), "1", grpc.StatusCode.FAILED_PRECONDITION, "in a circle"


def missing(host: str) -> tuple[Artifact, str, grpc.StatusCode, str]:
    return child(f"{host}/kits/nothing:1"), "1", grpc.StatusCode.NOT_FOUND, "builds on the kit"


def no_reference(host: str) -> tuple[Artifact, str, grpc.StatusCode, str]:
    return child("Base:1"), "1", grpc.StatusCode.FAILED_PRECONDITION, "no whole reference"


def a_directory(host: str) -> tuple[Artifact, str, grpc.StatusCode, str]:
    return child("oci-layout:/etc:1"), "1", grpc.StatusCode.FAILED_PRECONDITION, "no whole reference"


def the_metadata_service(host: str) -> tuple[Artifact, str, grpc.StatusCode, str]:
    return child("169.254.169.254/latest/meta-data:1"), "1", grpc.StatusCode.INTERNAL, "does not speak to"


@pytest.mark.parametrize("make", [circle, missing, no_reference, a_directory, the_metadata_service])
def test_a_parent_that_cannot_be_had_is_said(
    make: Callable[[str], tuple[Artifact, str, grpc.StatusCode, str]], other: FakeRegistry, modelmount_node: NodeProcess
) -> None:
    found, tag, code, says = make(other.host)
    error = refusal(modelmount_node, put(found, other, "kits/refused", tag))
    assert (error.code(), says in str(error.details())) == (code, True), error


def test_parents_of_the_wrong_kind_and_too_many_of_them(other: FakeRegistry, modelmount_node: NodeProcess) -> None:
    oras = artifact(
        "application/vnd.oci.empty.v1+json",
        [Layer("application/x", body("x"), {"org.opencontainers.image.title": "x"})],
        {},
    )
    named = put(oras, other, "kits/oras", "1")
    error = refusal(modelmount_node, put(child(named), other, "kits/on-oras", "1"))
    assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "a model of format oras" in str(error.details())
    named = put(base(), other, "kits/deep", "0")
    for depth in range(1, 12):
        named = put(child(named), other, "kits/deep", str(depth))
        if depth == 10:
            target = modelmount_node.target()
            modelmount_node.publish(named, target)
            assert mounted(target) == files("w/model.gguf", "run.py")
    error = refusal(modelmount_node, named)
    assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "more than 10 kits build on each other" in str(error.details())


def test_an_index_cannot_be_a_parent(other: FakeRegistry, modelmount_node: NodeProcess) -> None:
    root = base()
    put(root, other, "kits/root", "1")
    kind = "application/vnd.oci.image.index.v1+json"
    entry = {"mediaType": root.media_type, "digest": root.digest, "size": len(root.data)}
    other.add_manifest(
        "kits/root", "index", json.dumps({"schemaVersion": 2, "mediaType": kind, "manifests": [entry]}).encode(), kind
    )
    error = refusal(modelmount_node, put(child(f"{other.host}/kits/root:index"), other, "kits/child", "1"))
    assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "must name one manifest of it" in str(error.details())


def test_a_parent_whose_layer_is_wrong_is_found_out(tmp_path: Path, other: FakeRegistry) -> None:
    content = body("w/model.gguf", 300_000)
    root = kit({}, [Layer(f"{KIT}model.v1.tar", tar({"w/model.gguf": content}))], {"path": "w", "digest": "sha256:0"})
    named = put(root, other, "kits/root", "1")
    reference = put(child(named), other, "kits/child", "1")
    digest = str(root.manifest["layers"][0]["digest"])
    other.blobs[digest] = other.blobs[digest].replace(content[:64], bytes(64))
    with NodeProcess(tmp_path / "node", "--read-deadline=5") as node:
        target = node.target()
        node.publish(reference, target)
        deadline = time.monotonic() + 20
        while not any(event["reason"] == "IntegrityFailure" for event in node.status()[0]["events"]):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert (target / "run.py").read_bytes() == body("run.py")
        with pytest.raises(OSError, match="Input/output error"):
            (target / "w/model.gguf").read_bytes()
        node.unpublish_all()
