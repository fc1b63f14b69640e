"""The node service at the edges of what CSI allows: names, repeats, races, deadlines, what else may be at a target path."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from fakes.registry import FakeRegistry, Fault
from support.hang import hung
from support.node_process import COMMAND, NodeProcess, mounts_below, process_of, publish_request

from csi.driver.capabilities import MOUNT_FLAGS
from csi.wire import csi_pb2, csi_pb2_grpc

pytestmark = pytest.mark.fuse

FILES = {"config.json": b'{"a": 1}', "weights/model.safetensors": os.urandom(5 * 1024 * 1024)}
OK, ABORTED = grpc.StatusCode.OK, grpc.StatusCode.ABORTED


@pytest.fixture
def model(fake_registry: FakeRegistry) -> str:
    """A reference to FILES."""
    return f"{fake_registry.host}/team/model@{fake_registry.add_model('team/model', 'v1', FILES)}"


@pytest.fixture
def own_node(tmp_path: Path) -> Iterator[NodeProcess]:
    """For tests that stop its processes."""
    with NodeProcess(tmp_path, "--spares=0", "--metrics-address=127.0.0.1:0") as node:
        yield node


def code_of(call: Callable[[], object]) -> grpc.StatusCode:
    try:
        call()
    except grpc.RpcError as exc:
        found: grpc.StatusCode = exc.code()
        return found
    return OK


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def whole_life(node: NodeProcess, reference: str, target: Path, volume_id: str) -> None:
    """Publish, again, read, ask, unpublish; nothing is left."""
    node.publish(reference, target, volume_id)
    before = mounts_below(node.directory)
    assert str(target) in before
    node.publish(reference, target, volume_id)
    assert mounts_below(node.directory) == before
    assert (target / "config.json").read_bytes() == FILES["config.json"]
    stats = csi_pb2.NodeGetVolumeStatsRequest(volume_id=volume_id, volume_path=str(target))
    assert node.node.NodeGetVolumeStats(stats, timeout=10).usage[0].total == sum(map(len, FILES.values()))
    health = csi_pb2.NodeGetVolumeHealthRequest(volume_id=volume_id, volume_publish_path=str(target))
    eventually(lambda: not node.node.NodeGetVolumeHealth(health, timeout=10).volume_health.health_statuses)
    node.unpublish(target, volume_id)
    assert not os.path.lexists(target)
    assert mounts_below(node.directory) == []


# --- names


@pytest.mark.parametrize(
    "name",
    ["with space", "back\\slash", "tab\tand\nnewline", "Größe-模型-🤗", "a'b\"c$d;e", "octal\\040", "-rf", "x" * 255],
    ids=["space", "backslash", "control", "unicode", "quotes", "octal", "dash", "long"],
)
def test_target_paths_may_have_any_name(modelmount_node: NodeProcess, model: str, name: str) -> None:
    whole_life(modelmount_node, model, modelmount_node.target().parent / name, "vol-1")


def test_a_target_path_may_be_as_long_as_a_path(modelmount_node: NodeProcess, model: str) -> None:
    directory = modelmount_node.target().parent
    while len(str(directory)) < 3600:
        directory = directory / ("d" * 200)
    directory.mkdir(parents=True)
    whole_life(modelmount_node, model, directory / "mount", "vol-1")


@pytest.mark.parametrize("volume_id", ["v" * 128, "模" * 42 + "id", "../../etc", "a/b c\\d\n", "csi-" + "0" * 64])
def test_volume_ids_may_be_any_text_of_128_bytes(modelmount_node: NodeProcess, model: str, volume_id: str) -> None:
    assert len(volume_id.encode()) <= 128
    whole_life(modelmount_node, model, modelmount_node.target(), volume_id)


@pytest.mark.parametrize("volume_id", ["v" * 129, "模" * 43])
def test_a_longer_volume_id_is_refused(modelmount_node: NodeProcess, model: str, volume_id: str) -> None:
    target = modelmount_node.target()
    refused = code_of(lambda: modelmount_node.publish(model, target, volume_id))
    assert refused is grpc.StatusCode.INVALID_ARGUMENT
    assert not target.exists()


@pytest.mark.parametrize(
    "authority", ["localhost", "%2Fvar%2Flib%2Fkubelet%2Fplugins%2Fx%2Fcsi.sock", "csi.sock", "a:b@c"]
)
def test_any_authority_is_answered(modelmount_node: NodeProcess, authority: str) -> None:
    """Clients of other languages send the socket's path, percent-encoded or not at all."""
    options = [("grpc.default_authority", authority)]
    with grpc.insecure_channel(f"unix:{modelmount_node.socket_path}", options=options) as channel:
        info = csi_pb2_grpc.IdentityStub(channel).GetPluginInfo(csi_pb2.GetPluginInfoRequest(), timeout=10)
    assert info.name == "csi.modelmount.dev"


