"""tianzhi0549/FCOS with its improvements, ``FCOS_imprv_*.pth``: the layout is ``original.py``'s."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from fcos import dialects
from fcos.config import Config

from . import original

NAME = "original-imprv"


def recognises(keys: Collection[str]) -> bool:
    """Whether a checkpoint has these keys, which may then be a plain one as well."""
    return original.is_layout(keys)


def config(state: Mapping[str, Tensor]) -> Config:
    """The settings that go with the weights."""
    return original.with_network(state, dialects.original_imprv())


def to_ours(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Our state dict, and the keys left out. Raises ConvertError if one does not fit."""
    return original.to_ours(state)
