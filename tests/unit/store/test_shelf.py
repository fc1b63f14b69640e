"""Proven blobs on a real disk: one file each, read-only, hashed while it is made."""

from __future__ import annotations

import fcntl
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi.cache import format as fmt
from csi.cache.blob import BlobReader, BlobWriter
from csi.errors import CacheError, DigestMismatchError
from csi.integrity.index import hash_of
from csi.oci.digest import Digest
from csi.store.eviction import Entry, Kind
from csi.store.shelf import Shelf
from csi.stream import blocks

MOUNT, OTHER = "a1" * 16, "b2" * 16
BOOT = b"b" * 16
CONTENT = random.Random(5).randbytes(blocks.SEGMENT_BYTES) + b"the last, short segment" * 1000
DIGEST = Digest.of(CONTENT)


@pytest.fixture
def domain(tmp_path: Path) -> Path:
    for name in ("blobs", "sealed", f"mounts/{MOUNT}", f"mounts/{OTHER}"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


@pytest.fixture
def shelf(domain: Path) -> Iterator[Shelf]:
    fd = os.open(domain, os.O_RDONLY | os.O_DIRECTORY)
    yield Shelf(fd, "this boot")
    os.close(fd)


def fetched(domain: Path, mount_id: str = MOUNT, content: bytes = CONTENT) -> BlobWriter:
    """A mount that has all of the blob, as its fetcher leaves it."""
    area_fd = os.open(domain / "mounts" / mount_id, os.O_RDONLY | os.O_DIRECTORY)
    writer = BlobWriter.open(area_fd, DIGEST, len(content), BOOT)
    for block in range(writer.block_count):
        write = writer.begin(block)
        assert write is not None
        write.write(0, memoryview(content)[block * blocks.BLOCK_BYTES :][: blocks.BLOCK_BYTES])
        assert write.commit()
    return writer


def test_a_proven_blob_is_one_read_only_file_that_mounts_have_links_to(shelf: Shelf, domain: Path) -> None:
    writer = fetched(domain)
    shelf.promote(MOUNT, DIGEST, len(CONTENT), ["registry/a"])
    proven = domain / "blobs" / DIGEST.path_name
    assert sorted(path.name for path in proven.iterdir()) == ["about", "data", "hashes"]
    assert (proven / "data").read_bytes() == CONTENT
    assert (proven / "data").stat().st_mode & 0o777 == 0o444
    assert (proven / "data").stat().st_blocks * 512 >= len(CONTENT)
    assert (proven / "hashes").read_bytes() == fmt.pack_hashes(
        b"".join(
            hash_of(memoryview(CONTENT)[start : start + blocks.BLOCK_BYTES])
            for start in range(0, len(CONTENT), blocks.BLOCK_BYTES)
        )
    )
    about = json.loads((proven / "about").read_text())
    status = (proven / "data").stat()
    assert about == {
        "size_bytes": len(CONTENT),
        "origins": ["registry/a"],
        "proof": {"boot": "this boot", "inode": status.st_ino, "mtime_ns": status.st_mtime_ns},
    }
    mine = domain / "mounts" / MOUNT / DIGEST.path_name
    assert (mine / "data").samefile(proven / "data")
    assert writer.adopt(DIGEST, None, fresh=True)
    assert sorted(path.name for path in mine.iterdir()) == ["data", "hashes", "map"]
    writer.close()


def test_a_blob_is_copied_from_wherever_the_mount_has_its_segments(shelf: Shelf, domain: Path) -> None:
    """One segment of its own, the other in a proven blob that left the shelf since."""
    writer = fetched(domain)
    shelf.promote(MOUNT, DIGEST, len(CONTENT), ["registry/a"])
    assert writer.adopt(DIGEST, None, fresh=True)
    for block in range(writer.block_count):
        writer.mark_checked(block, writer.generation)
    writer.drop(0)
    for block in range(blocks.SEGMENT_BLOCKS):
        write = writer.begin(block)
        assert write is not None
        write.write(0, memoryview(CONTENT)[block * blocks.BLOCK_BYTES :][: blocks.BLOCK_BYTES])
        assert write.commit()
    assert shelf.remove(Entry(Kind.BLOB, DIGEST.path_name, len(CONTENT), 0, in_use=False))
    assert shelf.size_of(DIGEST) is None
    shelf.promote(MOUNT, DIGEST, len(CONTENT), ["registry/a"])
    assert (domain / "blobs" / DIGEST.path_name / "data").read_bytes() == CONTENT
    writer.close()


def test_wrong_bytes_are_never_shared_and_leave_nothing(shelf: Shelf, domain: Path) -> None:
    fetched(domain, content=bytes(len(CONTENT))).close()
    with pytest.raises(DigestMismatchError):
        shelf.promote(MOUNT, DIGEST, len(CONTENT), ["registry/a"])
    assert list((domain / "blobs").iterdir()) == []


def test_a_blob_that_is_cut_short_is_not_shared(shelf: Shelf, domain: Path) -> None:
    fetched(domain).close()
    os.truncate(domain / "mounts" / MOUNT / DIGEST.path_name / "seg-00001", 5)
    with pytest.raises(CacheError):
        shelf.promote(MOUNT, DIGEST, len(CONTENT), ["registry/a"])
    assert list((domain / "blobs").iterdir()) == []


def test_another_mount_gets_it_once_its_registry_is_known_to_have_it(shelf: Shelf, domain: Path) -> None:
    fetched(domain).close()
    shelf.promote(MOUNT, DIGEST, len(CONTENT), ["registry/a"])
    other = domain / "mounts" / OTHER / DIGEST.path_name
    other.mkdir()
    attached = shelf.attach(OTHER, ["registry/b"], [(DIGEST, len(CONTENT))])
    assert attached.shared == ()
    ((digest, _),) = attached.challenges
    assert digest == DIGEST
    assert not shelf.prove(OTHER, DIGEST, 1, ["registry/b"]), "it has shown nothing yet"
    area_fd = os.open(domain / "mounts" / OTHER, os.O_RDONLY | os.O_DIRECTORY)
    writer = BlobWriter.open(area_fd, DIGEST, len(CONTENT), BOOT)
    write = writer.begin(1)
    assert write is not None
    write.write(0, memoryview(CONTENT)[blocks.BLOCK_BYTES : 2 * blocks.BLOCK_BYTES])
    assert write.commit()
    assert shelf.prove(OTHER, DIGEST, 1, ["registry/b"])
    reader = BlobReader.open(area_fd, DIGEST, len(CONTENT))
    buffer = bytearray(23)
    assert reader.read_into([memoryview(buffer)], blocks.SEGMENT_BYTES) == 23
    assert buffer == b"the last, short segment"
    reader.close()
    writer.close()
    os.close(area_fd)


def test_areas_that_nobody_uses_give_their_links_back(shelf: Shelf, domain: Path) -> None:
    fetched(domain).close()
    shelf.promote(MOUNT, DIGEST, len(CONTENT), ["registry/a"])
    entries = {entry.name: entry for entry in shelf.entries()}
    assert not list((domain / "mounts" / MOUNT / DIGEST.path_name).iterdir())
    assert entries[MOUNT].size_bytes == 0
    assert not entries[DIGEST.path_name].in_use
    assert entries[DIGEST.path_name].size_bytes >= len(CONTENT)


def opened(shelf: Shelf) -> bool:
    fd = shelf.open_proven(MOUNT, DIGEST)
    if fd is None:
        return False
    assert os.pread(fd, len(CONTENT) + 1, 0) == CONTENT
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(fd, b"x")
    os.close(fd)
    return True


def test_a_proof_counts_in_its_boot_until_somebody_writes(shelf: Shelf, domain: Path) -> None:
    fetched(domain).close()
    shelf.promote(MOUNT, DIGEST, len(CONTENT), ["registry/a"])
    assert opened(shelf)
    domain_fd = os.open(domain, os.O_RDONLY | os.O_DIRECTORY)
    next_boot = Shelf(domain_fd, "the next boot")
    assert not opened(next_boot)
    assert next_boot.prove_again(DIGEST)
    assert opened(next_boot)
    assert not opened(shelf)
    data = domain / "blobs" / DIGEST.path_name / "data"
    with open(data, "r+b") as file:
        file.write(b"\0")
    assert not opened(next_boot)
    assert not next_boot.prove_again(DIGEST), "it is damaged now"
    assert not opened(next_boot)
    with open(data, "r+b") as file:
        file.write(CONTENT[:1])
    assert not opened(next_boot)
    assert next_boot.prove_again(DIGEST)
    assert opened(next_boot)
    next_boot.doubt(MOUNT, DIGEST)
    assert not opened(next_boot)
    os.close(domain_fd)


def test_only_a_mount_that_has_the_blob_gets_its_file(shelf: Shelf, domain: Path) -> None:
    fetched(domain).close()
    shelf.promote(MOUNT, DIGEST, len(CONTENT), ["registry/a"])
    (domain / "mounts" / OTHER / DIGEST.path_name).mkdir()
    with pytest.raises(CacheError):
        shelf.open_proven(OTHER, DIGEST)
    (domain / "mounts" / OTHER / DIGEST.path_name / "data").write_bytes(CONTENT)
    with pytest.raises(CacheError, match="another file"):
        shelf.open_proven(OTHER, DIGEST)


def test_a_blob_that_a_mount_has_begun_to_use_meanwhile_stays(shelf: Shelf, domain: Path) -> None:
    fetched(domain).close()
    shelf.promote(MOUNT, DIGEST, len(CONTENT), ["registry/a"])
    (blob,) = [entry for entry in shelf.entries() if entry.kind is Kind.BLOB]
    assert not blob.in_use
    other = domain / "mounts" / OTHER
    (other / DIGEST.path_name).mkdir()
    fd = os.open(other, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(fd, fcntl.LOCK_SH)
    assert shelf.attach(OTHER, ["registry/a"], [(DIGEST, len(CONTENT))]).shared == (DIGEST,)
    assert not shelf.remove(blob)
    assert shelf.size_of(DIGEST) == len(CONTENT)
    os.close(fd)
    shelf.entries()
    assert shelf.remove(blob)
    assert shelf.size_of(DIGEST) is None


def test_a_blob_that_was_pinned_meanwhile_stays(shelf: Shelf, domain: Path) -> None:
    fetched(domain).close()
    shelf.promote(MOUNT, DIGEST, len(CONTENT), ["registry/a"])
    (blob,) = [entry for entry in shelf.entries() if entry.kind is Kind.BLOB]
    shelf.set_pins({str(DIGEST): "demo"})
    assert not shelf.remove(blob)
    shelf.set_pins({})
    assert shelf.remove(blob)


def test_areas_of_isolated_domains_count_and_leave_but_share_nothing(tmp_path: Path) -> None:
    for name in (
        "shared/blobs",
        "shared/sealed",
        f"shared/mounts/{OTHER}",
        f"apart/mounts/{MOUNT}",
        f"apart/mounts/.{OTHER}",
    ):
        (tmp_path / name).mkdir(parents=True)
    fetched(tmp_path / "apart").close()
    domain_fd, domains_fd = (os.open(path, os.O_RDONLY | os.O_DIRECTORY) for path in (tmp_path / "shared", tmp_path))
    shelf = Shelf(domain_fd, "this boot", domains_fd)
    assert not (tmp_path / "apart" / "mounts" / f".{OTHER}").exists(), "left by one who died while removing it"
    area = next(entry for entry in shelf.entries() if entry.name == MOUNT)
    assert (area.kind, area.domain, area.in_use) == (Kind.AREA, "apart", False)
    assert area.size_bytes >= len(CONTENT)
    with pytest.raises(CacheError):
        shelf.promote(MOUNT, DIGEST, len(CONTENT), ["registry/a"])
    fd = os.open(tmp_path / "apart" / "mounts" / MOUNT, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(fd, fcntl.LOCK_SH)
    assert next(entry for entry in shelf.entries() if entry.name == MOUNT).in_use
    assert not shelf.remove(area)
    os.close(fd)
    assert shelf.remove(area)
    assert [entry.name for entry in shelf.entries()] == [OTHER]
    for fd in (domain_fd, domains_fd):
        os.close(fd)
