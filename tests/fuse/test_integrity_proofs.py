"""Each way in which bytes could become wrong, by itself: copies, registries that lie or steal, files of the cache that are
damaged, cut or swapped. It ends in the right bytes or in EIO, and in an event.
"""

from __future__ import annotations

import errno
import os
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from fakes.registry import FakeRegistry, Fault
from registry_process import RegistryProcess
from support.mounts import drop_pages, events, mount_at, proven_blobs, wait_for
from support.node_process import COMMAND, NodeProcess
from support.registry_servers import ROOT, Server, referrers_registry

from csi.oci.digest import Digest
from csi.stream.blocks import BLOCK_BYTES

pytestmark = pytest.mark.fuse

SMALL = BLOCK_BYTES + 4321
"""Of a blob that the store does not share."""
LARGE = 3 * BLOCK_BYTES + 1234


def bytes_of(request: pytest.FixtureRequest, size: int) -> bytes:
    return random.Random(request.node.name).randbytes(size)


def cache_files(node: NodeProcess, pattern: str) -> list[Path]:
    return sorted((node.data_dir / "cache").rglob(pattern))


def verified(node: NodeProcess, target: Path) -> bool:
    return all(blob["state"] == "verified" for blob in mount_at(node, target)["progress"].get("blobs", [{"state": ""}]))


def oras_cp(source: str, destination: str) -> list[str]:
    return [str(ROOT / ".tools" / "oras"), "cp", "--from-plain-http", "--to-plain-http", source, destination]


def crane_copy(source: str, destination: str) -> list[str]:
    return [str(ROOT / ".tools" / "crane"), "copy", "--insecure", source, destination]


