"""A cached private model is given only to callers who could pull it; trust domains keep namespaces apart."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import grpc
import pytest
from fakes.registry import FakeRegistry, Fault
from support.node_process import NodeProcess, mounts_below

from csi.wire import csi_pb2

pytestmark = pytest.mark.fuse

FILES = {"config.json": b'{"a": 1}', "model.safetensors": os.urandom(3 * 1024 * 1024)}
SECRET = {"username": "tenant-a", "password": "of-tenant-a"}
TOKENS = "csi.storage.k8s.io/serviceAccount.tokens"
NAMESPACE = "csi.storage.k8s.io/pod.namespace"


@pytest.fixture
def private() -> Iterator[FakeRegistry]:
    with FakeRegistry(SECRET["username"], SECRET["password"]) as registry:
        yield registry


@pytest.fixture
def reference(private: FakeRegistry) -> str:
    return f"{private.host}/team/model@{private.add_model('team/model', 'v1', FILES)}"


def refusal(call: Callable[[], object]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def reasons(node: NodeProcess, target: Path) -> set[str]:
    request = csi_pb2.NodeGetVolumeHealthRequest(volume_id="vol-1", volume_publish_path=str(target))
    return {one.reason for one in node.node.NodeGetVolumeHealth(request, timeout=10).volume_health.health_statuses}


def test_namespace_b_without_a_secret_does_not_get_what_a_has_cached(
    modelmount_node: NodeProcess, reference: str
) -> None:
    a, b = modelmount_node.target("a"), modelmount_node.target("b")
    modelmount_node.publish(reference, a, "vol-a", secrets=SECRET, attributes={NAMESPACE: "a"})
    assert (a / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    error = refusal(lambda: modelmount_node.publish(reference, b, "vol-b", attributes={NAMESPACE: "b"}))
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "nodePublishSecretRef" in error.details()
    assert not b.exists()
    wrong = {"username": "tenant-b", "password": "wrong"}
    error = refusal(lambda: modelmount_node.publish(reference, b, "vol-b", secrets=wrong))
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert not b.exists()
    modelmount_node.unpublish(a, "vol-a")


def test_while_the_registry_is_down_only_who_could_read_it_may(
    modelmount_node: NodeProcess, private: FakeRegistry, reference: str
) -> None:
    first, again, stranger = (modelmount_node.target(name) for name in ("first", "again", "stranger"))
    modelmount_node.publish(reference, first, "vol-1", secrets=SECRET)
    private.faults.append(Fault(match="/manifests/", status=503, times=1_000_000))
    modelmount_node.publish(reference, again, "vol-2", secrets=SECRET)
    error = refusal(lambda: modelmount_node.publish(reference, stranger, "vol-3"))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    other = {"username": "b", "password": "b"}
    error = refusal(lambda: modelmount_node.publish(reference, stranger, "vol-3", secrets=other))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    modelmount_node.unpublish(first, "vol-1")
    modelmount_node.unpublish(again, "vol-2")


@pytest.mark.parametrize("indexed", [False, True])
def test_a_model_that_nobody_has_mounted_is_there_again_without_its_registry_for_who_could_read_it(
    tmp_path: Path, private: FakeRegistry, indexed: bool
) -> None:
    digest = private.add_model("team/model", "v1", FILES, indexed=indexed)
    by_tag, by_digest = f"{private.host}/team/model:v1", f"{private.host}/team/model@{digest}"
    with NodeProcess(tmp_path, "--spares=0", "--read-deadline=5") as node:
        first, again, stranger, tag = (node.target(name) for name in ("first", "again", "stranger", "tag"))
        node.publish(by_digest, first, "vol-1", secrets=SECRET)
        assert (first / "model.safetensors").read_bytes() == FILES["model.safetensors"]
        eventually(lambda: all(one["state"] == "verified" for one in node.status()[0]["progress"]["blobs"]))
        node.unpublish(first, "vol-1")
        assert node.status() == []
        private.faults.append(Fault(match="/", status=503, times=1_000_000))
        node.stop()
        node.start()
        node.publish(by_digest, again, "vol-2", secrets=SECRET)
        assert (again / "model.safetensors").read_bytes() == FILES["model.safetensors"]
        node.unpublish(again, "vol-2")
        for secrets in (None, {"username": "tenant-b", "password": "of-tenant-b"}):
            error = refusal(partial(node.publish, by_digest, stranger, "vol-3", secrets=secrets))
            assert error.code() is grpc.StatusCode.UNAVAILABLE
        error = refusal(lambda: node.publish(by_tag, tag, "vol-4", secrets=SECRET))
        assert error.code() is grpc.StatusCode.UNAVAILABLE, "what a tag names now only its registry can say"
        assert node.status() == []


def test_a_registry_that_has_only_the_manifest_leaves_no_record_that_opens_the_model_later(
    modelmount_node: NodeProcess,
) -> None:
    with FakeRegistry(SECRET["username"], SECRET["password"]) as owner, FakeRegistry() as other:
        digest = owner.add_model("team/model", "v1", FILES, indexed=True)
        other.manifests |= owner.manifests
        mine, theirs = modelmount_node.target("mine"), modelmount_node.target("theirs")
        claimed = f"{other.host}/team/model@{digest}"
        refusal(lambda: modelmount_node.publish(claimed, theirs, "vol-b"))
        modelmount_node.publish(f"{owner.host}/team/model@{digest}", mine, "vol-a", secrets=SECRET)
        refusal(lambda: modelmount_node.publish(claimed, theirs, "vol-b"))
        other.faults.append(Fault(match="/", status=503, times=1_000_000))
        assert refusal(lambda: modelmount_node.publish(claimed, theirs, "vol-b")).code() is grpc.StatusCode.UNAVAILABLE
        assert not theirs.exists()
        modelmount_node.unpublish(mine, "vol-a")
        refusal(lambda: modelmount_node.publish(claimed, theirs, "vol-b"))
        assert not theirs.exists()


def test_a_republish_that_may_not_read_any_more_is_ok_and_shows_as_health(
    modelmount_node: NodeProcess, reference: str
) -> None:
    target = modelmount_node.target()
    modelmount_node.publish(reference, target, secrets=SECRET)
    eventually(lambda: not reasons(modelmount_node, target))
    assert (target / "config.json").read_bytes() == FILES["config.json"], "from here on it is in the cache"
    modelmount_node.publish(reference, target, secrets={"username": "tenant-a", "password": "revoked"})
    eventually(lambda: "AccessRefused" in reasons(modelmount_node, target))
    assert (target / "config.json").read_bytes() == FILES["config.json"]
    modelmount_node.publish(reference, target, secrets=SECRET)
    eventually(lambda: "AccessRefused" not in reasons(modelmount_node, target))
    modelmount_node.unpublish(target)


@pytest.mark.parametrize("place", ["secrets", "volume_context"])
def test_a_service_account_token_logs_in_and_its_rotation_is_a_no_op(tmp_path: Path, place: str) -> None:
    with FakeRegistry("nobody", "nothing", tokens=True) as registry:
        registry.identity_tokens |= {"first-token", "second-token"}
        reference = f"{registry.host}/team/model@{registry.add_model('team/model', 'v1', FILES)}"
        with NodeProcess(tmp_path, f"--token-login={registry.host}=identity", "--spares=0") as node:
            target, other = node.target(), node.target("other")

            def publish(token: str, target: Path = target, volume_id: str = "vol-1", account: str = "reader") -> None:
                tokens = {TOKENS: json.dumps({registry.host: {"token": token, "expirationTimestamp": "2030"}})}
                pod = {NAMESPACE: "apps", "csi.storage.k8s.io/serviceAccount.name": account}
                attributes = pod if place == "secrets" else pod | tokens
                secrets = tokens if place == "secrets" else None
                node.publish(reference, target, volume_id, secrets=secrets, attributes=attributes)

            publish("first-token")
            before = mounts_below(tmp_path)
            publish("second-token")
            assert mounts_below(tmp_path) == before
            assert (target / "model.safetensors").read_bytes() == FILES["model.safetensors"]
            assert refusal(lambda: publish("unknown", other, "vol-2", "stranger")).code() in (
                grpc.StatusCode.UNAUTHENTICATED,
                grpc.StatusCode.PERMISSION_DENIED,
            )
            node.unpublish(target)
            assert "second-token" not in node.log_path.read_text()


def was_exchanged(sts: FakeRegistry, token: str) -> bool:
    return any(token in seen.form for seen in sts.requests("/sts"))


def test_a_service_account_token_is_exchanged_for_the_login_the_registry_wants(tmp_path: Path) -> None:
    """A renewed token is exchanged anew; a service that is down then changes nothing for the live volume."""
    with FakeRegistry("robot", "of-the-robot") as registry, FakeRegistry() as sts:
        answer = json.dumps({"access_token": "of-the-robot", "expires_in": 3600}).encode()
        sts.faults.append(Fault(match="/sts", status=200, body=answer, times=1_000_000))
        reference = f"{registry.host}/team/model@{registry.add_model('team/model', 'v1', FILES)}"
        login = f"--token-login={registry.host}=exchange:robot:http://{sts.host}/sts?audience=models"
        with NodeProcess(tmp_path, login, "--spares=0", "--log-level=debug") as node:
            target = node.target()
            for token in ("canary-jwt-1", "canary-jwt-2"):
                tokens = {TOKENS: json.dumps({registry.host: {"token": token}})}
                node.publish(reference, target, secrets=tokens, attributes={NAMESPACE: "apps"})
                eventually(partial(was_exchanged, sts, token))
            assert (target / "model.safetensors").read_bytes() == FILES["model.safetensors"]
            sts.faults[:] = [Fault(match="/sts", status=503, times=1_000_000)]
            tokens = {TOKENS: json.dumps({registry.host: {"token": "canary-jwt-3"}})}
            node.publish(reference, target, secrets=tokens, attributes={NAMESPACE: "apps"})
            error = refusal(lambda: node.publish(reference, node.target(), "vol-2", secrets=tokens))
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            node.unpublish(target)
            log = node.log_path.read_text()
            assert "canary-jwt" not in log
            assert "of-the-robot" not in log
        assert not any("canary-jwt" in f"{seen.form}{seen.authorization}" for seen in registry.requests("/"))


def test_isolated_namespaces_share_nothing(tmp_path: Path, private: FakeRegistry, reference: str) -> None:
    with NodeProcess(tmp_path, "--sharing=isolated", "--spares=0") as node:
        targets = {name: node.target(name) for name in ("a", "a2", "b")}
        for number, (name, target) in enumerate(targets.items()):
            attributes = {NAMESPACE: name[0]}
            node.publish(reference, target, f"vol-{number}", secrets=SECRET, attributes=attributes)
            assert (target / "config.json").read_bytes() == FILES["config.json"]
        devices = {name: os.stat(target).st_dev for name, target in targets.items()}
        assert devices["a"] == devices["a2"] != devices["b"]
        error = refusal(lambda: node.publish(reference, node.target("none"), "vol-9", secrets=SECRET))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "podInfoOnMount" in error.details()
        for number, target in enumerate(targets.values()):
            node.unpublish(target, f"vol-{number}")
