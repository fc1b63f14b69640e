"""Manifests on the node: whole or not there, apart by domain, gone when no record can stand for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from csi.oci.digest import Digest
from csi.supervisor.manifests import KeptManifest, KeptManifests

DATA = b'{"schemaVersion": 2, "layers": []}\n{}'
MANIFEST = KeptManifest(Digest.of(DATA), "application/vnd.oci.image.manifest.v1+json", DATA)


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def test_what_is_kept_is_there_for_its_domain_also_after_a_restart(tmp_path: Path) -> None:
    manifests = KeptManifests(str(tmp_path), 60, Clock())
    assert manifests.get("shared", MANIFEST.digest) is None
    manifests.keep("shared", MANIFEST)
    assert manifests.get("shared", MANIFEST.digest) == MANIFEST
    assert manifests.get("namespace-a", MANIFEST.digest) is None
    indexed = KeptManifest(Digest.of(b"indexed"), "t", b"indexed", indexed=True)
    manifests.keep("shared", indexed)
    assert manifests.get("shared", indexed.digest) == indexed
    assert KeptManifests(str(tmp_path), 60, Clock()).get("shared", MANIFEST.digest) == MANIFEST


@pytest.mark.allow_logs
def test_a_damaged_file_counts_as_not_there(tmp_path: Path) -> None:
    manifests = KeptManifests(str(tmp_path), 60, Clock())
    manifests.keep("shared", MANIFEST)
    (path,) = tmp_path.iterdir()
    for content in (b"", b"type", path.read_bytes()[:-1], path.read_bytes() + b"x"):
        path.write_bytes(content)
        assert manifests.get("shared", MANIFEST.digest) is None
    manifests.keep("shared", MANIFEST)
    assert manifests.get("shared", MANIFEST.digest) == MANIFEST


def test_it_goes_when_its_time_is_over_and_stays_when_it_is_kept_again(tmp_path: Path) -> None:
    clock = Clock()
    manifests = KeptManifests(str(tmp_path), 60, clock)
    other = KeptManifest(Digest.of(b"other"), "t", b"other")
    manifests.keep("shared", MANIFEST)
    clock.now += 50
    manifests.keep("shared", other)
    assert manifests.get("shared", MANIFEST.digest) == MANIFEST
    clock.now += 50
    manifests.keep("shared", other)
    assert manifests.get("shared", MANIFEST.digest) is None
    assert manifests.get("shared", other.digest) == other


@pytest.mark.allow_logs
def test_a_directory_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    manifests = KeptManifests(str(tmp_path / "gone"), 60, Clock())
    (tmp_path / "gone").rmdir()
    manifests.keep("shared", MANIFEST)
    assert manifests.get("shared", MANIFEST.digest) is None
