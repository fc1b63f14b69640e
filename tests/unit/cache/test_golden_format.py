"""What is on disk, byte for byte: a cache of this layout that lies on a node must be read by whoever comes next.

When one of these fails the layout has changed: count its VERSION up (then another directory is used, and the old one is
removed), and make the bytes here anew.
"""

from __future__ import annotations

import array
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi.cache import paths
from csi.cache.blob import BlobReader, BlobWriter
from csi.cache.format import BlobState
from csi.oci.archive import layer_index
from csi.oci.archive.layer_index import Access, LayerIndex
from csi.oci.archive.member import Member, MemberKind
from csi.oci.archive.points import AccessPoint
from csi.oci.archive.table import MemberTable
from csi.oci.digest import Digest
from csi.store.shelf import Shelf
from csi.stream import blocks

BOOT = bytes(range(16))
MOUNT = "a1" * 16
SIZE = 2 * 4 * 1024 * 1024 + 5
NUMBERS = array.array("Q", range(SIZE // 8 + 1))
if sys.byteorder == "big":
    NUMBERS.byteswap()
CONTENT = NUMBERS.tobytes()[:SIZE]
DIGEST = Digest.parse("sha256:b03a34ec7b364cb7f1f4645b5b8badcf207db56623319a9384bf10b552df6ada")
NAME = "sha256-b03a34ec7b364cb7f1f4645b5b8badcf207db56623319a9384bf10b552df6ada"

_HEAD = "4d4d424c4b4d4150020000000000400005008000000000000300000000000000"
FILLING = bytes.fromhex(_HEAD + "0000" + "00" * 14 + "000102030405060708090a0b0c0d0e0f" + "010001")
VERIFIED = bytes.fromhex(_HEAD + "0100" + "00" * 14 + "000102030405060708090a0b0c0d0e0f" + "010101")
HASHES = bytes.fromhex(
    "e505e59bc45f9e868505da379e4957f3d976a091d19c0822ffa653365a551be0"
    "f728e05c247cb78180408eab4e67e8dc8d07aa4d316aad10df8fc2aa19655627"
    "e1d51774875e003764a8de033cc1eae7df99f49468f8db127f0ae7aeb4cdcad1"
)
HASHES_FILE = HASHES + bytes.fromhex("54abe8cb2235c37381bca039e31a52253b644044727ede6b7d1720d5d6ecb40e")

MEMBERS = (
    Member("a/größe.bin", MemberKind.FILE, 512, 3000, "", True, 1_700_000_000),
    Member("a", MemberKind.DIRECTORY, 0, 0),
    Member("a/latest", MemberKind.SYMLINK, 0, 0, "größe.bin"),
)
LAYER_INDEX = bytes.fromhex(
    "4d4d4c415945520201881300000000000028230000000000000300000000000000210000000000000002000000000000"
    "0028000000000000007d73e4f63b83325fe30a942ddd4fd2f4cbdb2a1e60c7b43d8d2f2c05d50bc95300010d00000000"
    "0000000002000000000000b80b00000000000000f15365000000000100010000000d0000000000000000000000000000"
    "00000000000000000000000000020008000b000e00000000000000000000000000000000000000000000000000000061"
    "2f6772c3b6c39f652e62696e61612f6c61746573746772c3b6c39f652e62696e00000000000000000a00000000000000"
    "000000000000000000000000000000009411000000000000d00700000000000000000000000000002800000003000000"
    "77777777777777777777777777777777777777777777777777777777777777777777777777777777"
)


@pytest.fixture
def domain(tmp_path: Path) -> Path:
    assert paths.area_path("shared", MOUNT) == f"v2/shared/mounts/{MOUNT}"
    (tmp_path / "blobs").mkdir()
    (tmp_path / "sealed").mkdir()
    (tmp_path / "mounts" / MOUNT).mkdir(parents=True)
    return tmp_path


@pytest.fixture
def area(domain: Path) -> Iterator[int]:
    fd = os.open(domain / "mounts" / MOUNT, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def write(writer: BlobWriter, block: int) -> None:
    write = writer.begin(block)
    assert write is not None
    write.write(0, memoryview(CONTENT)[block * blocks.BLOCK_BYTES :][: blocks.BLOCK_BYTES])
    assert write.commit()


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_what_a_mount_has_fetched_is_written_so(area: int, domain: Path) -> None:
    writer = BlobWriter.open(area, DIGEST, SIZE, BOOT)
    write(writer, 0)
    write(writer, 2)
    here = domain / "mounts" / MOUNT / NAME
    content = CONTENT[: blocks.BLOCK_BYTES] + bytes(blocks.BLOCK_BYTES) + CONTENT[2 * blocks.BLOCK_BYTES :]
    assert files(here) == {"map": FILLING, "seg-00000": content}
    write(writer, 1)
    assert writer.mark_verified(writer.generation, HASHES)
    assert files(here) == {"map": VERIFIED, "seg-00000": CONTENT, "checked": HASHES_FILE}
    writer.close()


def test_what_was_written_so_is_read(area: int, domain: Path) -> None:
    here = domain / "mounts" / MOUNT / NAME
    here.mkdir()
    (here / "map").write_bytes(FILLING)
    (here / "seg-00000").write_bytes(CONTENT)
    writer = BlobWriter.open(area, DIGEST, SIZE, BOOT)
    assert (writer.state, [writer.has(block) for block in range(3)]) == (BlobState.FILLING, [True, False, True])
    writer.close()
    (here / "map").write_bytes(VERIFIED)
    (here / "checked").write_bytes(HASHES_FILE)
    writer = BlobWriter.open(area, DIGEST, SIZE, BOOT)
    assert (writer.state, writer.hashes) == (BlobState.VERIFIED, HASHES)
    assert all(writer.is_kept(block) and writer.mark_checked(block, writer.generation) for block in range(3))
    reader = BlobReader.open(area, DIGEST, SIZE)
    buffer = bytearray(SIZE)
    assert reader.read_into([memoryview(buffer)], 0) == SIZE
    assert buffer == CONTENT
    writer.close()


def test_a_proven_blob_is_kept_so_and_read_again(area: int, domain: Path) -> None:
    proven = domain / "blobs" / NAME
    proven.mkdir()
    (proven / "data").write_bytes(CONTENT)
    (proven / "hashes").write_bytes(HASHES_FILE)
    about = {"size_bytes": SIZE, "origins": ["registry/a"], "proof": None}
    (proven / "about").write_text(json.dumps(about))
    (domain / "blobs" / "pins").write_text(json.dumps({str(DIGEST): "kept"}))
    (domain / "mounts" / MOUNT / NAME).mkdir()
    domain_fd = os.open(domain, os.O_RDONLY | os.O_DIRECTORY)
    shelf = Shelf(domain_fd, "this boot")
    assert shelf.attach(MOUNT, ["registry/a"], [(DIGEST, SIZE)]).shared == (DIGEST,)
    assert shelf.pins() == {str(DIGEST): "kept"}
    assert shelf.verify(DIGEST)
    writer = BlobWriter.open(area, DIGEST, SIZE, BOOT)
    assert (writer.is_shared, writer.hashes) == (True, HASHES)
    assert sorted(files(domain / "mounts" / MOUNT / NAME)) == ["data", "hashes", "map"]
    found = json.loads((proven / "about").read_text())
    status = (proven / "data").stat()
    assert found == about | {"proof": {"boot": "this boot", "inode": status.st_ino, "mtime_ns": status.st_mtime_ns}}
    writer.close()
    os.close(domain_fd)


def test_a_layers_index_is_written_so_and_read() -> None:
    members = MemberTable()
    for member in MEMBERS:
        members.append(member)
    index = LayerIndex(Access.POINTS, 5000, 9000, members, (AccessPoint(0, 10), AccessPoint(4500, 2000, 3, b"w" * 40)))
    assert layer_index.dump(index) == LAYER_INDEX
    found = layer_index.load(LAYER_INDEX, 5000)
    assert list(found.members) == list(MEMBERS)
