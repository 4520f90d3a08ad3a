"""rosinality/fcos-pytorch: recognised, and refused for its backbone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NoReturn

from torch import Tensor

from fcos.config import Config

from .errors import ConvertError

NAME = "rosinality"


def recognises(keys: Collection[str]) -> bool:
    """Whether a checkpoint has these keys."""
    return {"head.center_pred.weight", "head.cls_pred.weight"} <= set(keys)


def config(state: Mapping[str, Tensor]) -> Config:
    """Raises ConvertError: it has VoVNets alone."""
    _refuse()


def to_ours(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Raises ConvertError: it has VoVNets alone."""
    _refuse()


def _refuse() -> NoReturn:
    raise ConvertError("has a VoVNet backbone, which this project does not have")
