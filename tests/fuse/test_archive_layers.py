"""Models whose layers are archives: mounted through the real node, compared byte for byte with what was packed."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import mmap
import os
import random
import signal
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from fakes.registry import FakeRegistry, Fault, model_manifest
from support.node_process import NodeProcess

from csi.integrity import index

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

pytestmark = pytest.mark.fuse

UNPACK = {"io.deis.oras.content.unpack": "true"}
TITLE = "org.opencontainers.image.title"
LAYER = "application/vnd.oci.image.layer.v1.tar"


def weights(size: int, seed: int) -> bytes:
    """Some of it compresses well, some not at all."""
    rng = random.Random(seed)
    piece = rng.randbytes(60_000) + bytes(rng.choices(range(50), k=120_000)) + bytes(40_000)
    return (piece * (size // len(piece) + 1))[:size]


FILES = {
    "model/config.json": b'{"a": 1}',
    "model/empty": b"",
    "model/weights-1.safetensors": weights(21_000_000, 1),
    "model/deep/er/weights-2.safetensors": weights(9_000_001, 2),
    "model/" + "n" * 120: b"a long name",
}


def tar(files: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1_700_000_000
            archive.addfile(info, io.BytesIO(content))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return out.getvalue()


def frames(data: bytes, size: int) -> bytes:
    return b"".join(zstd.compress(data[at : at + size]) for at in range(0, len(data), size))


LINKS = {"model/latest": "weights-1.safetensors"}
PLAIN = tar(FILES, LINKS)
LAYERS = {
    "tar": (LAYER, PLAIN),
    "tar+gzip": (f"{LAYER}+gzip", gzip.compress(PLAIN, 3)),
    "tar+zstd frames": (f"{LAYER}+zstd", frames(PLAIN, 700_000)),
    "tar+zstd one frame": (f"{LAYER}+zstd", zstd.compress(PLAIN + tar({"model/huge": b""}, {}))),
}


IMAGE_CONFIG = json.dumps(
    {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": []}}
).encode()


def push(registry: FakeRegistry, layers: list[tuple[str, bytes]], *, as_directory: bool = False) -> str:
    """An image of these layers, or a directory as ORAS packs it. Returns a reference."""
    annotations = {"annotations": {TITLE: "model", **UNPACK}} if as_directory else {}
    config = b"{}" if as_directory else IMAGE_CONFIG
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": f"application/vnd.oci.{'empty' if as_directory else 'image.config'}.v1+json",
            "digest": registry.add_blob(config),
            "size": len(config),
        },
        "layers": [
            {"mediaType": media_type, "digest": registry.add_blob(content), "size": len(content), **annotations}
            for media_type, content in layers
        ],
    }
    if as_directory:
        manifest["artifactType"] = "application/vnd.unknown.artifact.v1"
    digest = registry.add_manifest("team/packed", "v1", json.dumps(manifest).encode())
    return f"{registry.host}/team/packed@{digest}"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    with NodeProcess(tmp_path_factory.mktemp("node"), "--patience=1", "--read-deadline=20") as started:
        yield started


def publish(node: NodeProcess, reference: str, **changes: Any) -> Path:
    """As kubelet: again for as long as it is not ready."""
    target = node.target()
    deadline = time.monotonic() + 60
    while (error := failure(node, reference, target, **changes)) is not None:
        if error.code() is not grpc.StatusCode.UNAVAILABLE or time.monotonic() > deadline:
            raise error
        assert any(words in error.details() for words in ("%", "manifest", "being mounted")), error.details()
    return target


def failure(node: NodeProcess, reference: str, target: Path, **changes: Any) -> Any:
    try:
        node.publish(reference, target, **changes)
    except grpc.RpcError as error:
        return error
    return None


def check(target: Path) -> None:
    found = {
        str(path.relative_to(target)): path.read_bytes()
        for path in sorted(target.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }
    assert {name: hashlib.sha256(content).hexdigest() for name, content in found.items()} == {
        name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()
    }
    assert os.readlink(target / "model/latest") == "weights-1.safetensors"


def layers_of(node: NodeProcess) -> list[str]:
    (mount,) = node.status()
    return [layer["mode"] for layer in mount["layers"]]


@pytest.mark.parametrize(
    ("packing", "mode"),
    [("tar", "streamed"), ("tar+gzip", "indexed"), ("tar+zstd frames", "indexed"), ("tar+zstd one frame", "spooled")],
)
def test_every_packing_shows_the_bytes_that_were_packed(
    node: NodeProcess, fake_registry: FakeRegistry, packing: str, mode: str
) -> None:
    target = publish(node, push(fake_registry, [LAYERS[packing]]))
    try:
        assert layers_of(node) == [mode]
        check(target)
        content = FILES["model/weights-1.safetensors"]
        rng = random.Random(5)
        with open(target / "model/weights-1.safetensors", "rb", buffering=0) as file:
            for _ in range(60):
                at, length = rng.randrange(len(content)), rng.randrange(1, 300_000)
                assert os.pread(file.fileno(), length, at) == content[at : at + length]
            with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
                assert hashlib.sha256(mapped).digest() == hashlib.sha256(content).digest()
    finally:
        node.unpublish(target)


def test_a_directory_packed_by_oras(node: NodeProcess, fake_registry: FakeRegistry) -> None:
    target = publish(node, push(fake_registry, [LAYERS["tar+gzip"]], as_directory=True))
    try:
        check(target)
    finally:
        node.unpublish(target)


def test_the_next_mount_does_not_read_the_layers_again(node: NodeProcess, fake_registry: FakeRegistry) -> None:
    reference = push(fake_registry, [LAYERS["tar+gzip"]])
    node.unpublish(publish(node, reference))
    fake_registry.seen.clear()
    target = publish(node, reference)
    try:
        check(target)
        assert not fake_registry.requests("/blobs/")
    finally:
        node.unpublish(target)


@pytest.mark.parametrize("packing", ["tar+gzip", "tar+zstd one frame"])
def test_a_worker_that_dies_in_mid_read_of_a_compressed_layer(
    node: NodeProcess, fake_registry: FakeRegistry, packing: str
) -> None:
    target = publish(node, push(fake_registry, [LAYERS[packing]]))
    try:
        with open(target / "model/weights-1.safetensors", "rb", buffering=0) as file:
            got = bytearray()
            while piece := file.read(1_000_000):
                got += piece
                if len(got) in (3_000_000, 12_000_000):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    os.kill(node.status()[0]["worker_pid"], signal.SIGKILL)
        assert bytes(got) == FILES["model/weights-1.safetensors"]
        assert node.status()[0]["worker_restarts"] >= 1
    finally:
        node.unpublish(target)


def spools(node: NodeProcess) -> set[Path]:
    return {path for path in node.data_dir.rglob("decoded*") if path.is_file()}


BOMB = gzip.compress(bytes(600 << 20), 9)
BAD = {
    "cut gzip": (f"{LAYER}+gzip", LAYERS["tar+gzip"][1][:-100_000], grpc.StatusCode.DATA_LOSS, "too early"),
    "cut zstd": (f"{LAYER}+zstd", LAYERS["tar+zstd one frame"][1][:-9000], grpc.StatusCode.DATA_LOSS, "too early"),
    "no gzip": (f"{LAYER}+gzip", b"hello" * 9000, grpc.StatusCode.DATA_LOSS, "cannot be decompressed"),
    "cut tar": (LAYER, PLAIN[:9_000_000], grpc.StatusCode.DATA_LOSS, "cut short"),
    "cut tar in gzip": (f"{LAYER}+gzip", gzip.compress(PLAIN[:9_000_000]), grpc.StatusCode.DATA_LOSS, "cut short"),
    "bomb": (f"{LAYER}+gzip", BOMB, grpc.StatusCode.FAILED_PRECONDITION, "expand"),
    "escape": (LAYER, tar({"model/../../x": b"x"}), grpc.StatusCode.FAILED_PRECONDITION, "\\.\\."),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_archives_are_refused_and_nothing_is_left(
    node: NodeProcess, fake_registry: FakeRegistry, case: str
) -> None:
    media_type, content, code, words = BAD[case]
    reference = push(fake_registry, [(media_type, content)])
    before = spools(node)
    with pytest.raises(grpc.RpcError, match=words) as refused:
        publish(node, reference)
    assert refused.value.code() is code, refused.value.details()
    assert node.status() == []
    assert spools(node) == before


def test_bytes_that_are_not_the_layer_are_refused(node: NodeProcess, fake_registry: FakeRegistry) -> None:
    layer = gzip.compress(tar({"model/w": weights(9_000_000, 5)}), 1)  # its own: a proven blob would not be asked for
    reference = push(fake_registry, [(f"{LAYER}+gzip", layer)])
    fake_registry.faults.append(Fault(match="/blobs/", times=10**6, flip_at=2_000_000))
    try:
        with pytest.raises(grpc.RpcError) as refused:
            publish(node, reference)
        assert refused.value.code() is grpc.StatusCode.DATA_LOSS, refused.value.details()
        assert node.status() == []
    finally:
        fake_registry.faults.clear()


def test_a_slow_registry_answers_with_progress_and_is_joined(node: NodeProcess, fake_registry: FakeRegistry) -> None:
    reference = push(fake_registry, [(f"{LAYER}+gzip", gzip.compress(tar({"model/w": weights(60_000_000, 9)}), 1))])
    fake_registry.faults.append(Fault(match="/blobs/", times=10**6, stall_s=1.5))
    target, details, modes = node.target(), [], []
    while (error := failure(node, reference, target)) is not None:
        assert error.code() is grpc.StatusCode.UNAVAILABLE, error.details()
        details.append(error.details())
        (mount,) = node.status()
        modes += [layer["mode"] for layer in mount["layers"]]
        assert len(details) < 60
    try:
        assert "indexing" in modes
        assert any("MB/s" in text and "%" in text for text in details), details
        assert (target / "model/w").stat().st_size == 60_000_000
        ranges = [(seen.path, seen.range) for seen in fake_registry.requests("/blobs/")]
        assert len(ranges) == len(set(ranges))  # joined, not begun again
    finally:
        fake_registry.faults.clear()
        node.unpublish(target)


def test_headers_that_are_not_the_layers_are_found_out(node: NodeProcess, fake_registry: FakeRegistry) -> None:
    """A registry that shows other headers to whoever reads only headers, and the true blob to whoever hashes it."""
    true = tar({"model/aaaa": weights(5_000_000, 1), "model/bbbb": weights(5_000_000, 2)})
    lie = tar({"model/bbbb": weights(5_000_000, 1), "model/aaaa": weights(5_000_000, 2)})
    reference = push(fake_registry, [(LAYER, true)])
    digest = f"sha256:{hashlib.sha256(true).hexdigest()}"
    del fake_registry.blobs[digest]
    fake_registry.blob_readers[digest] = (
        len(true),
        lambda offset, length: (lie if length <= 1 << 20 else true)[offset : offset + length],
    )
    target = publish(node, reference)
    try:
        deadline = time.monotonic() + 30
        while not any(event["reason"] == "IntegrityFailure" for event in node.status()[0]["events"]):
            assert time.monotonic() < deadline, (node.status(), node.log())
            time.sleep(0.1)
        fd = os.open(target / "model/aaaa", os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            with pytest.raises(OSError, match="Input/output error"):
                os.pread(fd, 100, 4_000_000)
        finally:
            os.close(fd)
    finally:
        node.unpublish(target)


@pytest.mark.parametrize("packing", ["tar", "tar+gzip"])
def test_eager_reads_archives_from_verified_blocks(
    node: NodeProcess, fake_registry: FakeRegistry, packing: str
) -> None:
    reference = push(fake_registry, [LAYERS[packing]])
    target, deadline = node.target(), time.monotonic() + 60
    while (error := failure(node, reference, target, attributes={"verify": "eager"})) is not None:
        assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED), error.details()
        assert time.monotonic() < deadline
    try:
        assert {blob["state"] for blob in node.status()[0]["progress"]["blobs"]} == {"verified"}
        check(target)
    finally:
        node.unpublish(target)


@pytest.mark.parametrize("victim", ["worker_pid", "fetcher_pid"])
def test_a_process_that_dies_while_layers_are_read_costs_a_retry(
    node: NodeProcess, fake_registry: FakeRegistry, victim: str
) -> None:
    content = weights(50_000_000, len(victim))
    reference = push(fake_registry, [(f"{LAYER}+gzip", gzip.compress(tar({"model/w": content}), 1))])
    fake_registry.faults.append(Fault(match="/blobs/", times=10**6, stall_s=3.0))
    target = node.target()
    try:
        for _ in range(2):
            error = failure(node, reference, target)
            assert error.code() is grpc.StatusCode.UNAVAILABLE, error.details()
        os.kill(node.status()[0][victim], signal.SIGKILL)
        error = failure(node, reference, target)
        assert error.code() is grpc.StatusCode.UNAVAILABLE, error.details()
        fake_registry.faults.clear()
        deadline = time.monotonic() + 60
        while (error := failure(node, reference, target)) is not None:
            assert error.code() is grpc.StatusCode.UNAVAILABLE, error.details()
            assert time.monotonic() < deadline
        assert (target / "model/w").read_bytes() == content
    finally:
        fake_registry.faults.clear()
        node.unpublish(target)


def push_indexed(registry: FakeRegistry, layers: dict[str, bytes]) -> str:
    """A ModelPack of these archives, by packing, with a block index of them."""
    kinds = [(f"application/vnd.cncf.model.weight.v1.{packing.split()[0]}", data) for packing, data in layers.items()]
    described = [{"mediaType": kind, "digest": registry.add_blob(data), "size": len(data)} for kind, data in kinds]
    described.append(registry.add_index([index.hash_file(io.BytesIO(data)) for data in layers.values()]))
    digest = registry.add_manifest("team/indexed", "v1", model_manifest(described, registry.add_blob(b"{}")))
    return f"{registry.host}/team/indexed@{digest}"


@pytest.mark.parametrize("packing", LAYERS)
def test_chunk_reads_archives_from_verified_blocks(
    node: NodeProcess, fake_registry: FakeRegistry, packing: str
) -> None:
    target = publish(node, push_indexed(fake_registry, {packing: LAYERS[packing][1]}), attributes={"verify": "chunk"})
    try:
        assert node.status()[0]["verify"] == "chunk"
        check(target)
    finally:
        node.unpublish(target)


@pytest.mark.parametrize("packing", ["tar", "tar+gzip"])
def test_chunk_makes_no_tree_of_wrong_bytes(node: NodeProcess, fake_registry: FakeRegistry, packing: str) -> None:
    """Whatever is wrong in the first block, its headers too, is never looked at."""
    plain = tar({"model/a": weights(5_000_000, 77)})
    data = plain if packing == "tar" else gzip.compress(plain, 1)
    reference = push_indexed(fake_registry, {packing: data})
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    lie = tar({"model/b": weights(5_000_000, 77)})
    fake_registry.blobs[digest] = (lie if packing == "tar" else gzip.compress(lie, 1)).ljust(len(data), b"\0")[
        : len(data)
    ]
    with pytest.raises(grpc.RpcError) as refused:
        publish(node, reference)
    assert refused.value.code() is grpc.StatusCode.DATA_LOSS, refused.value.details()
    assert node.status() == []


def test_a_file_that_is_shown_as_one_is_looked_at_again(node: NodeProcess, fake_registry: FakeRegistry) -> None:
    """A registry that shows other first bytes to whoever asks only for those: a packed directory as a file."""
    true = gzip.compress(tar({"model/a": weights(5_000_000, 78)}), 1)
    lie = gzip.compress(tar({"other/a": weights(5_000_000, 78)}), 1).ljust(len(true), b"\0")[: len(true)]
    digest = fake_registry.add_blob(true)
    layer = {"mediaType": f"{LAYER}+gzip", "digest": digest, "size": len(true), "annotations": {TITLE: "model"}}
    config = {"mediaType": "application/vnd.unknown.config.v1+json", "digest": fake_registry.add_blob(b"{}"), "size": 2}
    document = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config}
    manifest = fake_registry.add_manifest("team/file", "v1", json.dumps(document | {"layers": [layer]}).encode())
    del fake_registry.blobs[digest]
    fake_registry.blob_readers[digest] = (
        len(true),
        lambda offset, length: (lie if length <= 1 << 16 else true)[offset : offset + length],
    )
    target = publish(node, f"{fake_registry.host}/team/file@{manifest}")
    try:
        assert [path.name for path in target.iterdir()] == ["model"]
        assert (target / "model").is_file()
        deadline = time.monotonic() + 30
        while not any(event["reason"] == "IntegrityFailure" for event in node.status()[0]["events"]):
            assert time.monotonic() < deadline, (node.status(), node.log())
            time.sleep(0.1)
        assert failure(node, f"{fake_registry.host}/team/file@{manifest}", target) is None, "a live volume stays"
    finally:
        node.unpublish(target)


def test_what_was_left_out_and_how_far_it_is_shows_in_the_status(fake_registry: FakeRegistry, tmp_path: Path) -> None:
    """And a preparation that nobody asks for again ends."""
    digest = fake_registry.add_blob(b"x" * 100)
    named = {"mediaType": LAYER, "digest": digest, "size": 100, "annotations": {TITLE: "a.bin"}}
    nameless = {"mediaType": "application/x", "digest": fake_registry.add_blob(b"{}"), "size": 2}
    config = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": fake_registry.add_blob(b"{}"), "size": 2}
    document = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config}
    document["layers"] = [named, nameless]
    oras = fake_registry.add_manifest("team/oras", "v1", json.dumps(document).encode())
    flags = ("--patience=2", "--abandon-after=4", "--read-deadline=20")
    with NodeProcess(tmp_path / "node", *flags) as node:
        target = publish(node, f"{fake_registry.host}/team/oras@{oras}")
        (mount,) = node.status()
        assert mount["warnings"] == ["layers[1]: left out; it has no name (application/x)"]
        node.unpublish(target)
        plain = push(fake_registry, [LAYERS["tar"]])
        packed = push(fake_registry, [(f"{LAYER}+gzip", gzip.compress(tar({"model/w": weights(9_000_000, 79)}), 1))])
        fake_registry.faults.append(Fault(match="/blobs/", times=10**6, stall_s=3.0))
        for reference, words in ((plain, "the headers of its archives"), (packed, "compressed layers are being read")):
            error = failure(node, reference, node.target())
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert words in error.details(), error.details()
        deadline = time.monotonic() + 30
        while node.status():
            assert time.monotonic() < deadline, node.status()
            time.sleep(0.1)
        fake_registry.faults.clear()
        check(publish(node, plain))
        node.unpublish_all()


@pytest.mark.parametrize("packing", ["tar+gzip", "tar+zstd frames"])
def test_a_lost_index_is_made_again_by_the_worker(node: NodeProcess, fake_registry: FakeRegistry, packing: str) -> None:
    target = publish(node, push(fake_registry, [LAYERS[packing]]))
    try:
        (mount,) = node.status()
        digest = mount["layers"][0]["digest"].replace(":", "-")
        lost = [path for path in node.data_dir.rglob("index") if path.parent.name == digest]
        assert lost
        for path in lost:
            path.unlink()
        os.kill(mount["worker_pid"], signal.SIGKILL)
        for path in target.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        check(target)
        assert node.status()[0]["reads"].get("failed_reads", 0) == 0
    finally:
        node.unpublish(target)


def test_a_spool_obeys_the_limit_of_the_cache(fake_registry: FakeRegistry, tmp_path: Path) -> None:
    """30 MB and their decoded copy have no room in 45 MB, and leave nothing behind; in a larger cache they have."""
    content = random.Random(80).randbytes(30_000_000)
    layer = zstd.compress(tar({"model/w": content}))
    reference = push(fake_registry, [(f"{LAYER}+zstd", layer)])
    with NodeProcess(tmp_path / "small", "--cache-limit=45M", "--patience=30") as small:
        deadline = time.monotonic() + 120
        while "being read" in (error := failure(small, reference, small.target())).details():
            assert time.monotonic() < deadline, error.details()
        assert error.code() is grpc.StatusCode.UNAVAILABLE, error.details()
        assert "no room" in error.details()
        assert spools(small) == set()
    with NodeProcess(tmp_path / "large", "--cache-limit=1500M", "--patience=30") as large:
        target = publish(large, reference)
        assert (target / "model/w").read_bytes() == content
        large.unpublish_all()