@pytest.mark.parametrize("flag", ["--registration-dir", "--endpoint"])
def test_a_path_too_long_for_a_socket_is_said_at_the_start(tmp_path: Path, flag: str) -> None:
    long = tmp_path / ("x" * 110)
    value = {"--registration-dir": str(long), "--endpoint": f"unix://{long}/csi.sock"}[flag]
    flags = [] if flag == "--endpoint" else ["--endpoint", f"unix://{tmp_path}/csi.sock"]
    directories = ["--state-dir", str(tmp_path / "s"), "--data-dir", str(tmp_path / "d")]
    done = subprocess.run(
        [*COMMAND, "node", *flags, flag, value, *directories], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "107" in done.stderr


# --- arguments


@pytest.mark.parametrize(
    "mode", [name for name in csi_pb2.VolumeCapability.AccessMode.Mode.DESCRIPTOR.values_by_name if name != "UNKNOWN"]
)
@pytest.mark.parametrize("readonly", [False, True])
def test_every_access_mode_gives_a_read_only_mount(
    modelmount_node: NodeProcess, model: str, mode: str, readonly: bool
) -> None:
    target, other = modelmount_node.target(), modelmount_node.target()
    for path in (target, other):  # the same volume at another target too, whatever the mode
        request = publish_request(model, path, readonly=readonly)
        request.volume_capability.access_mode.mode = getattr(csi_pb2.VolumeCapability.AccessMode, mode)
        modelmount_node.node.NodePublishVolume(request, timeout=60)
    with pytest.raises(OSError, match="Read-only"):
        (target / "new").touch()
    assert os.statvfs(target).f_flag & os.ST_RDONLY


@pytest.mark.parametrize("flags", [[flag] for flag in sorted(MOUNT_FLAGS)] + [sorted(MOUNT_FLAGS)])
def test_mount_options_that_hold_anyway_are_accepted(
    modelmount_node: NodeProcess, model: str, flags: list[str]
) -> None:
    request = publish_request(model, modelmount_node.target())
    request.volume_capability.mount.mount_flags.extend(flags)
    modelmount_node.node.NodePublishVolume(request, timeout=60)


@pytest.mark.parametrize(
    "flag", ["rw", "suid", "dev", "exec", "bind", "allow_other", "context=x", "password=s3cret", "", "RO"]
)
def test_any_other_mount_option_is_refused_by_its_name(modelmount_node: NodeProcess, model: str, flag: str) -> None:
    request = publish_request(model, target := modelmount_node.target())
    request.volume_capability.mount.mount_flags.append(flag)
    with pytest.raises(grpc.RpcError) as refused:
        modelmount_node.node.NodePublishVolume(request, timeout=60)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert repr(flag.partition("=")[0]) in refused.value.details()
    assert "s3cret" not in refused.value.details()
    assert not target.exists()


# --- repeats and races


@pytest.mark.parametrize("times", [10, 100])
def test_identical_publishes_are_one(
    modelmount_node: NodeProcess, fake_registry: FakeRegistry, model: str, times: int
) -> None:
    target = modelmount_node.target()
    modelmount_node.publish(model, target)
    mounts, asked = mounts_below(modelmount_node.directory), len(fake_registry.requests("/manifests/"))
    for _ in range(times - 1):
        modelmount_node.publish(model, target)
    assert mounts_below(modelmount_node.directory) == mounts
    assert len(fake_registry.requests("/manifests/")) == asked


def test_of_publishes_of_one_target_at_once_one_works_and_the_others_are_told_to_wait(
    modelmount_node: NodeProcess, fake_registry: FakeRegistry, model: str
) -> None:
    target = modelmount_node.target()
    fake_registry.faults.append(Fault(match="/manifests/", stall_s=2))
    with ThreadPoolExecutor(max_workers=12) as threads:
        codes = list(threads.map(lambda _: code_of(lambda: modelmount_node.publish(model, target)), range(12)))
    assert OK in codes
    assert set(codes) <= {OK, ABORTED}
    assert mounts_below(modelmount_node.directory).count(str(target)) == 1
    assert len(fake_registry.requests("/manifests/")) == 1


def test_a_publish_whose_caller_gave_up_goes_on_and_the_next_joins_it(
    modelmount_node: NodeProcess, fake_registry: FakeRegistry, model: str
) -> None:
    target = modelmount_node.target()
    fake_registry.faults.append(Fault(match="/manifests/", stall_s=3))
    request = publish_request(model, target)
    first = code_of(lambda: modelmount_node.node.NodePublishVolume(request, timeout=0.5))
    assert first is grpc.StatusCode.DEADLINE_EXCEEDED
    assert code_of(lambda: modelmount_node.publish(model, target)) in (OK, ABORTED)
    eventually(lambda: code_of(lambda: modelmount_node.publish(model, target)) is OK)
    assert (target / "config.json").read_bytes() == FILES["config.json"]
    assert len(fake_registry.requests("/manifests/")) == 1, "the work of the first call was not done again"


def test_an_unpublish_wins_over_the_publish_in_work(
    modelmount_node: NodeProcess, fake_registry: FakeRegistry, model: str
) -> None:
    target = modelmount_node.target()
    fake_registry.faults.append(Fault(match="/manifests/", stall_s=3))
    publishing = threading.Thread(target=lambda: code_of(lambda: modelmount_node.publish(model, target)))
    publishing.start()
    eventually(lambda: fake_registry.requests("/manifests/"))
    modelmount_node.unpublish(target)
    publishing.join()
    assert not target.exists()
    assert mounts_below(modelmount_node.directory) == []
    assert modelmount_node.status() == []


def test_an_unpublish_that_cannot_wait_longer_says_so_and_wins_later(
    modelmount_node: NodeProcess, fake_registry: FakeRegistry, model: str
) -> None:
    target = modelmount_node.target()
    fake_registry.faults.append(Fault(match="/manifests/", stall_s=14))
    publishing = threading.Thread(target=lambda: code_of(lambda: modelmount_node.publish(model, target)))
    publishing.start()
    eventually(lambda: fake_registry.requests("/manifests/"))
    assert code_of(lambda: modelmount_node.unpublish(target)) is ABORTED
    modelmount_node.unpublish(target)
    publishing.join()
    assert not target.exists()
    assert modelmount_node.status() == []


def test_publishes_and_unpublishes_of_one_target_in_any_order_leave_what_the_last_one_said(
    modelmount_node: NodeProcess, model: str
) -> None:
    target = modelmount_node.target()
    with ThreadPoolExecutor(max_workers=8) as threads:
        calls = [
            modelmount_node.publish if number % 2 else lambda _, path: modelmount_node.unpublish(path)
            for number in range(24)
        ]
        codes = list(threads.map(lambda call: code_of(lambda: call(model, target)), calls))
    assert set(codes) <= {OK, ABORTED}
    eventually(lambda: code_of(lambda: modelmount_node.publish(model, target)) is OK)
    assert (target / "config.json").read_bytes() == FILES["config.json"]
    modelmount_node.unpublish(target)
    assert not target.exists()
    assert modelmount_node.status() == []


# --- what else may be at the target


def test_what_is_stacked_on_a_target_goes_with_it(modelmount_node: NodeProcess, model: str) -> None:
    target = modelmount_node.target()
    modelmount_node.publish(model, target)
    for _ in range(3):
        subprocess.run(["mount", "--bind", target, target], check=True)
    assert mounts_below(modelmount_node.directory).count(str(target)) == 4
    modelmount_node.publish(model, target)
    modelmount_node.unpublish(target)
    assert not target.exists()
    assert mounts_below(modelmount_node.directory) == []


def test_somebody_elses_mount_on_a_target_is_left_and_said(modelmount_node: NodeProcess, model: str) -> None:
    target = modelmount_node.target()
    modelmount_node.publish(model, target)
    subprocess.run(["mount", "-t", "tmpfs", "none", target], check=True)
    (target / "precious").write_text("data")
    try:
        with pytest.raises(grpc.RpcError) as refused:
            modelmount_node.unpublish(target)
        assert refused.value.code() is not OK
        assert "tmpfs" in refused.value.details()
        assert (target / "precious").read_text() == "data"
    finally:
        subprocess.run(["umount", target], check=True)
    modelmount_node.unpublish(target)
    assert not target.exists()


@pytest.mark.parametrize("what", ["file", "directory with content", "link"])
def test_unpublish_removes_nothing_that_is_not_ours(modelmount_node: NodeProcess, tmp_path: Path, what: str) -> None:
    target = modelmount_node.target()
    if what == "file":
        target.write_text("data")
    elif what == "link":
        target.symlink_to(tmp_path)
    else:
        target.mkdir()
        (target / "data").write_text("data")
    assert code_of(lambda: modelmount_node.unpublish(target)) is grpc.StatusCode.INTERNAL
    assert os.path.lexists(target)
    assert (target / "data").exists() or what != "directory with content"


def test_an_empty_directory_at_the_target_is_used_and_removed(modelmount_node: NodeProcess, model: str) -> None:
    target = modelmount_node.target()
    target.mkdir()
    modelmount_node.publish(model, target)
    modelmount_node.unpublish(target)
    assert not target.exists()
    target.mkdir()  # what a reboot leaves
    modelmount_node.unpublish(target)
    assert not target.exists()


def test_a_parent_directory_that_is_missing_is_said(modelmount_node: NodeProcess, model: str) -> None:
    target = modelmount_node.target().parent / "missing" / "mount"
    with pytest.raises(grpc.RpcError) as refused:
        modelmount_node.publish(model, target)
    assert refused.value.code() is grpc.StatusCode.INTERNAL
    assert "kubelet creates it" in refused.value.details()
    assert modelmount_node.status() == []
    modelmount_node.unpublish(target)


# --- probes


def probe(node: NodeProcess) -> tuple[grpc.StatusCode, bool | None]:
    try:
        return OK, node.identity.Probe(csi_pb2.ProbeRequest(), timeout=10, wait_for_ready=True).ready.value
    except grpc.RpcError as exc:
        return exc.code(), None


def healthz(node: NodeProcess) -> int:
    (port,) = {line["message"].rpartition(" ")[2] for line in node.log_lines() if "metrics at port" in line["message"]}
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=10) as answer:
        return int(answer.status)


