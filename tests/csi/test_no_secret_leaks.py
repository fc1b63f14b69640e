"""Canary secrets in every field that may carry one, over real RPCs to real processes that log everything they log."""

from __future__ import annotations

import base64
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from fakes.registry import FakeRegistry
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.controller_process import ControllerProcess, create_request
from support.node_process import NodeProcess, publish_request

from csi.wire import csi_pb2

pytestmark = pytest.mark.fuse

TOKENS = "csi.storage.k8s.io/serviceAccount.tokens"
CANARY = "cAnArY"
# What follows the canary: anything a password may have in it.
SECRETS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=20).map(CANARY.__add__)
KEYS = st.sampled_from(["username", "password", ".dockerconfigjson", ".dockercfg", "token", TOKENS])


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    with NodeProcess(tmp_path_factory.mktemp("node"), "--log-level=debug", "--spares=0") as process:
        yield process


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControllerProcess]:
    directory = tmp_path_factory.mktemp("controller")
    flags = (f"--volume-dir={directory}/volumes", "--log-level=debug")
    with ControllerProcess(directory, *flags) as process:
        yield process


@pytest.fixture(scope="module")
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry("somebody", "something") as private:
        private.add_model("team/model", "v1", {"config.json": b"{}"})
        yield private


def forms(secret: str) -> list[bytes]:
    """How a secret may look in a file: as it is, in JSON, in base64 at each alignment."""
    canary = CANARY.encode()
    # The characters of its base64 that do not depend on what stands before and behind it.
    encoded = [base64.b64encode(b"x" * shift + canary)[4 if shift else 0 : 8] for shift in range(3)]
    return [canary, *encoded, secret.encode(), json.dumps(secret).strip('"').encode()]


def written_below(*paths: Path) -> Iterator[tuple[Path, bytes]]:
    for path in paths:
        for directory, _, names in os.walk(path):
            for name in names:
                file = Path(directory) / name
                with contextlib.suppress(OSError):
                    if file.is_file() and not file.is_socket():
                        yield file, file.read_bytes()


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(KEYS, SECRETS, min_size=1), SECRETS, st.booleans())
def test_no_canary_is_found_anywhere(
    node: NodeProcess,
    controller: ControllerProcess,
    registry: FakeRegistry,
    secrets: dict[str, str],
    token: str,
    as_config: bool,
) -> None:
    reference = f"{registry.host}/team/model:v1"
    if as_config:
        auth = base64.b64encode(f"user:{token}".encode()).decode()
        secrets = {**secrets, ".dockerconfigjson": json.dumps({"auths": {registry.host: {"auth": auth}}})}
    said: list[str] = []
    target = node.target()
    request = publish_request(
        reference, target, secrets=secrets, attributes={TOKENS: json.dumps({"a": {"token": token}})}
    )
    request.volume_capability.mount.mount_flags.append("ro")
    for attempt in (request, _with_bad_flag(request, token)):
        with pytest.raises(grpc.RpcError) as caught:
            node.node.NodePublishVolume(attempt, timeout=30)
        said += [str(caught.value.details()), str(caught.value.debug_error_string())]
    with pytest.raises(grpc.RpcError) as caught:
        controller.controller.CreateVolume(
            create_request("pvc-canary", {"reference": reference}, secrets=secrets), timeout=15
        )
    said.append(str(caught.value.details()))
    said.append(json.dumps(node.status()))
    for text in said:
        assert CANARY not in text
    for file, content in written_below(node.directory, controller.log_path.parent):
        assert all(form not in content for form in forms(token)), file


def _with_bad_flag(request: csi_pb2.NodePublishVolumeRequest, token: str) -> csi_pb2.NodePublishVolumeRequest:
    changed = csi_pb2.NodePublishVolumeRequest()
    changed.CopyFrom(request)
    changed.volume_capability.mount.mount_flags.append(f"password={token}")
    return changed


def test_the_log_was_full_enough_to_find_something(node: NodeProcess, registry: FakeRegistry) -> None:
    with contextlib.suppress(grpc.RpcError):
        node.publish(f"{registry.host}/team/model:v1", node.target(), secrets={"username": CANARY, "password": CANARY})
    lines = [line for line in node.log_lines() if line["message"].startswith("NodePublishVolume {")]
    assert "team/model:v1" in lines[-1]["message"]
    assert "'password': '***'" in lines[-1]["message"]
