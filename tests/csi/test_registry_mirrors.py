"""A node with hosts.toml files: where a mounted model's bytes come from, and what happens when a mirror dies."""

from __future__ import annotations

import os
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
