"""Canary secrets in every field that may carry one, over real RPCs to real processes that log everything they log."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from fakes.kube_api import FakeKubeApi
from fakes.registry import FakeRegistry
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.controller_process import ControllerProcess, create_request
from support.node_process import NodeProcess, alive, process_of, publish_request

from csi.wire import csi_pb2

pytestmark = pytest.mark.fuse

TOKENS = "csi.storage.k8s.io/serviceAccount.tokens"
CANARY = "cAnArY"
# What follows the canary: anything a password may have in it.
SECRETS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=20).map(CANARY.__add__)
KEYS = st.sampled_from(["username", "password", ".dockerconfigjson", ".dockercfg", "token", TOKENS])


POD = {f"csi.storage.k8s.io/pod.{key}": value for key, value in {"namespace": "apps", "name": "p", "uid": "u"}.items()}


@pytest.fixture(scope="module")
def api() -> Iterator[FakeKubeApi]:
    """Where events go."""
    with FakeKubeApi() as found:
        yield found


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, api: FakeKubeApi) -> Iterator[NodeProcess]:
    directory = tmp_path_factory.mktemp("node")
    kubeconfig = api.kubeconfig(directory / "kubeconfig")
    with NodeProcess(directory, "--log-level=debug", "--spares=0", f"--kubeconfig={kubeconfig}") as process:
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
    api: FakeKubeApi,
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
        reference, target, secrets=secrets, attributes={TOKENS: json.dumps({"a": {"token": token}})} | POD
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
    events = api.below("/namespaces/apps/events/")
    assert events, "a refusal is told"
    said.append(json.dumps(events, ensure_ascii=False))
    for text in said:
        assert CANARY not in text
    for file, content in written_below(node.directory, controller.log_path.parent):
        assert all(form not in content for form in forms(token)), file


def test_no_process_leaves_a_core_with_what_it_knows(tmp_path: Path, registry: FakeRegistry) -> None:
    """However the system's limits and its core pattern (here often `core`, in the working directory) are set."""
    place = tmp_path / "cwd"
    place.mkdir()
    unlimited = ("sh", "-c", f'ulimit -c unlimited && cd {place} && exec "$@"', "unlimited")
    source = {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    with NodeProcess(
        tmp_path / "n", "--spares=0", under=("env", *(f"{k}={v}" for k, v in source.items()), *unlimited)
    ) as node:
        target = node.target()
        node.publish(
            f"{registry.host}/team/model:v1", target, secrets={"username": "somebody", "password": "something"}
        )
        (mount,) = node.status()
        for pid in (
            mount["worker_pid"],
            mount["fetcher_pid"],
            process_of(node.pid, "store"),
            process_of(node.pid, "node"),
            process_of(node.pid, "supervisor"),
        ):
            limits = Path(f"/proc/{pid}/limits").read_text()
            (core,) = [line.split()[4:6] for line in limits.splitlines() if line.startswith("Max core file size")]
            assert core == ["0", "0"], pid
            os.kill(pid, signal.SIGSEGV)
            deadline = time.monotonic() + 60
            while alive(pid):
                assert time.monotonic() < deadline
                time.sleep(0.02)
        assert [path.name for path in place.iterdir() if "core" in path.name] == []
        node.stop()


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