@pytest.mark.registry
@pytest.mark.parametrize("copy", [oras_cp, crane_copy])
def test_a_model_that_others_copied_is_still_checked_block_by_block(
    copy: Callable[[str, str], list[str]],
    node: NodeProcess,
    docker_registry: RegistryProcess,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """The index is a layer like any other, so it travels with the model."""
    tool = Path(copy("", "")[0])
    if not tool.exists():
        pytest.skip(f"{tool} is not there")
    source = tmp_path / "model"
    source.mkdir()
    (source / "weights.bin").write_bytes(content := bytes_of(request, LARGE))
    (source / "config.json").write_text("{}")
    pushed = f"{docker_registry.host}/team/{copy.__name__}:v1"
    subprocess.run([*COMMAND, "push", str(source), pushed], check=True, capture_output=True)
    (directory := tmp_path / "other").mkdir()
    other = Server([str(referrers_registry(ROOT / ".tools"))], directory, 0)
    try:
        copied = f"{other.host}/elsewhere/model:prod"
        subprocess.run(copy(pushed, copied), check=True, capture_output=True)
        target = node.target()
        node.publish(copied, target, attributes={"verify": "chunk", "prefetch": "ondemand"})
        assert mount_at(node, target)["verify"] == "chunk"
        assert sorted(os.listdir(target)) == ["config.json", "weights.bin"]
        assert (target / "weights.bin").read_bytes() == content
    finally:
        other.stop()


def test_what_a_node_has_cached_is_nobodys_who_only_knows_the_manifest(
    node: NodeProcess, fake_registry: FakeRegistry, request: pytest.FixtureRequest
) -> None:
    """After the last volume of a model is gone its blocks stay. Another registry that has the manifest and the index, and not
    the blob, does not get them read; once it has the blob, it does.
    """
    content = bytes_of(request, LARGE)
    digest = str(Digest.of(content))
    fake_registry.add_model("team/private", "v1", {"w.bin": content}, indexed=True)
    target = node.target()
    node.publish(f"{fake_registry.host}/team/private:v1", target)
    assert (target / "w.bin").read_bytes() == content
    wait_for(lambda: digest in proven_blobs(node), "the blob was never proven")
    node.unpublish(target)
    with FakeRegistry() as thief:
        thief.copy_from(fake_registry)
        del thief.blobs[digest]
        for junk in (None, bytes(LARGE)):
            if junk is not None:
                thief.blobs[digest] = junk
            stolen = node.target()
            with pytest.raises((grpc.RpcError, OSError)):  # noqa: PT012 - refused, or nothing is read
                node.publish(f"{thief.host}/team/private:v1", stolen, "thief")
                with open(stolen / "w.bin", "rb", buffering=0) as file:
                    os.pread(file.fileno(), 4096, BLOCK_BYTES)
            node.unpublish(stolen, "thief")
        thief.blobs[digest] = content
        target = node.target()
        node.publish(f"{thief.host}/team/private:v1", target, "honest")
        assert (target / "w.bin").read_bytes() == content


def test_who_only_knows_the_manifest_waits_for_nobody_to_bring_the_blobs(
    node: NodeProcess, fake_registry: FakeRegistry, request: pytest.FixtureRequest
) -> None:
    """A mount that a registry without the blobs has made would be joined by volumes of one that has them, and filled."""
    content = bytes_of(request, LARGE)
    fake_registry.add_model("team/private", "v1", {"w.bin": content}, indexed=True)
    with FakeRegistry() as thief:
        thief.copy_from(fake_registry)
        del thief.blobs[str(Digest.of(content))]
        # That it could read the manifest, which `whole` asks no more than, is no word for `chunk`.
        node.publish(f"{thief.host}/team/private:v1", node.target(), "whole", attributes={"verify": "whole"})
        for chunk in ("before", "after"):
            with pytest.raises(grpc.RpcError) as caught:
                node.publish(f"{thief.host}/team/private:v1", node.target(), chunk, attributes={"verify": "chunk"})
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
            honest = node.target()
            node.publish(f"{fake_registry.host}/team/private:v1", honest, f"honest-{chunk}")
            assert (honest / "w.bin").read_bytes() == content


def test_a_registry_that_lacks_a_blob_costs_the_others_of_a_mount_nothing(
    node: NodeProcess, fake_registry: FakeRegistry, request: pytest.FixtureRequest
) -> None:
    content = bytes_of(request, LARGE)
    fake_registry.add_model("team/m", "v1", {"w.bin": content}, indexed=True)
    with FakeRegistry() as other:
        other.copy_from(fake_registry)
        first, second = node.target(), node.target()
        node.publish(f"{other.host}/team/m:v1", first, "first", attributes={"prefetch": "ondemand"})
        node.publish(f"{fake_registry.host}/team/m:v1", second, "second", attributes={"prefetch": "ondemand"})
        del other.blobs[str(Digest.of(content))]  # its garbage collection has run
        assert (first / "w.bin").read_bytes() == content
        assert (second / "w.bin").read_bytes() == content
        for target in (first, second):
            node.unpublish(target, "first" if target == first else "second")


@pytest.mark.parametrize("verify", ["whole", "eager"])
@pytest.mark.parametrize("how", ["flipped", "swapped", "cut"])
def test_a_verified_blob_that_is_damaged_between_two_mounts_is_fetched_again(
    node: NodeProcess, fake_registry: FakeRegistry, verify: str, how: str, request: pytest.FixtureRequest
) -> None:
    """Without a block index too: what the blob's sha256 was right for is known block by block from then on."""
    content = bytes_of(request, SMALL)
    fake_registry.add_model("team/m", "v1", {"w.bin": content})
    reference, target = f"{fake_registry.host}/team/m:v1", node.target()
    node.publish(reference, target, attributes={"verify": verify})
    assert (target / "w.bin").read_bytes() == content
    wait_for(lambda: verified(node, target), "the blob was never verified")
    node.unpublish(target)
    (segment,) = cache_files(node, "seg-00000")
    damaged = bytearray(segment.read_bytes())
    damaged[77] ^= 1
    if how == "cut":
        os.truncate(segment, 50)
    elif how == "flipped":
        segment.write_bytes(damaged)
    else:
        (other := segment.with_name("other")).write_bytes(bytes(len(content)))
        os.chown(other, segment.stat().st_uid, segment.stat().st_gid)
        other.replace(segment)
    fake_registry.seen.clear()
    target = node.target()
    node.publish(reference, target, attributes={"verify": verify})
    assert (target / "w.bin").read_bytes() == content
    assert "CacheDamaged" in events(node, target)
    node.unpublish(target)
    fake_registry.seen.clear()
    target = node.target()
    node.publish(reference, target, attributes={"verify": verify})
    assert (target / "w.bin").read_bytes() == content
    assert fake_registry.requests("/blobs/") == [], "what is right is not fetched again"


@pytest.mark.parametrize("verify", ["whole", "eager"])
def test_what_is_fetched_again_after_a_blob_was_verified_is_verified_too(
    node: NodeProcess, fake_registry: FakeRegistry, verify: str, request: pytest.FixtureRequest
) -> None:
    """The registry begins to lie when the blob is known to be right, and a piece of the cache is lost."""
    content = bytes_of(request, SMALL)
    digest = str(Digest.of(content))
    fake_registry.add_model("team/m", "v1", {"w.bin": content})
    target = node.target()
    node.publish(f"{fake_registry.host}/team/m:v1", target, attributes={"verify": verify})
    assert (target / "w.bin").read_bytes() == content
    wait_for(lambda: verified(node, target), "the blob was never verified")
    lie = bytearray(content)
    lie[BLOCK_BYTES + 5] ^= 1
    fake_registry.blobs[digest] = bytes(lie)
    (segment,) = cache_files(node, "seg-00000")
    os.truncate(segment, BLOCK_BYTES)
    drop_pages(target / "w.bin")
    with open(target / "w.bin", "rb", buffering=0) as file:
        assert os.pread(file.fileno(), BLOCK_BYTES, 0) == content[:BLOCK_BYTES]
        with pytest.raises(OSError, match="Input/output error") as caught:
            os.pread(file.fileno(), 4096, BLOCK_BYTES)
    assert caught.value.errno == errno.EIO
    assert "IntegrityFailure" in events(node, target)
    fake_registry.blobs[digest] = content
    assert (target / "w.bin").read_bytes() == content, "a registry that was put right is asked again"


def test_a_cache_file_that_is_cut_while_its_blob_is_hashed_does_not_end_the_hashing(
    node: NodeProcess, fake_registry: FakeRegistry, request: pytest.FixtureRequest
) -> None:
    content = bytes_of(request, SMALL)
    digest = str(Digest.of(content))
    fake_registry.add_model("team/m", "v1", {"w.bin": content})
    fake_registry.faults.append(Fault(digest, times=1, after=1, stall_s=3))
    target = node.target()
    node.publish(f"{fake_registry.host}/team/m:v1", target, attributes={"verify": "whole"})
    for _ in range(20):
        for segment in cache_files(node, "seg-00000"):
            os.truncate(segment, 100)
        time.sleep(0.1)
    drop_pages(target / "w.bin")
    assert (target / "w.bin").read_bytes() == content
    wait_for(lambda: verified(node, target), f"the blob is never verified: {node.log()}")


def test_what_was_read_before_a_proven_blob_was_adopted_is_checked_too(
    node: NodeProcess, fake_registry: FakeRegistry, request: pytest.FixtureRequest
) -> None:
    """With `whole` a reader may have had wrong bytes. That they are replaced by right ones is no reason not to say so."""
    content = bytes_of(request, LARGE)
    digest = str(Digest.of(content))
    fake_registry.add_model("team/m", "v1", {"w.bin": content}, indexed=True)
    target = node.target()
    node.publish(f"{fake_registry.host}/team/m:v1", target)
    assert (target / "w.bin").read_bytes() == content
    wait_for(lambda: digest in proven_blobs(node), "the blob was never proven")
    served: set[int] = set()

    def read(offset: int, length: int) -> bytes:
        """Every block is wrong when it is asked for alone and first, and none is the second time."""
        block = offset // BLOCK_BYTES
        answer = content[offset : offset + length]
        if block in served:
            return answer
        served.add(block)
        return bytes([answer[0] ^ 1]) + answer[1:]

    with FakeRegistry() as liar:
        liar.copy_from(fake_registry)
        del liar.blobs[digest]
        liar.blob_readers[digest] = (LARGE, read)
        for attempt in range(4):
            served.clear()
            wrong = node.target()
            liar.add_model("team/m", f"v{attempt}", {"w.bin": content, "n.txt": b"%d" % attempt})
            liar.blobs.pop(digest, None)
            node.publish(f"{liar.host}/team/m:v{attempt}", wrong, f"wrong-{attempt}", attributes={"verify": "whole"})
            with open(wrong / "w.bin", "rb", buffering=0) as file:
                try:
                    had = os.pread(file.fileno(), 1, 0)
                except OSError:
                    had = content[:1]
            if had != content[:1]:
                wait_for(
                    lambda wrong=wrong: "IntegrityFailure" in events(node, wrong),  # type: ignore[misc]
                    "a wrong byte was read, and nobody says so",
                )
