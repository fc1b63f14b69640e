"""A model put together as plain files by the store."""

from __future__ import annotations

import fcntl
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi.cache.blob import BlobWriter
from csi.cache.format import SHARED_FROM_BYTES
from csi.errors import CacheError, InvalidVolumeError
from csi.oci.digest import Digest
from csi.store.eviction import Kind
from csi.store.sealing import parse_files
from csi.store.shelf import Shelf
from csi.stream import blocks

MOUNT, OTHER = "0a" * 16, "0b" * 16
BIG, SMALL = random.Random(7).randbytes(SHARED_FROM_BYTES + 99), b'{"architectures": []}'
BIG_DIGEST, SMALL_DIGEST, EMPTY_DIGEST = Digest.of(BIG), Digest.of(SMALL), Digest.of(b"")
FILES = [
    ("config.json", SMALL_DIGEST, len(SMALL)),
    ("empty", EMPTY_DIGEST, 0),
    ("deep/er/model.safetensors", BIG_DIGEST, len(BIG)),
    ("deep/same.safetensors", BIG_DIGEST, len(BIG)),
]


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


class Area:
    """A mount that is in use, and has all of the model. `content` in place of the small file's."""

    def __init__(self, domain: Path, mount_id: str = MOUNT, content: bytes = SMALL) -> None:
        self.fd = os.open(domain / "mounts" / mount_id, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self.fd, fcntl.LOCK_SH)
        for digest, data in ((BIG_DIGEST, BIG), (SMALL_DIGEST, content)):
            writer = BlobWriter.open(self.fd, digest, len(data), b"b" * 16)
            for block in range(writer.block_count):
                write = writer.begin(block)
                assert write is not None
                write.write(0, memoryview(data)[block * blocks.BLOCK_BYTES :][: blocks.BLOCK_BYTES])
                assert write.commit()

    def leave(self) -> None:
        """Nobody uses it any more."""
        os.close(self.fd)


def test_a_complete_model_is_a_directory_of_plain_files(shelf: Shelf, domain: Path) -> None:
    area = Area(domain)
    shelf.promote(MOUNT, BIG_DIGEST, len(BIG), ["registry/a"])
    assert shelf.seal(MOUNT, FILES) == []
    sealed = domain / "sealed" / MOUNT
    for path, digest, size in FILES:
        found = sealed / path
        assert Digest.of(found.read_bytes()) == digest
        assert found.stat().st_size == size
        assert found.stat().st_mode & 0o777 == 0o444
    proven = (domain / "blobs" / BIG_DIGEST.path_name / "data").stat()
    assert (sealed / "deep/same.safetensors").stat().st_ino == proven.st_ino, "a link takes no room"
    assert [path.name for path in (domain / "sealed").iterdir()] == [MOUNT]
    before = sealed.stat().st_ino
    assert shelf.seal(MOUNT, FILES) == []
    assert sealed.stat().st_ino == before, "what is there already is not made again"
    area.leave()


def test_what_is_not_here_not_right_or_not_proven_is_not_shown(shelf: Shelf, domain: Path) -> None:
    area = Area(domain, content=b"x" * len(SMALL))
    with pytest.raises(CacheError, match="has no proven file"):
        shelf.seal(MOUNT, FILES)
    shelf.promote(MOUNT, BIG_DIGEST, len(BIG), ["registry/a"])
    with pytest.raises(CacheError, match="does not have it yet"):
        shelf.seal(MOUNT, FILES)
    area.leave()
    with pytest.raises(CacheError, match="has ended"):
        shelf.seal(MOUNT, FILES)
    assert list((domain / "sealed").iterdir()) == []


def test_a_mount_gets_no_blob_that_was_not_given_to_it(shelf: Shelf, domain: Path) -> None:
    """Its worker may have been taken over: what it names is not what it may have."""
    area, other = Area(domain), Area(domain, OTHER)
    shelf.promote(MOUNT, BIG_DIGEST, len(BIG), ["registry/a"])
    with pytest.raises(CacheError, match="has no proven file"):
        shelf.seal(OTHER, FILES)
    area.leave()
    other.leave()


