"""The code bases whose checkpoints are known."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Protocol

from torch import Tensor

from fcos.config import Config

from . import adelaidet, detectron2, mmdet, original, original_imprv, rosinality, torchvision
from .errors import ConvertError


class Family(Protocol):
    """What a module of a code base has."""

    NAME: str

    def recognises(self, keys: Collection[str]) -> bool:
        """Whether a checkpoint has these keys."""

    def config(self, state: Mapping[str, Tensor]) -> Config:
        """The settings that go with the weights. Raises ConvertError."""

    def to_ours(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Our state dict, and the keys left out. Raises ConvertError if one does not fit."""


FAMILIES: tuple[Family, ...] = (
    original,
    original_imprv,
    adelaidet,
    detectron2,
    mmdet,
    torchvision,
    rosinality,
)
NAMES = tuple(family.NAME for family in FAMILIES)


def find_family(keys: Collection[str], source: str, file_name: str) -> tuple[Family, str]:
    """The code base that a checkpoint is from, and what was assumed to say so, if anything.

    Args:
        keys: of its weights.
        source: its name, or "auto": what the keys say, or else the name of the file.
        file_name: of the checkpoint.

    Raises:
        ConvertError: it is not known, or is one of several.
    """
    if source != "auto":
        for family in FAMILIES:
            if family.NAME == source:
                return family, ""
        near = difflib.get_close_matches(source, NAMES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConvertError(f"source must be auto or one of {', '.join(NAMES)}, got {source}{hint}")
    found = [family for family in FAMILIES if family.recognises(keys)]
    if not found:
        raise ConvertError(
            f"not from a known FCOS ({', '.join(NAMES)}); its {len(keys)} weights are named "
            f"{', '.join(sorted(keys)[:4])} ..."
        )
    if len(found) == 1:
        return found[0], ""
    # plain or improved: published files say
    name = file_name.lower()
    if "imprv" in name:
        return original_imprv, "the improved detector (relu of strides), as the file's name says"
    if name.startswith("fcos_"):
        return original, "the plain detector (exp of pixels), as the file's name says"
    raise ConvertError(
        "the weights do not tell whether this is the plain detector (distances are exp of pixels) "
        "or the improved one (relu of strides): give --source original or --source original-imprv"
    )
