"""A node with hosts.toml files: where a mounted model's bytes come from, and what happens when a mirror dies."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
from pathlib import Path

import grpc
import pytest
from fakes.registry import FakeRegistry, Fault
from support.node_process import NodeProcess

pytestmark = pytest.mark.fuse

CONTENT = os.urandom(6 << 20)


def test_a_mounted_model_comes_from_a_mirror_and_goes_on_without_it(tmp_path: Path) -> None:
    certs = tmp_path / "certs.d"
    with FakeRegistry("ann", "canary-password") as registry, FakeRegistry() as mirror:
        for fake in (registry, mirror):
            fake.add_model("team/model", "v1", {"a.bin": CONTENT, "b.bin": CONTENT[:5000]})
        directory = certs / (registry.host.replace(":", "_") + "_")
        directory.mkdir(parents=True)
        toml = f'[host."http://{mirror.host}"]\n[host."http://{mirror.host}".header]\nX-Key = "canary-header"\n'
        (directory / "hosts.toml").write_text(toml)
        secrets = {"username": "ann", "password": "canary-password"}
        with NodeProcess(tmp_path / "node", f"--registry-config-dir={certs}", "--log-level=debug") as node:
            mirror.faults.append(Fault("/blobs/", after=1, status=503, times=999))
            target = node.target()
            node.publish(f"{registry.host}/team/model:v1", target, secrets=secrets)
            assert (target / "a.bin").read_bytes() == CONTENT
            assert (target / "b.bin").read_bytes() == CONTENT[:5000]
            assert mirror.requests("/manifests/")
            assert {seen.headers.get("X-Key") for seen in mirror.seen} == {"canary-header"}
            assert {seen.authorization for seen in mirror.seen} == {None}
            assert registry.requests("/blobs/"), "the mirror broke down, the registry went on"
            (directory / "hosts.toml").write_text("server = canary-typo")
            other = node.target("other")
            with pytest.raises(grpc.RpcError) as caught:
                node.publish(f"{registry.host}/team/other:v1", other, "vol-2", secrets=secrets)
            assert "hosts.toml" in str(caught.value)
            assert (target / "a.bin").read_bytes() == CONTENT, "what is mounted stays"
            said = node.log_path.read_text() + str(caught.value)
            node.unpublish_all()
    assert "canary-password" not in said
    assert "canary-header" not in said


def test_a_mirror_that_lies_costs_nobody_a_wrong_byte(tmp_path: Path) -> None:
    certs = tmp_path / "certs.d"
    with FakeRegistry() as registry, FakeRegistry() as mirror:
        for fake in (registry, mirror):
            fake.add_model("team/model", "v1", {"a.bin": CONTENT}, indexed=True)
        directory = certs / (registry.host.replace(":", "_") + "_")
        directory.mkdir(parents=True)
        (directory / "hosts.toml").write_text(f'[host."http://{mirror.host}"]\n')
        digest = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
        mirror.faults.append(Fault(digest, flip_at=1234, times=999))
        with NodeProcess(tmp_path / "node", f"--registry-config-dir={certs}", "--read-deadline=10") as node:
            target = node.target()
            node.publish(f"{registry.host}/team/model:v1", target)
            assert (target / "a.bin").read_bytes() == CONTENT
            (mount,) = node.status()
            assert mount["verify"] == "chunk"
            assert 1 <= len(mirror.requests(digest)) <= 4, "every connection asks it once at most"
            node.unpublish_all()


def test_the_nodes_logins_are_renewed_while_models_are_mounted(tmp_path: Path) -> None:
    """No republish comes: the password in the node's own file has changed."""
    config = tmp_path / "config.json"
    with FakeRegistry("ann", "old", tokens=True) as registry:
        registry.token_lifetime_s = 1
        registry.add_model("team/model", "v1", {"a.bin": CONTENT}, indexed=True)
        auths = {registry.host: {"username": "ann", "password": "old"}}
        config.write_text(json.dumps({"auths": auths}))
        flags = (f"--node-registry-config={config}", "--logins-kept=1", "--read-deadline=60")
        with NodeProcess(tmp_path / "node", *flags) as node:
            target = node.target()
            node.publish(f"{registry.host}/team/model:v1", target, attributes={"prefetch": "ondemand"})
            with open(target / "a.bin", "rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
                assert os.pread(file.fileno(), 1000, 0) == CONTENT[:1000]
                registry.expect("ann", "new")
                registry.valid_tokens.clear()
                config.write_text(json.dumps({"auths": {registry.host: {"username": "ann", "password": "new"}}}))
                at = len(CONTENT) - 1000
                assert os.pread(file.fileno(), 1000, at) == CONTENT[at:], "waited for the new password"
            node.unpublish_all()


def test_expired_credentials_never_break_reads_of_what_is_here(tmp_path: Path) -> None:
    with FakeRegistry("ann", "old", tokens=True) as registry:
        registry.add_model("team/model", "v1", {"a.bin": CONTENT, "b.bin": CONTENT[::-1]}, indexed=True)
        with NodeProcess(tmp_path / "node", "--read-deadline=60") as node:
            target, reference = node.target(), f"{registry.host}/team/model:v1"
            secrets = {"username": "ann", "password": "old"}
            node.publish(reference, target, secrets=secrets, attributes={"prefetch": "ondemand"})
            assert (target / "a.bin").read_bytes() == CONTENT
            registry.expect("ann", "new")
            registry.valid_tokens.clear()
            node.publish(reference, target, secrets=secrets, attributes={"prefetch": "ondemand"})
            os.kill(node.status()[0]["fetcher_pid"], signal.SIGKILL)
            for _ in range(3):
                drop_pages(target / "a.bin")
                assert (target / "a.bin").read_bytes() == CONTENT
            read: list[bytes] = []
            reader = threading.Thread(target=lambda: read.append((target / "b.bin").read_bytes()))
            reader.start()
            reader.join(1.0)
            assert reader.is_alive(), "what is not here waits"
            secrets = {"username": "ann", "password": "new"}
            node.publish(reference, target, secrets=secrets, attributes={"prefetch": "ondemand"})
            reader.join(60)
            assert read == [CONTENT[::-1]]
            node.unpublish_all()


def drop_pages(path: Path) -> None:
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_only_listed_registries_may_be_named(tmp_path: Path) -> None:
    with FakeRegistry() as registry, FakeRegistry() as other:
        for fake in (registry, other):
            fake.add_model("team/model", "v1", {"a.bin": CONTENT})
        with NodeProcess(tmp_path / "node", f"--allow-registry={registry.host}") as node:
            target = node.target()
            node.publish(f"{registry.host}/team/model:v1", target)
            assert (target / "a.bin").read_bytes() == CONTENT
            with pytest.raises(grpc.RpcError) as caught:
                node.publish(f"{other.host}/team/model:v1", node.target(), "vol-2")
            assert isinstance(caught.value, grpc.Call)
            assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
            assert "--allow-registry" in str(caught.value.details())
            assert other.seen == []
            node.unpublish_all()