def test_what_was_written_to_is_hashed_first(shelf: Shelf, domain: Path) -> None:
    area = Area(domain)
    shelf.promote(MOUNT, BIG_DIGEST, len(BIG), ["registry/a"])
    data = domain / "blobs" / BIG_DIGEST.path_name / "data"
    os.utime(data, ns=(1, 1))
    assert shelf.seal(MOUNT, FILES) == [BIG_DIGEST]
    assert shelf.prove_again(BIG_DIGEST)
    assert shelf.seal(MOUNT, FILES) == []
    area.leave()


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/./b", "a/", "nul\0", "n" * 300])
def test_a_name_that_leads_elsewhere_is_refused(shelf: Shelf, domain: Path, path: str) -> None:
    area = Area(domain)
    shelf.promote(MOUNT, BIG_DIGEST, len(BIG), ["registry/a"])
    with pytest.raises(CacheError, match="cannot be shown"):
        shelf.seal(MOUNT, [*FILES, (path, SMALL_DIGEST, len(SMALL))])
    assert list((domain / "sealed").iterdir()) == []
    area.leave()


@pytest.mark.parametrize("paths", [("a", "a"), ("a", "a/b"), ("a/b", "a")])
def test_names_that_exclude_each_other_are_refused_and_leave_nothing(
    shelf: Shelf, domain: Path, paths: tuple[str, str]
) -> None:
    area = Area(domain)
    with pytest.raises(CacheError, match="cannot be shown"):
        shelf.seal(MOUNT, [(path, SMALL_DIGEST, len(SMALL)) for path in paths])
    assert list((domain / "sealed").iterdir()) == []
    area.leave()


def test_what_is_shown_is_never_evicted_and_leaves_with_its_mount(shelf: Shelf, domain: Path) -> None:
    area = Area(domain)
    shelf.promote(MOUNT, BIG_DIGEST, len(BIG), ["registry/a"])
    shelf.seal(MOUNT, FILES)
    area.leave()  # and the keeper alone knows that a target shows it
    shown = os.open(domain / "sealed" / MOUNT, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(shown, fcntl.LOCK_SH)
    found = {(entry.kind, entry.name): entry for entry in shelf.entries()}
    assert found[Kind.AREA, MOUNT].in_use
    assert found[Kind.BLOB, BIG_DIGEST.path_name].in_use
    for entry in found.values():
        if entry.name != OTHER:
            assert not shelf.remove(entry)
    assert (domain / "sealed" / MOUNT / "deep/er/model.safetensors").read_bytes() == BIG
    os.close(shown)
    for entry in shelf.entries():
        assert shelf.remove(entry)
    assert list((domain / "sealed").iterdir()) == []
    assert list((domain / "blobs").iterdir()) == []


@pytest.mark.parametrize("path", ["config.json", "deep/same.safetensors"])
def test_what_was_swapped_while_nobody_showed_it_is_put_together_anew(shelf: Shelf, domain: Path, path: str) -> None:
    area = Area(domain)
    shelf.promote(MOUNT, BIG_DIGEST, len(BIG), ["registry/a"])
    shelf.seal(MOUNT, FILES)
    shown = domain / "sealed" / MOUNT / path
    right = shown.read_bytes()
    other = shown.with_name("other")
    other.write_bytes(bytes(len(right)))
    os.utime(other, ns=(shown.stat().st_atime_ns, shown.stat().st_mtime_ns))
    other.replace(shown)
    assert shelf.seal(MOUNT, FILES) == []
    assert shown.read_bytes() == right
    area.leave()


def test_another_version_of_it_does_not_replace_what_is_shown(shelf: Shelf, domain: Path) -> None:
    area = Area(domain)
    shelf.promote(MOUNT, BIG_DIGEST, len(BIG), ["registry/a"])
    shelf.seal(MOUNT, FILES)
    with open(domain / "sealed" / MOUNT / "empty") as shown:
        directory = os.open(domain / "sealed" / MOUNT, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(directory, fcntl.LOCK_SH)
        with pytest.raises(CacheError, match="other files of it are shown"):
            shelf.seal(MOUNT, [*FILES[:1], ("renamed", BIG_DIGEST, len(BIG))])
        assert shown.read() == ""
        os.close(directory)
    area.leave()


def test_what_a_store_left_half_done_is_removed_at_the_next_start(domain: Path) -> None:
    (domain / "sealed" / f".{MOUNT}" / "deep").mkdir(parents=True)
    fd = os.open(domain, os.O_RDONLY | os.O_DIRECTORY)
    Shelf(fd, "this boot")
    os.close(fd)
    assert list((domain / "sealed").iterdir()) == []


@pytest.mark.parametrize("value", [{}, "x", [["a", "b"]], [["a", "sha256:00", 1]], [["a", str(SMALL_DIGEST), "many"]]])
def test_a_list_that_is_none_is_refused(value: object) -> None:
    with pytest.raises((ValueError, InvalidVolumeError)):
        parse_files(value)
