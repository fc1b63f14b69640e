"""Artifacts that no honest producer makes, and what must be said of each."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from dataclasses import dataclass

from formats import artifacts
from formats.artifacts import (
    CNCF,
    EMPTY,
    IMAGE_CONFIG,
    OLLAMA,
    TAR,
    Artifact,
    Layer,
    artifact,
    body,
    image,
    packed,
    raw,
    tar,
)


@dataclass(frozen=True)
class Hostile:
    """`says` is part of the error."""

    artifact: Artifact
    says: str


def model(*layers: Layer) -> Artifact:
    """A ModelPack of these."""
    return artifact(f"{CNCF}config.v1+json", layers, {}, artifact_type=f"{CNCF}manifest.v1+json")


def members(*infos: tarfile.TarInfo) -> bytes:
    """A tar of headers without payload, whatever they say."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for info in infos:
            archive.addfile(info)
    return out.getvalue()


def member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    """One of them."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def climbing_annotation() -> Hostile:
    """The hole modctl had."""
    return Hostile(model(raw(f"{CNCF}weight.v1.raw", "../../etc/cron.d/x")), "leads out of the model with '..'")


def absolute_title() -> Hostile:
    """An absolute path as a title."""
    return Hostile(artifact(EMPTY, [Layer(TAR, b"x", {artifacts.TITLE: "/etc/passwd"})], {}), "is absolute")


def climbing_directory_title() -> Hostile:
    """A packed directory that wants to be elsewhere."""
    annotations = {artifacts.TITLE: "../x", "io.deis.oras.content.unpack": "true"}
    layer = Layer(f"{TAR}+gzip", packed(tar({"../x/a": b"a"}), "tar+gzip"), annotations)
    return Hostile(artifact(EMPTY, [layer], {}), "'..'")


def climbing_member() -> Hostile:
    """An archive's entry above its root."""
    return Hostile(model(Layer(f"{CNCF}weight.v1.tar", tar({"../../x": b"x"}))), "leads out of the model with '..'")


def absolute_link() -> Hostile:
    """A link into the reader's own file system."""
    return Hostile(
        model(Layer(f"{CNCF}doc.v1.tar", tar({"a": b"a", "passwd": "/etc/passwd"}))),
        "link 'passwd' → '/etc/passwd' leads out",
    )


def link_through_a_link() -> Hostile:
    """Inside by its text, outside when it is walked."""
    layer = Layer(f"{CNCF}doc.v1.tar", tar({"d/f": b"f", "d/up": "..", "l": "d/up/../etc/passwd"}))
    return Hostile(model(layer), "leads out of the model")


def hard_link_outside() -> Hostile:
    """A hard link to a file of the node."""
    layer = Layer(f"{CNCF}doc.v1.tar", members(member("h", tarfile.LNKTYPE, "../../../etc/shadow")))
    return Hostile(model(layer), "'..'")


def device() -> Hostile:
    """A device in an artifact."""
    return Hostile(model(Layer(f"{CNCF}doc.v1.tar", members(member("null", tarfile.CHRTYPE)))), "is a device")


def same_name_other_bytes() -> Hostile:
    """Whoever scanned the first has not seen the second."""
    layers = [
        Layer(f"{CNCF}weight.v1.raw", body(content), {artifacts.FILEPATH: "model.bin"}) for content in ("good", "bad")
    ]
    return Hostile(model(*layers), "'model.bin' is there already")


def twice_in_one_archive() -> Hostile:
    """The same in one archive."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for content in (b"good", b"evil"):
            info = tarfile.TarInfo("model.bin")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return Hostile(model(Layer(f"{CNCF}weight.v1.tar", out.getvalue())), "'model.bin' is there already")


def file_and_directory() -> Hostile:
    """One name, two kinds."""
    return Hostile(model(*(raw(f"{CNCF}weight.v1.raw", path) for path in ("a", "a/b"))), "also the directory")


def whiteout_in_an_artifact() -> Hostile:
    """A deletion where nothing is deleted."""
    return Hostile(model(Layer(f"{CNCF}doc.v1.tar", tar({".wh.x": b""}))), "means a deletion")


def whiteout_of_nothing() -> Hostile:
    """A whiteout without a name."""
    return Hostile(image([Layer(TAR, tar({"a": b"a"})), Layer(TAR, tar({".wh.": b""}))], {}), "names nothing")


def image_member_above_the_root() -> Hostile:
    """In an image too."""
    return Hostile(image([Layer(TAR, tar({"a/../../x": b"x"}))], {}), "'..'")


def signature() -> Hostile:
    """A reference to a signature."""
    layer = Layer("application/vnd.dev.cosign.simplesigning.v1+json", b"{}")
    return Hostile(artifact(IMAGE_CONFIG, [layer], {}), "this reference is a signature")


def sbom() -> Hostile:
    """A reference to an SBOM."""
    return Hostile(
        artifact(EMPTY, [Layer("application/spdx+json", b"{}")], {}, artifact_type="application/spdx+json"), "an SBOM"
    )


def attestation_alone() -> Hostile:
    """What BuildKit puts beside an image."""
    return Hostile(artifacts.attestation(), "an attestation")


def ollama_by_tensor() -> Hostile:
    """No loader reads it."""
    return Hostile(artifact(artifacts.DOCKER_CONFIG, [Layer(f"{OLLAMA}tensor", b"t")], {}), "tensor by tensor")


def cog() -> Hostile:
    """Only Cog knows where its files go."""
    return Hostile(
        artifact("application/vnd.cog.weight.config.v1+json", [Layer(TAR, tar({"a": b"a"}))], {}), "Cog weights"
    )


def unknown_compression() -> Hostile:
    """Not decoded here."""
    return Hostile(model(Layer(f"{CNCF}weight.v1.tar+bzip2", b"BZh")), "compressed in a way that is not mounted")


def something_else() -> Hostile:
    """A chart."""
    return Hostile(
        artifact("application/vnd.cncf.helm.config.v1+json", [Layer("application/x", b"x")], {}), "not a model"
    )


def undecided_index() -> Hostile:
    """Nobody guesses."""
    found = artifacts.quantizations()
    return Hostile(Artifact(found.manifest, {}, {}, {}, found.children), "org.example.quantization=q4")


def missing_sub_path() -> Hostile:
    """An attribute that fits another model."""
    found = artifacts.modctl()
    return Hostile(Artifact(found.manifest, found.blobs, {}, {"subPath": "models"}), "at its top there are README.md")


ARTIFACTS: dict[str, Callable[[], Hostile]] = {
    make.__name__: make
    for make in (
        climbing_annotation,
        absolute_title,
        climbing_directory_title,
        climbing_member,
        absolute_link,
        link_through_a_link,
        hard_link_outside,
        device,
        same_name_other_bytes,
        twice_in_one_archive,
        file_and_directory,
        whiteout_in_an_artifact,
        whiteout_of_nothing,
        image_member_above_the_root,
        signature,
        sbom,
        attestation_alone,
        ollama_by_tensor,
        cog,
        unknown_compression,
        something_else,
        undecided_index,
        missing_sub_path,
    )
}
"""All of them by name."""
