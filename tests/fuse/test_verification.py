"""`verify` and `prefetch`, with real mounts and registries that lie."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from fakes.registry import FakeRegistry, Fault, model_manifest
from support.mounts import drop_pages, events, mount_at, wait_for
from support.node_process import NodeProcess

from csi.integrity.index import BlobHashes, hash_of
from csi.oci.digest import Digest
from csi.stream.blocks import BLOCK_BYTES, block_count, block_length

pytestmark = pytest.mark.fuse

SIZE = 3 * BLOCK_BYTES + 1234


@pytest.fixture
def content(request: pytest.FixtureRequest) -> bytes:
    """Another one for each test: the node's cache knows those of the tests before."""
    return random.Random(request.node.name).randbytes(SIZE)


@pytest.fixture
def blob(content: bytes) -> str:
    """Its digest."""
    return str(Digest.of(content))


@pytest.fixture
def registry(fake_registry: FakeRegistry, content: bytes) -> FakeRegistry:
    """With team/model:v1 (indexed) and team/plain:v1 (not), both of one file."""
    fake_registry.add_model("team/model", "v1", {"w.bin": content}, indexed=True)
    fake_registry.add_model("team/plain", "v1", {"w.bin": content})
    return fake_registry


def refusal(node: NodeProcess, reference: str, **attributes: str) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        node.publish(reference, node.target(), "refused", attributes=attributes)
    return caught.value


def test_chunk_is_the_default_where_there_is_an_index_and_whole_elsewhere(
    modelmount_node: NodeProcess, registry: FakeRegistry, content: bytes
) -> None:
    indexed, plain = modelmount_node.target(), modelmount_node.target()
    modelmount_node.publish(f"{registry.host}/team/model:v1", indexed, "a")
    modelmount_node.publish(f"{registry.host}/team/plain:v1", plain, "b")
    assert mount_at(modelmount_node, indexed)["verify"] == "chunk"
    assert mount_at(modelmount_node, plain)["verify"] == "whole"
    for target in (indexed, plain):
        assert os.listdir(target) == ["w.bin"]
        assert (target / "w.bin").read_bytes() == content


def test_chunk_and_ondemand_are_refused_without_an_index(modelmount_node: NodeProcess, registry: FakeRegistry) -> None:
    for attributes in ({"verify": "chunk"}, {"prefetch": "ondemand"}):
        error = refusal(modelmount_node, f"{registry.host}/team/plain:v1", **attributes)
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "has no block index" in error.details()
    error = refusal(modelmount_node, f"{registry.host}/team/model:v1", verify="whole", prefetch="ondemand")
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_lying_registry_whole_and_chunk_on_the_same_digest(
    modelmount_node: NodeProcess, registry: FakeRegistry, blob: str, content: bytes
) -> None:
    whole, chunk = modelmount_node.target("whole"), modelmount_node.target("chunk")
    lie = bytearray(content)
    lie[BLOCK_BYTES + 7] ^= 1
    reference = f"{registry.host}/team/model:v1"
    modelmount_node.publish(reference, chunk, "chunk", attributes={"verify": "chunk", "prefetch": "ondemand"})
    registry.blobs[blob] = bytes(lie)
    modelmount_node.publish(reference, whole, "whole", attributes={"verify": "whole"})
    with open(chunk / "w.bin", "rb", buffering=0) as file:
        assert os.pread(file.fileno(), BLOCK_BYTES, 0) == content[:BLOCK_BYTES][: 1 << 30]
        for offset in (BLOCK_BYTES, BLOCK_BYTES + 7, 2 * BLOCK_BYTES - 1):
            with pytest.raises(OSError, match="Input/output error") as caught:
                os.pread(file.fileno(), 4096, offset)
            assert caught.value.errno == errno.EIO
        assert os.pread(file.fileno(), 10_000, 2 * BLOCK_BYTES) == content[2 * BLOCK_BYTES :][:10_000]
    assert "IntegrityFailure" in events(modelmount_node, chunk)
    assert mount_at(modelmount_node, chunk)["progress"]["rejected_blocks"] >= 3
    wait_for(
        lambda: "IntegrityFailure" in events(modelmount_node, whole), "the whole blob is wrong, and nobody noticed"
    )
    assert [blob["state"] for blob in mount_at(modelmount_node, whole)["progress"]["blobs"]] == ["poisoned"]
    drop_pages(whole / "w.bin")
    with pytest.raises(OSError, match="Input/output error"):
        (whole / "w.bin").read_bytes()
    registry.blobs[blob] = content
    assert (chunk / "w.bin").read_bytes() == content, "a registry that was put right is asked again"