def test_probe_and_healthz_are_well_while_a_registry_is_down_and_a_worker_hangs(
    own_node: NodeProcess, fake_registry: FakeRegistry, model: str
) -> None:
    target = own_node.target()
    own_node.publish(model, target)
    fake_registry.faults.append(Fault(match="/", status=503, times=1_000_000))
    with hung(own_node.status()[0]["worker_pid"]):
        assert code_of(lambda: own_node.publish("127.0.0.1:1/team/none:v1", own_node.target(), "vol-2")) is not OK
        for _ in range(20):
            assert probe(own_node) == (OK, True)
            assert healthz(own_node) == 200
            time.sleep(0.3)  # longer than the node's own look at its keeper
    own_node.unpublish(target)


def test_probe_says_that_the_keeper_does_not_answer_until_it_does(own_node: NodeProcess) -> None:
    keeper = process_of(own_node.pid, "keeper")
    os.kill(keeper, signal.SIGSTOP)
    try:
        eventually(lambda: probe(own_node)[0] is grpc.StatusCode.FAILED_PRECONDITION)
        assert healthz(own_node) == 200, "restarting this process would help nobody"
    finally:
        os.kill(keeper, signal.SIGCONT)
    eventually(lambda: probe(own_node) == (OK, True))


def test_probe_is_not_ready_until_the_supervisor_has_been_told_what_is_published(
    tmp_path: Path, fake_registry: FakeRegistry, model: str
) -> None:
    with NodeProcess(tmp_path, "--spares=0") as node:
        supervisor = process_of(node.pid, "supervisor")
        before = process_of(node.pid, "node")
        os.kill(supervisor, signal.SIGSTOP)
        try:
            os.kill(before, signal.SIGKILL)
            eventually(lambda: probe(node) == (OK, False))
        finally:
            os.kill(supervisor, signal.SIGCONT)
        eventually(lambda: probe(node) == (OK, True))


# --- figures that may not grow


def test_memory_does_not_grow_with_what_is_read(modelmount_node: NodeProcess, fake_registry: FakeRegistry) -> None:
    """Reading 160 MiB leaves worker and fetcher each with less than half of that as memory of their own."""
    content = os.urandom(32 << 20)
    names = [f"{number}.bin" for number in range(5)]
    digest = fake_registry.add_model(
        "team/large", "v1", {name: bytes([number]) + content for number, name in enumerate(names)}
    )
    target = modelmount_node.target()
    modelmount_node.publish(f"{fake_registry.host}/team/large@{digest}", target)
    for number, name in enumerate(names):
        assert (target / name).read_bytes() == bytes([number]) + content
    (mount,) = modelmount_node.status()
    for role in ("worker_pid", "fetcher_pid"):
        status = Path(f"/proc/{mount[role]}/status").read_text()
        (own_kib,) = [int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:")]
        assert own_kib < 80 * 1024, (role, own_kib)
