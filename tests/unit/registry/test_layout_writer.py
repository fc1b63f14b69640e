"""`LayoutWriter`: whole files, one index, nothing of others damaged; and what it writes can be read back."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from csi.errors import ContentError, DigestMismatchError, RegistryError, SizeMismatchError, UnsupportedModelError
from csi.oci.digest import Digest
from csi.oci.modelpack import ModelDescription, PackedModel, SourceFile, pack
from csi.oci.reference import Reference
from csi.registry.layout_source import LayoutSource
from csi.registry.layout_writer import LayoutWriter
from csi.registry.pushing import PushProgress, PushState


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    return tmp_path / "layout"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(os.urandom(2_500_000))
    return path


def reference(layout: Path, rest: str = "") -> Reference:
    return Reference.parse(f"oci-layout:{layout}{rest}")


def packed(*files: Path, name: str = "m") -> PackedModel:
    sources = [SourceFile(path.name, Digest.of(path.read_bytes()), path.stat().st_size) for path in files]
    return pack(sources, ModelDescription(name=name))


def write(layout: Path, model: PackedModel, files: dict[str, Path], tag: str = "v1") -> list[PushProgress]:
    events: list[PushProgress] = []
    writer = LayoutWriter(reference(layout))
    for file, layer in zip(model.files, model.layers, strict=True):
        writer.put_file(layer, str(files[file.path]), events.append)
    writer.finish(model, tag)
    writer.close()
    return events


def entries(layout: Path) -> list[Any]:
    index = json.loads((layout / "index.json").read_text())
    found = index["manifests"]
    assert isinstance(found, list)
    return found


def everything(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def test_a_layout_is_written_and_read_back(layout: Path, weights: Path) -> None:
    model = packed(weights)
    events = write(layout, model, {weights.name: weights})
    assert events[-1].state is PushState.UPLOADED
    assert events[-1].bytes_done == events[-1].bytes_total == 2_500_000
    digests = (model.layers[0].digest, model.config_descriptor.digest, model.digest)
    assert everything(layout) == sorted(
        [*(f"blobs/sha256/{digest.hex}" for digest in digests), "index.json", "oci-layout"]
    )
    assert json.loads((layout / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    source = LayoutSource(os.open(layout, os.O_RDONLY), str(layout))
    manifest = source.fetch_manifest("v1", None, 1.0)
    assert (manifest.data, manifest.digest) == (model.manifest, model.digest)
    content = bytearray(2_500_000)
    reader = source.open_range(model.layers[0].digest, 2_500_000, 0, 2_500_000)
    reader.readinto(memoryview(content))
    reader.close()
    source.close()
    assert bytes(content) == weights.read_bytes()


def test_a_second_write_copies_nothing_and_changes_nothing(layout: Path, weights: Path) -> None:
    model = packed(weights)
    write(layout, model, {weights.name: weights})
    index = (layout / "index.json").read_bytes()
    blob = layout / "blobs" / "sha256" / model.layers[0].digest.hex
    inode = blob.stat().st_ino
    events = write(layout, model, {weights.name: weights})
    assert [event.state for event in events] == [PushState.EXISTS]
    assert (layout / "index.json").read_bytes() == index
    assert blob.stat().st_ino == inode


def test_a_truncated_blob_of_an_earlier_crash_is_replaced(layout: Path, weights: Path) -> None:
    model = packed(weights)
    write(layout, model, {weights.name: weights})
    blob = layout / "blobs" / "sha256" / model.layers[0].digest.hex
    blob.write_bytes(b"short")
    write(layout, model, {weights.name: weights})
    assert blob.read_bytes() == weights.read_bytes()


def test_a_tag_moves_and_other_entries_stay(layout: Path, weights: Path) -> None:
    first, second = packed(weights, name="first"), packed(weights, name="second")
    write(layout, first, {weights.name: weights}, "v1")
    index = json.loads((layout / "index.json").read_text())
    foreign = {"mediaType": "a/b", "digest": "sha256:" + "0" * 64, "size": 1, "annotations": {"x": "y"}}
    nameless = {"mediaType": "a/b", "digest": str(second.digest), "size": 1}
    index["manifests"] += [foreign, nameless, "odd"]
    (layout / "index.json").write_text(json.dumps({**index, "annotations": {"kept": "too"}}))
    write(layout, second, {weights.name: weights}, "v2")
    write(layout, second, {weights.name: weights}, "v1")
    found = entries(layout)
    assert found[:2] == [foreign, "odd"]
    assert [entry["annotations"]["org.opencontainers.image.ref.name"] for entry in found[2:]] == ["v2", "v1"]
    assert {entry["digest"] for entry in found[2:]} == {str(second.digest)}
    assert json.loads((layout / "index.json").read_text())["annotations"] == {"kept": "too"}


def test_writers_at_the_same_time_lose_no_entry(layout: Path, weights: Path) -> None:
    models = {f"v{n}": packed(weights, name=f"m{n}") for n in range(8)}
    threads = [
        threading.Thread(target=write, args=(layout, model, {weights.name: weights}, tag))
        for tag, model in models.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {entry["digest"] for entry in entries(layout)} == {str(model.digest) for model in models.values()}


@pytest.mark.parametrize(
    ("content", "kind"),
    [(b"short", SizeMismatchError), (b"x" * 2_500_001, SizeMismatchError), (b"x" * 2_500_000, DigestMismatchError)],
)
def test_a_file_that_changed_leaves_nothing_behind(
    layout: Path, weights: Path, content: bytes, kind: type[ContentError]
) -> None:
    model = packed(weights)
    weights.write_bytes(content)
    with pytest.raises(kind, match="changed while it was pushed"):
        write(layout, model, {weights.name: weights})
    assert everything(layout) == ["oci-layout"]


def test_a_directory_with_other_things_in_it_is_left_alone(layout: Path) -> None:
    layout.mkdir()
    (layout / "diary.txt").write_text("dear")
    with pytest.raises(RegistryError, match="is not empty and is no OCI image layout"):
        LayoutWriter(reference(layout))
    assert everything(layout) == ["diary.txt"]


def test_an_empty_directory_becomes_a_layout(layout: Path) -> None:
    layout.mkdir()
    LayoutWriter(reference(layout)).close()
    assert everything(layout) == ["oci-layout"]


@pytest.mark.parametrize(
    ("marker", "problem"),
    [
        ('{"imageLayoutVersion": "2.0.0"}', "is a layout of version '2.0.0', expected '1.0.0'"),
        ("{}", "is a layout of version 'None'"),
        ("?", "oci-layout: not valid JSON"),
        ("{" + " " * 5000 + "}", "the limit is 4096"),
    ],
)
def test_layouts_of_another_version_are_left_alone(layout: Path, marker: str, problem: str) -> None:
    layout.mkdir()
    (layout / "oci-layout").write_text(marker)
    with pytest.raises((RegistryError, ContentError), match=problem):
        LayoutWriter(reference(layout))
    assert everything(layout) == ["oci-layout"]


@pytest.mark.parametrize("index", ["?", "[]", "{}", '{"manifests": {}}', '{"manifests": [], "manifests": []}'])
def test_an_index_that_cannot_be_understood_is_not_overwritten(layout: Path, weights: Path, index: str) -> None:
    LayoutWriter(reference(layout)).close()
    (layout / "index.json").write_text(index)
    with pytest.raises((RegistryError, UnsupportedModelError)):
        write(layout, packed(weights), {weights.name: weights})
    assert (layout / "index.json").read_text() == index


def test_a_place_that_cannot_be_written_is_our_error(layout: Path, weights: Path) -> None:
    with pytest.raises(RegistryError, match="cannot be written: Not a directory"):
        LayoutWriter(reference(weights / "x"))
    LayoutWriter(reference(layout)).close()
    (layout / "blobs" / "sha256").rmdir()
    (layout / "blobs" / "sha256").write_text("in the way")
    with pytest.raises(RegistryError, match="check the directory's rights and free space"):
        write(layout, packed(weights), {weights.name: weights})


def test_a_full_disk_leaves_no_half_file(layout: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed(weights)

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    writer = LayoutWriter(reference(layout))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RegistryError, match="No space left on device"):
        writer.put_file(model.layers[0], str(weights), lambda event: None)
    assert everything(layout) == ["oci-layout"]