def test_junk_of_another_registry_under_a_known_digest_reaches_nobody(
    modelmount_node: NodeProcess, registry: FakeRegistry, blob: str, content: bytes
) -> None:
    with FakeRegistry() as evil:
        evil.copy_from(registry)
        good_target, bad_target = modelmount_node.target("good"), modelmount_node.target("bad")
        # The evil one first: its mount is the one that the honest volume joins.
        modelmount_node.publish(f"{evil.host}/team/model:v1", bad_target, "bad", attributes={"prefetch": "ondemand"})
        evil.blobs[blob] = bytes(len(content))
        with pytest.raises(OSError, match="Input/output error"):
            (bad_target / "w.bin").read_bytes()
        assert "IntegrityFailure" in events(modelmount_node, bad_target)
        assert mount_at(modelmount_node, bad_target)["progress"]["rejected_blocks"] >= 1
        modelmount_node.publish(f"{registry.host}/team/model:v1", good_target, "good")
        assert mount_at(modelmount_node, good_target)["mount_id"] == mount_at(modelmount_node, bad_target)["mount_id"]
        assert (good_target / "w.bin").read_bytes() == content, "the honest registry is asked when the other one lies"
        assert (bad_target / "w.bin").read_bytes() == content
        modelmount_node.unpublish(good_target, "good")
        modelmount_node.unpublish(bad_target, "bad")


def test_a_registry_without_the_blobs_does_not_open_the_cache(
    modelmount_node: NodeProcess, registry: FakeRegistry, blob: str, content: bytes
) -> None:
    """It knows the manifest of a model that is not its own, and nothing else."""
    target = modelmount_node.target()
    modelmount_node.publish(f"{registry.host}/team/model:v1", target)
    assert (target / "w.bin").read_bytes() == content
    with FakeRegistry() as thief:
        thief.copy_from(registry)
        del thief.blobs[blob]
        for _ in range(2):
            error = refusal(modelmount_node, f"{thief.host}/team/model:v1")
            assert error.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.DATA_LOSS)
            thief.blobs[blob] = bytes(len(content))
        assert len(modelmount_node.status()) == 1


def test_a_tampered_index_is_refused_and_never_downgrades(
    modelmount_node: NodeProcess, registry: FakeRegistry, content: bytes
) -> None:
    (index_digest,) = [
        digest for digest, content in registry.blobs.items() if content[:2] == b"\x08\x01" and len(content) < 1000
    ]
    right = registry.blobs[index_digest]
    registry.blobs[index_digest] = right[:-1] + bytes([right[-1] ^ 1])
    error = refusal(modelmount_node, f"{registry.host}/team/model:v1")
    assert error.code() is grpc.StatusCode.DATA_LOSS
    assert "block index" in error.details()
    registry.blobs[index_digest] = right
    target = modelmount_node.target()
    modelmount_node.publish(f"{registry.host}/team/model:v1", target)
    assert (target / "w.bin").read_bytes() == content


def test_an_index_that_does_not_fit_its_manifest_is_refused(
    modelmount_node: NodeProcess, registry: FakeRegistry, blob: str, content: bytes
) -> None:
    wrong_size = BlobHashes(Digest.parse(blob), BLOCK_BYTES, hash_of(content[:BLOCK_BYTES]))
    layer = {
        "mediaType": "application/vnd.cncf.model.weight.v1.raw",
        "digest": blob,
        "size": len(content),
        "annotations": {"org.cncf.model.filepath": "w.bin"},
    }
    layers = [layer, registry.add_index([wrong_size])]
    registry.add_manifest("team/misfit", "v1", model_manifest(layers, registry.add_blob(b"{}")))
    error = refusal(modelmount_node, f"{registry.host}/team/misfit:v1")
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "in the manifest" in error.details()
    target = modelmount_node.target()
    modelmount_node.publish(f"{registry.host}/team/misfit:v1", target, attributes={"verify": "whole"})
    assert (target / "w.bin").read_bytes() == content


