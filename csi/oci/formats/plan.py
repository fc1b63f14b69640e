"""What a manifest says that a tree is made of: layer by layer, before any layer was read.

Layers that are files as they are have a path here already. What lies in archives is known when somebody has read their
headers; `csi.tree.assemble` puts both together, under the rules of the plan.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from csi.oci.descriptor import Descriptor


class ModelFormat(StrEnum):
    """The conventions an artifact follows."""

    MODELPACK = "modelpack"
    IMAGE = "image"
    ORAS = "oras"
    DOCKER_AI = "docker-ai"
    KITOPS = "kitops"
    OLLAMA = "ollama"


class Packing(StrEnum):
    """How files lie in a layer. RAW: the layer is one file as it is."""

    RAW = "raw"
    TAR = "tar"
    TAR_GZIP = "tar+gzip"
    TAR_ZSTD = "tar+zstd"

    @property
    def is_archive(self) -> bool:
        """Its headers must be read to know what is in it."""
        return self is not Packing.RAW


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerPlan:
    """One layer of a model.

    `path`, `mtime_s` and `executable` are a RAW layer's file. An archive's members are put below `base` (empty: the
    root); with `member_root` each of them must be that directory or lie in it. With `maybe_file` only the archive itself
    can tell whether it is a packed directory or a file that happens to be an archive: see `settle`.

    `origin` is the `registry/repository` that has the blob; empty for the one the model comes from. `category` is what the
    packer calls the layer's content (`weight`, `doc`, …), empty where the format has no such word.
    """

    descriptor: Descriptor
    packing: Packing = Packing.RAW
    path: str = ""
    mtime_s: int = 0
    executable: bool = False
    base: str = ""
    member_root: str = ""
    maybe_file: bool = False
    origin: str = ""
    category: str = ""

    def settle(self, first_member: str | None) -> LayerPlan:
        """This layer without `maybe_file`: an archive when its first member is `member_root` or lies in it, else the file
        `path`. None: its bytes are no archive.
        """
        if not self.maybe_file:
            return self
        name = (first_member or "").removeprefix("./").rstrip("/")
        if name == self.member_root or name.startswith(f"{self.member_root}/"):
            return replace(self, maybe_file=False, path="")
        return replace(self, maybe_file=False, packing=Packing.RAW, member_root="")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelPlan:
    """The layers of a model, lowest first.

    `is_overlay`: an image; a later layer replaces what earlier ones have, and whiteouts remove it. Otherwise two layers
    that disagree about a name are an error. `parent` names another model whose layers belong to this one (a KitOps kit
    built on a kit). `warnings` are for people: what was left out or looks odd.
    """

    format: ModelFormat
    layers: tuple[LayerPlan, ...]
    is_overlay: bool = False
    parent: str | None = None
    warnings: tuple[str, ...] = ()

    @property
    def archives(self) -> tuple[int, ...]:
        """The positions of layers whose headers must be read."""
        return tuple(position for position, layer in enumerate(self.layers) if layer.packing.is_archive)
