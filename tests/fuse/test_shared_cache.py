"""Proven blobs are shared by mounts, the cache keeps its limits, and what is in use stays."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
from pathlib import Path

import pytest
from fakes.registry import FakeRegistry
from support.mounts import cache, mount_at, proven_blobs, wait_for
from support.node_process import COMMAND, NodeProcess

from csi.errors import ControlError
from csi.oci.digest import Digest
from csi.stream.blocks import BLOCK_BYTES

pytestmark = pytest.mark.fuse

SIZE = 5 * BLOCK_BYTES + 99


@pytest.fixture
def content(request: pytest.FixtureRequest) -> bytes:
    return random.Random(request.node.name).randbytes(SIZE)


def read(target: Path) -> bytes:
    with open(target / "w.bin", "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file.read()


def publish_and_prove(node: NodeProcess, registry: FakeRegistry, content: bytes, repository: str = "team/a") -> Path:
    """A mounted model whose blob the store has proven."""
    registry.add_model(repository, "v1", {"w.bin": content}, indexed=True)
    target = node.target()
    node.publish(f"{registry.host}/{repository}:v1", target, f"vol-{repository}")
    assert (target / "w.bin").read_bytes() == content
    wait_for(lambda: str(Digest.of(content)) in proven_blobs(node), f"the blob was never proven: {node.log()}")
    return target


@pytest.mark.parametrize("indexed", [True, False])
def test_two_models_that_share_a_layer_share_its_bytes(
    node: NodeProcess, fake_registry: FakeRegistry, content: bytes, indexed: bool
) -> None:
    first = publish_and_prove(node, fake_registry, content)
    digest = str(Digest.of(content))
    fake_registry.add_model("team/b", "v1", {"w.bin": content, "other.txt": b"another model"}, indexed=indexed)
    fake_registry.seen.clear()
    second = node.target()
    node.publish(f"{fake_registry.host}/team/b:v1", second, "vol-b")
    wait_for(lambda: len(list(node.data_dir.rglob("hashes"))) == 3, "the second mount did not get the blob")
    assert read(second) == content
    assert (second / "other.txt").read_bytes() == b"another model"
    ranges = [seen.range for seen in fake_registry.requests(digest)]
    # One for the store; and, of any of the model's blobs, one for a mount that may be another repository's too.
    assert 1 <= len(ranges) <= (2 if indexed else 1), "another repository shows a block, and no more is fetched"
    assert read(first) == content
    proven = [path.stat() for path in node.data_dir.rglob("data")]
    assert len({status.st_ino for status in proven}) == 1
    assert len(proven) == 3
    assert all(status.st_size == SIZE and status.st_blocks * 512 >= SIZE for status in proven)
    wait_for(lambda: not list(node.data_dir.rglob(f"{Digest.of(content).path_name}/seg-*")), "own segments stay")
    assert mount_at(node, second)["reads"]["failed_reads"] == 0


def test_a_proven_blob_is_there_at_the_next_publish_without_the_registry(
    node: NodeProcess, fake_registry: FakeRegistry, content: bytes
) -> None:
    target = publish_and_prove(node, fake_registry, content)
    node.unpublish(target, "vol-team/a")
    fake_registry.seen.clear()
    target = node.target()
    node.publish(f"{fake_registry.host}/team/a:v1", target)
    assert read(target) == content
    assert fake_registry.requests(str(Digest.of(content))) == []


def test_a_mount_cannot_change_what_others_share_and_damage_is_found(
    node: NodeProcess, fake_registry: FakeRegistry, content: bytes
) -> None:
    target = publish_and_prove(node, fake_registry, content)
    wait_for(lambda: len(list(node.data_dir.rglob("hashes"))) == 2, "the mount was not told")
    wait_for(lambda: not list(node.data_dir.rglob("seg-*")), "own segments stay")
    for path in node.data_dir.rglob("data"):
        assert path.stat().st_mode & 0o222 == 0
        assert path.stat().st_uid not in (0, mount_uid(node, target, "fetcher_pid"))
    node.unpublish(target, "vol-team/a")
    (proven,) = (node.data_dir / "cache").rglob("blobs/*/data")
    with open(proven, "r+b") as file:
        file.seek(2 * BLOCK_BYTES + 5)
        file.write(b"damage")
    target = node.target()
    node.publish(f"{fake_registry.host}/team/a:v1", target)
    assert read(target) == content, "a damaged shared block is fetched again"
    assert mount_at(node, target)["progress"]["damaged_blocks"] == 1
    (verified,) = cache(node, "verify")["blobs"]
    assert verified == {"digest": str(Digest.of(content)), "right": False}
    assert proven_blobs(node) == {}
    assert read(target) == content


def mount_uid(node: NodeProcess, target: Path, which: str) -> int:
    return os.stat(f"/proc/{mount_at(node, target)[which]}").st_uid


def test_junk_under_a_known_digest_never_becomes_a_proven_blob(
    node: NodeProcess, fake_registry: FakeRegistry, content: bytes
) -> None:
    """A model whose index and blob agree, and whose digest is that of other bytes: its packer lied."""
    from fakes.registry import model_manifest

    from csi.integrity.index import BlobHashes, hash_file

    digest = str(Digest.of(content))
    junk = bytes(reversed(content))
    import io

    hashes = hash_file(io.BytesIO(junk)).hashes
    fake_registry.blobs[digest] = junk
    layer = {
        "mediaType": "application/vnd.cncf.model.weight.v1.raw",
        "digest": digest,
        "size": SIZE,
        "annotations": {"org.cncf.model.filepath": "w.bin"},
    }
    layers = [layer, fake_registry.add_index([BlobHashes(Digest.parse(digest), SIZE, hashes)])]
    fake_registry.add_manifest("evil/m", "v1", model_manifest(layers, fake_registry.add_blob(b"{}")))
    target = node.target()
    node.publish(f"{fake_registry.host}/evil/m:v1", target)
    assert (target / "w.bin").read_bytes() == junk, "what its own packer said"
    wait_for(
        lambda: any(event["reason"] == "IntegrityFailure" for event in mount_at(node, target)["events"]),
        "nobody noticed that the index is not the blob's",
    )
    assert proven_blobs(node) == {}
    with FakeRegistry() as honest:
        honest.add_model("team/honest", "v1", {"w.bin": content}, indexed=True)
        good = node.target()
        node.publish(f"{honest.host}/team/honest:v1", good, "vol-good")
        assert (good / "w.bin").read_bytes() == content
        node.unpublish(good, "vol-good")


def test_prune_pins_and_use(node: NodeProcess, fake_registry: FakeRegistry, content: bytes) -> None:
    target = publish_and_prove(node, fake_registry, content)
    digest = str(Digest.of(content))
    cache(node, "prune")
    assert proven_blobs(node)[digest]["in_use"]
    assert read(target) == content
    node.unpublish(target, "vol-team/a")
    command = [*COMMAND, "cache", "pin", f"{fake_registry.host}/team/a:v1", "--state-dir", str(node.state_dir)]
    assert digest in subprocess.run(command, check=True, capture_output=True, text=True).stdout
    cache(node, "prune")
    assert proven_blobs(node)[digest]["pinned"]
    cache(node, "unpin", digests=[digest])
    listed = subprocess.run(
        [*COMMAND, "cache", "ls", "--state-dir", str(node.state_dir), "--output=json"], capture_output=True, check=True
    )
    assert digest in {entry["name"] for entry in json.loads(listed.stdout)["entries"]}
    removed = {entry["name"] for entry in cache(node, "prune")["removed"]}
    assert digest in removed
    assert cache(node, "ls")["entries"] == []
    assert cache(node, "df")["used_bytes"] == 0


def test_the_limit_is_kept_by_evicting_what_nobody_uses(
    tmp_path: Path, fake_registry: FakeRegistry, content: bytes
) -> None:
    limit = 90 << 20
    with NodeProcess(tmp_path / "node", f"--cache-limit={limit}") as node:
        for number in range(5):
            other = random.Random(number).randbytes(SIZE)
            fake_registry.add_model(f"team/m{number}", "v1", {"w.bin": other}, indexed=True)
            target = node.target()
            node.publish(f"{fake_registry.host}/team/m{number}:v1", target, "vol")
            assert (target / "w.bin").read_bytes() == other
            assert cache(node, "df")["used_bytes"] <= limit
            node.unpublish(target, "vol")
        assert cache(node, "df")["evicted_bytes"] > 0


def test_a_complete_mount_leaves_to_others_the_room_that_it_does_not_use(
    tmp_path: Path, fake_registry: FakeRegistry, content: bytes
) -> None:
    with NodeProcess(tmp_path / "node", f"--cache-limit={6 * SIZE}") as node:
        for name in "ab":
            fake_registry.add_model(f"team/{name}", "v1", {"w.bin": content + name.encode()}, indexed=True)
            target = node.target()
            node.publish(f"{fake_registry.host}/team/{name}:v1", target, name)
            assert read(target) == content + name.encode()
            wait_for(
                lambda target=target: mount_at(node, target)["progress"]["blobs"][0]["present_blocks"] == 6,  # type: ignore[misc]
                f"mount {name} is not kept: {cache(node, 'df')}",
            )
        node.unpublish_all()


def test_isolated_namespaces_obey_the_same_limit(tmp_path: Path, fake_registry: FakeRegistry, content: bytes) -> None:
    """What one of them has left behind makes room for another, and what is in use stays."""
    limit = 3 * SIZE
    with NodeProcess(tmp_path / "node", "--sharing=isolated", f"--cache-limit={limit}", "--idle-exit=0") as node:
        for number in range(5):
            own = content + bytes([number])
            fake_registry.add_model(f"team/m{number}", "v1", {"w.bin": own}, indexed=True)
            target = node.target()
            attributes = {"csi.storage.k8s.io/pod.namespace": f"tenant-{number}"}
            node.publish(f"{fake_registry.host}/team/m{number}:v1", target, f"vol-{number}", attributes=attributes)
            assert read(target) == own
            wait_for(
                lambda target=target: mount_at(node, target)["progress"]["blobs"][0]["present_blocks"] == 6,  # type: ignore[misc]
                f"model {number} is not kept: {cache(node, 'df')}",
            )
            assert cache(node, "df")["used_bytes"] <= limit
            if number:
                node.unpublish(target, f"vol-{number}")
        entries = cache(node, "ls")["entries"]
        assert {entry["kind"] for entry in entries} == {"area"}, "nothing is shared"
        assert len({entry["domain"] for entry in entries}) == len(entries)
        assert [entry["in_use"] for entry in entries].count(True) == 1
        assert cache(node, "df")["evicted_bytes"] > 0
        cache(node, "prune")
        assert [entry["in_use"] for entry in cache(node, "ls")["entries"]] == [True]
        node.unpublish_all()


def test_with_no_room_at_all_everything_is_still_readable(
    tmp_path: Path, fake_registry: FakeRegistry, content: bytes
) -> None:
    with NodeProcess(tmp_path / "node", "--cache-limit=8MB") as node:
        fake_registry.add_model("team/a", "v1", {"w.bin": content}, indexed=True)
        target = node.target()
        node.publish(f"{fake_registry.host}/team/a:v1", target)
        assert read(target) == content
        assert cache(node, "df")["used_bytes"] <= 8_000_000
        assert mount_at(node, target)["progress"]["lent_blocks"] > 0
        node.unpublish_all()


def test_the_store_may_die_at_any_time(node: NodeProcess, fake_registry: FakeRegistry, content: bytes) -> None:
    def store_pid() -> int | None:
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError, IndexError):
                arguments = (entry / "cmdline").read_bytes().split(b"\0")
                status = (entry / "stat").read_text().rpartition(")")[2].split()
                if b"store" in arguments and int(status[2]) and _belongs_to(int(entry.name), node.pid):
                    return int(entry.name)
        return None

    for _ in range(3):
        pid = store_pid()
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda pid=pid: store_pid() not in (None, pid), "no new store")  # type: ignore[misc]
    wait_for(lambda: answers(node), "the new store does not answer")
    target = publish_and_prove(node, fake_registry, content)
    assert read(target) == content


def answers(node: NodeProcess) -> bool:
    try:
        return bool(cache(node, "df"))
    except ControlError:
        return False


def _belongs_to(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return False