@pytest.mark.parametrize(
    "fault",
    [Fault("", times=2, cut_at=100_000), Fault("", times=2, flip_at=5), Fault("", times=2, gzip=True)],
    ids=["truncated", "flipped", "compressed"],
)
def test_what_goes_wrong_on_the_way_is_fetched_again(
    modelmount_node: NodeProcess, registry: FakeRegistry, fault: Fault, content: bytes, blob: str
) -> None:
    fault.match, fault.after = blob, 1  # the first request shows that the registry has the model
    registry.faults.append(fault)
    target = modelmount_node.target()
    modelmount_node.publish(f"{registry.host}/team/model:v1", target)
    assert (target / "w.bin").read_bytes() == content
    assert mount_at(modelmount_node, target)["progress"]["retries"] >= 1


def test_no_flipped_byte_at_any_place_is_ever_read(
    modelmount_node: NodeProcess, registry: FakeRegistry, blob: str, content: bytes
) -> None:
    """One byte of every response is wrong, at another place each time: reads fail, or are right."""
    random_source = random.Random(3)
    positions = sorted({0, 1, BLOCK_BYTES - 1, *(random_source.randrange(BLOCK_BYTES) for _ in range(6))})
    for number, position in enumerate(positions):
        target = modelmount_node.target()
        lie = bytearray(content)
        for block in range(block_count(len(content))):
            lie[block * BLOCK_BYTES + position % block_length(len(content), block)] ^= 1 << random_source.randrange(8)
        registry.blobs[blob] = content
        # Another manifest each time, so that no cache helps.
        digest = registry.add_manifest(
            "team/model", "flip", next(c for _, c in registry.manifests.values()) + b" " * number
        )
        modelmount_node.publish(f"{registry.host}/team/model@{digest}", target, attributes={"prefetch": "ondemand"})
        registry.blobs[blob] = bytes(lie)
        with open(target / "w.bin", "rb", buffering=0) as file:
            for offset in (position, len(content) - 10, 2 * BLOCK_BYTES - 5):
                with contextlib.suppress(OSError):
                    assert not os.pread(file.fileno(), 4096, offset), "wrong bytes were read"
        assert mount_at(modelmount_node, target)["progress"]["fetched_blocks"] == 0
        modelmount_node.unpublish(target)


def test_a_damaged_or_swapped_cache_file_is_fetched_again(
    node: NodeProcess, registry: FakeRegistry, content: bytes
) -> None:
    """Of a blob that is too small to be shared: the mount's own."""
    content = content[: 2 * BLOCK_BYTES - 5]
    blob = str(Digest.of(content))
    registry.add_model("team/small", "v1", {"w.bin": content}, indexed=True)
    reference = f"{registry.host}/team/small:v1"
    target = node.target()
    node.publish(reference, target)
    assert (target / "w.bin").read_bytes() == content
    wait_for(lambda: mount_at(node, target)["progress"]["fetched_blocks"] == 2, "the model was not filled")
    node.unpublish(target)
    (segment,) = (node.data_dir / "cache").rglob("seg-00000")
    with open(segment, "r+b") as file:
        file.seek(BLOCK_BYTES + 99)
        file.write(b"damaged")
    registry.seen.clear()
    target = node.target()
    node.publish(reference, target)
    assert (target / "w.bin").read_bytes() == content
    progress = mount_at(node, target)["progress"]
    assert (progress["damaged_blocks"], progress["rechecked_blocks"], progress["fetched_blocks"]) == (1, 1, 1)
    assert "CacheDamaged" in events(node, target)
    assert len(registry.requests(blob)) == 1, "what is right is not fetched again"
    node.unpublish(target)
    swapped = segment.with_name("other")
    swapped.write_bytes(random.Random(9).randbytes(len(content)))
    os.chmod(swapped, 0o644)
    swapped.replace(segment)
    target = node.target()
    node.publish(reference, target)
    assert (target / "w.bin").read_bytes() == content
    assert mount_at(node, target)["progress"]["damaged_blocks"] == 2
    assert "CacheDamaged" in events(node, target)


