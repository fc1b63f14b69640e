"""One blob on disk: marks, restarts, damage, and its bytes."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi.cache import format as fmt
from csi.cache import paths
from csi.cache.blob import BlobReader, BlobWriter, BlockWrite, _OpenFile
from csi.cache.format import BlobState
from csi.errors import CacheError
from csi.integrity.index import hash_of
from csi.oci.digest import Digest
from csi.stream import blocks

BOOT, OTHER_BOOT = b"b" * 16, b"c" * 16
SIZE = blocks.SEGMENT_BYTES + 3 * blocks.BLOCK_BYTES + 17
DIGEST = Digest.of(b"whatever")


@pytest.fixture
def area(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def fill(writer: BlobWriter, block: int) -> bytes:
    content = bytes([block + 1]) * blocks.block_length(SIZE, block)
    half = len(content) // 2
    write = begin(writer, block)
    write.write(0, memoryview(content)[:half])
    write.write(half, memoryview(content)[half:])
    assert write.commit()
    return content


def begin(writer: BlobWriter, block: int) -> BlockWrite:
    write = writer.begin(block)
    assert write is not None
    return write


def test_a_reader_sees_a_block_when_it_is_marked(area: int) -> None:
    writer = BlobWriter.open(area, DIGEST, SIZE, BOOT)
    reader = BlobReader.open(area, DIGEST, SIZE)
    last = blocks.block_count(SIZE) - 1
    write = begin(writer, last)
    write.write(0, memoryview(b"x" * 17))
    assert not reader.has(last), "written is not yet there"
    assert write.commit()
    assert reader.has(last)
    buffer = bytearray(17)
    assert reader.read_into([memoryview(buffer)], last * blocks.BLOCK_BYTES) == 17
    assert buffer == b"x" * 17
    assert reader.stored_blocks() == 1
    writer.close()
    reader.close()


def test_disk_is_allocated_by_segment(area: int, tmp_path: Path) -> None:
    writer = BlobWriter.open(area, DIGEST, SIZE, BOOT)
    fill(writer, 2)
    directory = tmp_path / DIGEST.path_name
    assert sorted(path.name for path in directory.iterdir()) == ["map", "seg-00000"]
    status = (directory / "seg-00000").stat()
    assert status.st_size == blocks.SEGMENT_BYTES
    assert status.st_blocks * 512 >= blocks.SEGMENT_BYTES, "preallocated, not sparse"
    writer.close()


def test_a_new_writer_of_the_same_boot_goes_on_where_the_last_stopped(area: int) -> None:
    writer = BlobWriter.open(area, DIGEST, SIZE, BOOT)
    content = fill(writer, 1)
    writer.close()
    writer = BlobWriter.open(area, DIGEST, SIZE, BOOT)
    assert writer.has(1)
    assert not writer.has(0)
    buffer = bytearray(len(content))
    writer.read_into([memoryview(buffer)], blocks.BLOCK_BYTES)
    assert buffer == content
    writer.close()


HASHES = b"".join(hash_of(bytes(blocks.block_length(SIZE, block))) for block in range(blocks.block_count(SIZE)))


def test_marks_of_another_boot_count_only_when_the_blob_was_verified_and_are_checked(area: int, tmp_path: Path) -> None:
    writer = BlobWriter.open(area, DIGEST, SIZE, BOOT)
    fill(writer, 1)
    writer.close()
    writer = BlobWriter.open(area, DIGEST, SIZE, OTHER_BOOT)
    assert not writer.has(1)
    for block in range(writer.block_count):
        fill(writer, block)
    assert writer.mark_verified(writer.generation, HASHES)
    writer.close()
    for boot in (OTHER_BOOT, BOOT):
        writer = BlobWriter.open(area, DIGEST, SIZE, boot)
        assert (writer.state, writer.hashes, writer.is_shared) == (BlobState.VERIFIED, HASHES, False)
        assert all(map(writer.is_kept, range(writer.block_count)))
        writer.close()
    checked = tmp_path / DIGEST.path_name / fmt.CHECKED_NAME
    content = checked.read_bytes()
    for damaged in (content[:-1], bytes([content[0] ^ 1]) + content[1:], content + b"x", b""):
        checked.write_bytes(damaged)
        writer = BlobWriter.open(area, DIGEST, SIZE, BOOT)
        assert (writer.hashes, writer.state, writer.stored_blocks()) == (None, BlobState.FILLING, 0)
        writer.close()


def test_what_is_rechecked_is_not_read_before_and_a_write_that_has_begun_does_not_count(area: int) -> None:
    writer = BlobWriter.open(area, DIGEST, SIZE, BOOT)
    fill(writer, 0)
    write = begin(writer, 1)
    write.write(0, memoryview(bytes(blocks.BLOCK_BYTES)))
    writer.recheck()
    assert not write.commit()
    assert [writer.is_kept(0), writer.has(0), writer.has(1), writer.is_kept(1)] == [True, False, False, False]
    writer.close()


def test_the_hashes_on_disk_are_those_of_version_2() -> None:
    """As for the map: changed on purpose? Bump VERSION."""
    data = fmt.pack_hashes(bytes(range(32)) * 2)
    assert data.hex() == bytes(range(32)).hex() * 2 + "7c26fdd1387b71ca2b32c7778087933352bceddf1b767f4f9230aa543df6153a"
    assert fmt.unpack_hashes(data, 2) == bytes(range(32)) * 2
    assert [fmt.unpack_hashes(data, count) for count in (0, 1, 3)] == [None] * 3


def test_a_poisoned_blob_starts_empty(area: int) -> None:
    writer = BlobWriter.open(area, DIGEST, SIZE, BOOT)
    reader = BlobReader.open(area, DIGEST, SIZE)
    fill(writer, 1)
    writer.poison()
    assert reader.state is BlobState.POISONED
    assert not reader.has(1)
    writer.close()
    reader.close()
    writer = BlobWriter.open(area, DIGEST, SIZE, BOOT)
    assert (writer.state, writer.stored_blocks()) == (BlobState.FILLING, 0)
    writer.close()


@pytest.mark.parametrize("damage", [b"", b"garbage" * 20, b"MMBLKMAP" + b"\xff" * 80])
def test_a_damaged_map_is_an_empty_cache(area: int, tmp_path: Path, damage: bytes) -> None:
    writer = BlobWriter.open(area, DIGEST, SIZE, BOOT)
    fill(writer, 0)
    writer.close()
    (tmp_path / DIGEST.path_name / "map").write_bytes(damage)
    with pytest.raises(CacheError):
        BlobReader.open(area, DIGEST, SIZE)
    writer = BlobWriter.open(area, DIGEST, SIZE, BOOT)
    assert writer.stored_blocks() == 0
    writer.close()


def test_a_reader_before_the_writer_and_one_of_another_size_are_refused(area: int) -> None:
    with pytest.raises(CacheError):
        BlobReader.open(area, DIGEST, SIZE)
    BlobWriter.open(area, DIGEST, SIZE, BOOT).close()
    with pytest.raises(CacheError, match="cached for"):
        BlobReader.open(area, DIGEST, SIZE - 1)


def test_a_full_disk_is_a_cache_error_and_the_block_stays_absent(area: int) -> None:
    """/dev/full is what a write to a full disk is; everything else here is real."""
    writer = BlobWriter.open(area, DIGEST, SIZE, BOOT)
    write = begin(writer, 0)
    write._opened = _OpenFile(os.open("/dev/full", os.O_WRONLY))
    with pytest.raises(CacheError, match=os.strerror(errno.ENOSPC)):
        write.write(1, memoryview(b"x"))
    assert not writer.has(0)
    writer.close()


def test_an_empty_blob_has_no_blocks(area: int) -> None:
    writer = BlobWriter.open(area, DIGEST, 0, BOOT)
    assert (writer.block_count, writer.stored_blocks()) == (0, 0)
    assert writer.mark_verified(writer.generation, b"")
    writer.close()


def test_the_map_on_disk_is_that_of_version_2(area: int, tmp_path: Path) -> None:
    """Caches outlive the program. Changed on purpose? Bump VERSION: old areas are then another directory."""
    writer = BlobWriter.open(area, DIGEST, SIZE, BOOT)
    for block in (0, 2, 3):
        fill(writer, block)
    writer.drop(3)
    os.truncate(tmp_path / DIGEST.path_name / "seg-00000", 3 * blocks.BLOCK_BYTES - 1)
    fill(writer, 1)
    writer.close()
    assert (tmp_path / DIGEST.path_name / "map").read_bytes().hex() == (
        "4d4d424c4b4d4150"  # MMBLKMAP
        "02000000"  # version, nothing
        "00004000"  # 4 MiB a block
        "1100c00400000000"  # size of the blob
        "1400000000000000"  # blocks
        "0001"  # filling; the second generation, as a file was cut off
        "0000000000000000000000000000"
        "62626262626262626262626262626262"  # the boot
        "0101000000000000000000000000000000000000"  # present: the first two blocks
    )
    header = fmt.unpack_header((tmp_path / DIGEST.path_name / "map").read_bytes())
    assert header == fmt.MapHeader(SIZE, blocks.BLOCK_BYTES, 20, BlobState.FILLING, BOOT)
    assert (fmt.BlobState.VERIFIED, fmt.BlobState.POISONED, fmt.Mark.PRESENT, fmt.Mark.KEPT) == (1, 2, 1, 2)
    assert paths.area_path("shared", "00ff") == "v2/shared/mounts/00ff"
    assert (fmt.segment_name(7), fmt.DATA_NAME, fmt.HASHES_NAME) == ("seg-00007", "data", "hashes")


def test_a_writer_that_can_check_takes_every_mark_for_kept_only(area: int) -> None:
    before = BlobWriter.open(area, DIGEST, SIZE, BOOT)
    fill(before, 0)
    fill(before, 2)
    before.close()
    writer = BlobWriter.open(area, DIGEST, SIZE, OTHER_BOOT, recheck=True)
    reader = BlobReader.open(area, DIGEST, SIZE)
    assert [writer.is_kept(block) for block in range(4)] == [True, False, True, False]
    assert not any(reader.has(block) for block in range(4)), "nobody reads what is not checked"
    assert writer.stored_blocks() == 2
    assert writer.mark_checked(0, writer.generation)
    writer.drop(2)
    assert [reader.has(block) for block in range(4)] == [True, False, False, False]
    assert writer.stored_blocks() == 1
    writer.close()
    reader.close()


def test_a_file_that_is_not_ours_is_put_aside(area: int, tmp_path: Path) -> None:
    writer = BlobWriter.open(area, DIGEST, SIZE, BOOT)
    (tmp_path / DIGEST.path_name / fmt.segment_name(0)).mkdir()
    content = fill(writer, 1)
    buffer = bytearray(len(content))
    writer.read_into([memoryview(buffer)], blocks.BLOCK_BYTES)
    assert buffer == content
    writer.close()


@pytest.mark.parametrize("restarted", [False, True])
def test_blocks_of_a_segment_that_was_cut_are_not_there_when_it_grows_again(
    area: int, tmp_path: Path, restarted: bool
) -> None:
    writer = BlobWriter.open(area, DIGEST, SIZE, BOOT)
    contents = [fill(writer, block) for block in range(4)]
    if restarted:
        writer.close()
        writer = BlobWriter.open(area, DIGEST, SIZE, BOOT)
    reader = BlobReader.open(area, DIGEST, SIZE)
    before = reader.generation
    os.truncate(tmp_path / DIGEST.path_name / "seg-00000", blocks.BLOCK_BYTES + 100)
    contents[3] = fill(writer, 3)
    assert [reader.has(block) for block in range(4)] == [True, False, False, True]
    assert reader.generation != before, "who is reading a lost block now must not believe its zeros"
    for block in (0, 3):
        buffer = bytearray(blocks.BLOCK_BYTES)
        reader.read_into([memoryview(buffer)], block * blocks.BLOCK_BYTES)
        assert buffer == contents[block]
    assert os.stat(tmp_path / DIGEST.path_name / "seg-00000").st_size == blocks.SEGMENT_BYTES
    writer.close()
    reader.close()


def shared(tmp_path: Path) -> list[bytes]:
    """Put a proven blob in the area, as the store does: it cannot be written, its hashes come last. Its blocks."""
    directory = tmp_path / DIGEST.path_name
    contents = [bytes([block + 1]) * blocks.block_length(SIZE, block) for block in range(blocks.block_count(SIZE))]
    (directory / "new").write_bytes(b"".join(contents))
    (directory / "new").chmod(0o444)
    os.rename(directory / "new", directory / fmt.DATA_NAME)
    (directory / fmt.HASHES_NAME).write_bytes(fmt.pack_hashes(b"".join(map(hash_of, contents))))
    return contents


def test_a_block_that_was_being_written_when_a_proven_blob_came_is_not_taken_for_written(
    area: int, tmp_path: Path
) -> None:
    writer = BlobWriter.open(area, DIGEST, SIZE, BOOT)
    reader = BlobReader.open(area, DIGEST, SIZE)
    fill(writer, 1)
    half = blocks.BLOCK_BYTES // 2
    before, after = begin(writer, 0), begin(writer, 2)
    before.write(0, memoryview(b"\1" * half))
    contents = shared(tmp_path)
    before.write(half, memoryview(b"\1" * half))
    assert before.commit(), "all of it is in the mount's own segment, and in the proven blob"
    after.write(0, memoryview(b"\3" * half))
    assert writer.adopt(DIGEST, None, fresh=True)
    after.write(half, memoryview(b"\3" * half))
    assert not after.commit()
    assert not any(reader.has(block) for block in range(reader.block_count)), "to be checked, all of them"
    assert writer.begin(2) is None, "it is there, and to be checked"
    buffer = memoryview(bytearray(blocks.BLOCK_BYTES))
    for block in range(4):
        assert reader.read_into([buffer], block * blocks.BLOCK_BYTES) == len(buffer)
        assert buffer == contents[block], "and nothing was written to what was adopted"
    writer.close()
    reader.close()


def test_a_block_whose_file_is_cut_while_it_is_written_is_not_taken_for_written(area: int, tmp_path: Path) -> None:
    writer = BlobWriter.open(area, DIGEST, SIZE, BOOT)
    half = blocks.BLOCK_BYTES // 2
    write = begin(writer, 0)
    write.write(0, memoryview(b"x" * half))
    os.truncate(tmp_path / DIGEST.path_name / fmt.segment_name(0), 0)
    fill(writer, 1)
    write.write(half, memoryview(b"x" * half))
    assert not write.commit()
    assert [writer.has(block) for block in range(3)] == [False, True, False]
    writer.close()


def test_what_was_hashed_is_verified_only_while_it_is_there(area: int, tmp_path: Path) -> None:
    writer = BlobWriter.open(area, DIGEST, SIZE, BOOT)
    for block in range(writer.block_count):
        fill(writer, block)
    generation = writer.generation
    shared(tmp_path)
    assert writer.adopt(DIGEST, None, fresh=True)
    assert not writer.mark_verified(generation, HASHES)
    assert writer.mark_verified(writer.generation, HASHES)
    writer.close()


def names(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / DIGEST.path_name).iterdir()}


def read_all(reader: BlobReader) -> list[bytes]:
    contents = []
    for block in range(reader.block_count):
        buffer = bytearray(blocks.block_length(SIZE, block))
        assert reader.read_into([memoryview(buffer)], block * blocks.BLOCK_BYTES) == len(buffer)
        contents.append(bytes(buffer))
    return contents


@pytest.mark.parametrize(("filled", "fresh"), [(False, True), (True, True), (True, False)])
def test_an_adopted_blob_is_read_from_its_one_file_and_own_segments_go(
    area: int, tmp_path: Path, filled: bool, fresh: bool
) -> None:
    writer = BlobWriter.open(area, DIGEST, SIZE, BOOT)
    reader = BlobReader.open(area, DIGEST, SIZE)
    for block in range(writer.block_count if filled else 3):
        fill(writer, block)
    contents = shared(tmp_path)
    assert read_all(reader)[:3] == contents[:3]
    assert writer.adopt(DIGEST, b"".join(map(hash_of, contents)), fresh=fresh)
    assert names(tmp_path) == {"map", "data", "hashes"}
    assert read_all(reader) == contents
    # Only what was copied and hashed just now needs no check.
    assert all(map(reader.has, range(reader.block_count))) == (filled and fresh)
    assert reader.stored_blocks() == reader.block_count
    writer.close()
    reader.close()


def test_a_proven_blob_with_other_hashes_than_the_index_says_is_not_adopted(area: int, tmp_path: Path) -> None:
    writer = BlobWriter.open(area, DIGEST, SIZE, BOOT)
    fill(writer, 0)
    contents = shared(tmp_path)
    assert not writer.adopt(DIGEST, b"".join(map(hash_of, reversed(contents))), fresh=True)
    assert writer.hashes is None
    assert writer.has(0)
    assert fmt.segment_name(0) in names(tmp_path)
    writer.close()


def test_a_damaged_block_of_a_proven_blob_costs_its_segment_only(area: int, tmp_path: Path) -> None:
    writer = BlobWriter.open(area, DIGEST, SIZE, BOOT)
    contents = shared(tmp_path)
    assert writer.adopt(DIGEST, None, fresh=True)
    for block in range(writer.block_count):
        assert writer.mark_checked(block, writer.generation)
    reader = BlobReader.open(area, DIGEST, SIZE)
    before = reader.generation
    assert read_all(reader) == contents
    writer.drop(2)
    fill(writer, 2)
    assert reader.generation != before
    assert [block for block in range(20) if reader.has(block)] == [2, *range(blocks.SEGMENT_BLOCKS, 20)]
    assert read_all(reader)[2] == contents[2]
    assert read_all(reader)[16:] == contents[16:], "still from the proven blob"
    assert hash_of((tmp_path / DIGEST.path_name / "data").read_bytes()) == hash_of(b"".join(contents))
    writer.close()
    reader.close()


def test_segments_beside_a_proven_blob_do_not_count_after_a_restart(area: int, tmp_path: Path) -> None:
    """The writer died after the store had put the blob there and before it was told."""
    writer = BlobWriter.open(area, DIGEST, SIZE, BOOT)
    fill(writer, 1)
    writer.close()
    contents = shared(tmp_path)
    writer = BlobWriter.open(area, DIGEST, SIZE, BOOT)
    assert names(tmp_path) == {"map", "data", "hashes"}
    assert all(map(writer.is_kept, range(writer.block_count)))
    reader = BlobReader.open(area, DIGEST, SIZE)
    assert read_all(reader) == contents
    writer.close()
    reader.close()