def test_the_cache_is_found_again_without_the_registry(
    node: NodeProcess, registry: FakeRegistry, content: bytes
) -> None:
    reference = f"{registry.host}/team/model:v1"
    target = node.target()
    node.publish(reference, target)
    assert (target / "w.bin").read_bytes() == content
    wait_for(lambda: mount_at(node, target)["progress"]["fetched_blocks"] == 4, "the model was not filled")
    node.unpublish(target)
    registry.seen.clear()
    node.publish(reference, target)
    assert (target / "w.bin").read_bytes() == content
    assert registry.requests("/blobs/") == []


def test_reading_8_bytes_ondemand_of_a_huge_model_allocates_little(
    node: NodeProcess, fake_registry: FakeRegistry
) -> None:
    """100 GB of zeros, which no test machine holds: only hashes and the block that is read exist."""
    size = 100_000_000_000
    digest = "sha256:" + "7" * 64
    zeros = bytes(BLOCK_BYTES)
    fake_registry.blob_readers[digest] = (size, lambda offset, length: bytes(length))
    hashes = hash_of(zeros) * (block_count(size) - 1)
    hashes += hash_of(zeros[: block_length(size, block_count(size) - 1)])
    layer = {
        "mediaType": "application/vnd.cncf.model.weight.v1.raw",
        "digest": digest,
        "size": size,
        "annotations": {"org.cncf.model.filepath": "huge.bin"},
    }
    layers = [layer, fake_registry.add_index([BlobHashes(Digest.parse(digest), size, hashes)])]
    fake_registry.add_manifest("team/huge", "v1", model_manifest(layers, fake_registry.add_blob(b"{}")))
    target = node.target()
    node.publish(f"{fake_registry.host}/team/huge:v1", target, attributes={"prefetch": "ondemand"})
    with open(target / "huge.bin", "rb", buffering=0) as file:
        assert os.pread(file.fileno(), 8, size // 2) == bytes(8)
    assert mount_at(node, target)["prefetch"] == "ondemand"
    allocated = sum(path.stat().st_blocks * 512 for path in node.data_dir.rglob("*"))
    assert allocated < 100_000_000
    assert (target / "huge.bin").stat().st_size == size


def test_a_second_volume_that_wants_the_whole_model_starts_the_background_fill(
    node: NodeProcess, registry: FakeRegistry
) -> None:
    lazy, full = node.target("lazy"), node.target("full")
    node.publish(f"{registry.host}/team/model:v1", lazy, "lazy", attributes={"prefetch": "ondemand"})
    assert mount_at(node, lazy)["progress"]["fetched_blocks"] == 0
    node.publish(f"{registry.host}/team/model:v1", full, "full")
    wait_for(lambda: mount_at(node, lazy)["progress"]["fetched_blocks"] == 4, "nothing fills the cache")


def test_eager_is_there_only_once_everything_is_checked(
    node: NodeProcess, registry: FakeRegistry, blob: str, content: bytes
) -> None:
    registry.faults.append(Fault(blob, times=1, stall_s=12))
    reference, target = f"{registry.host}/team/plain:v1", node.target()
    with pytest.raises(grpc.RpcError) as caught:
        node.publish(reference, target, attributes={"verify": "eager"})
    assert caught.value.code() is grpc.StatusCode.ABORTED
    assert "MB are downloaded and checked" in caught.value.details()
    assert not os.path.ismount(target)
    node.publish(reference, target, attributes={"verify": "eager"})
    mount = mount_at(node, target)
    assert mount["verify"] == "eager"
    assert [blob["state"] for blob in mount["progress"]["blobs"]] == ["verified"]
    assert (target / "w.bin").read_bytes() == content
    assert len(registry.requests(blob)) <= 3, "the second call joined the first one's download"


def test_eager_with_wrong_bytes_is_refused_and_leaves_nothing(
    node: NodeProcess, registry: FakeRegistry, blob: str, content: bytes
) -> None:
    registry.blobs[blob] = bytes(len(content))
    error = refusal(node, f"{registry.host}/team/plain:v1", verify="eager")
    assert error.code() is grpc.StatusCode.DATA_LOSS
    assert node.status() == []


@pytest.mark.parametrize("repository", ["team/model", "team/plain"])
def test_a_full_disk_is_no_error_for_a_reader(
    tmp_path: Path, registry: FakeRegistry, repository: str, content: bytes
) -> None:
    """The cache lies on a file system of 7 MB, the model has 12."""
    data = tmp_path / "node" / "data"
    data.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=7M", "tmpfs", str(data)], check=True)
    with NodeProcess(tmp_path / "node", "--read-deadline=20") as node:  # unmounts what is left below it
        target = node.target()
        node.publish(f"{registry.host}/{repository}:v1", target)
        # Not in this process: a page fault holds the interpreter lock, and the registry needs it to answer.
        script = (
            "import mmap, os, sys\n"
            "file = os.open(sys.argv[1], os.O_RDONLY)\n"
            "mapped = mmap.mmap(file, 0, prot=mmap.PROT_READ)\n"
            "sys.stdout.buffer.write(b''.join(mapped[int(o) : int(o) + 100] for o in sys.argv[2:]))"
        )
        offsets = (SIZE - 100, 5, BLOCK_BYTES - 50, 2 * BLOCK_BYTES + 77)
        command = [sys.executable, "-c", script, str(target / "w.bin"), *map(str, offsets)]
        mapped = subprocess.run(command, check=True, capture_output=True).stdout
        assert mapped == b"".join(content[offset : offset + 100] for offset in offsets)
        for _ in range(2):
            assert (target / "w.bin").read_bytes() == content
            drop_pages(target / "w.bin")
        mount = mount_at(node, target)
        assert mount["progress"]["lent_blocks"] > 0
        assert mount["progress"]["cache_errors"] > 0
        assert mount["reads"]["failed_reads"] == 0
        os.kill(mount["worker_pid"], signal.SIGKILL)
        assert (target / "w.bin").read_bytes() == content
        os.kill(mount["fetcher_pid"], signal.SIGKILL)
        drop_pages(target / "w.bin")
        assert (target / "w.bin").read_bytes() == content
        node.unpublish_all()


def test_a_cache_file_that_shrinks_while_it_is_read_is_no_error(
    node: NodeProcess, registry: FakeRegistry, content: bytes
) -> None:
    content = content[: 2 * BLOCK_BYTES - 5]
    registry.add_model("team/small", "v1", {"w.bin": content}, indexed=True)
    target = node.target()
    node.publish(f"{registry.host}/team/small:v1", target)
    assert (target / "w.bin").read_bytes() == content
    (segment,) = (node.data_dir / "cache").rglob("seg-00000")
    os.truncate(segment, BLOCK_BYTES)
    drop_pages(target / "w.bin")
    assert (target / "w.bin").read_bytes() == content
    assert "CacheDamaged" in events(node, target)


def test_a_block_index_is_found_through_an_image_index(node: NodeProcess, fake_registry: FakeRegistry) -> None:
    """The chosen variant's, also by a fetcher that starts while the registry is away."""
    contents = {name: random.Random(name).randbytes(9 << 20) for name in ("q4", "q8")}
    entries = []
    for name, content in contents.items():
        digest = fake_registry.add_model("team/index", name, {f"{name}.bin": content}, indexed=True)
        media_type, data = fake_registry.manifests[f"/v2/team/index/manifests/{digest}"]
        described = {"mediaType": media_type, "digest": digest, "size": len(data)}
        entries.append(described | {"annotations": {"quantization": name}})
    index_type = "application/vnd.oci.image.index.v1+json"
    document = {"schemaVersion": 2, "mediaType": index_type, "manifests": entries}
    fake_registry.add_manifest("team/index", "v1", json.dumps(document).encode(), index_type)
    target = node.target()
    node.publish(f"{fake_registry.host}/team/index:v1", target, attributes={"variant": "quantization=q8"})
    mount = mount_at(node, target)
    assert mount["verify"] == "chunk"
    assert mount["variant_digest"] == entries[1]["digest"]
    assert (target / "q8.bin").read_bytes() == contents["q8"]
    fake_registry.faults.append(Fault("/", status=503, times=9999))
    os.kill(mount["fetcher_pid"], signal.SIGKILL)
    wait_for(lambda: mount_at(node, target)["fetcher_pid"] not in (None, mount["fetcher_pid"]), "a new fetcher")
    drop_pages(target / "q8.bin")
    assert os.listdir(target) == ["q8.bin"]
    assert (target / "q8.bin").read_bytes() == contents["q8"]
