"""Renaming of every tensor by a table; nothing is left over, nothing missing."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from fcos.config import ConfigError, ModelConfig
from fcos.model import FCOS
from fcos.trunk import MissingPackageError

from .errors import ConvertError
from .names import Names, table

# Counts the batches that a norm has seen, which nothing uses.
COUNTER = "num_batches_tracked"
SCALES = "head.scales"


def to_ours(
    state: Mapping[str, Tensor], names: Names, config: ModelConfig, ignored: tuple[str, ...]
) -> tuple[dict[str, Tensor], list[str]]:
    """Our state dict, and the keys that are left out on purpose.

    Args:
        state: theirs.
        names: their names.
        config: the network it is for.
        ignored: beginnings of keys to leave out.

    Raises:
        ConvertError: a key has no place here, one is missing, or a shape is another; it lists all.
    """
    shapes = network_shapes(config)
    left = dict(state)
    result: dict[str, Tensor] = {}
    wrong: list[str] = []
    rows = dict(table(names, config))
    for ours, theirs in rows.items():
        if theirs in left:
            result[ours] = left.pop(theirs)
        else:
            wrong.append(f"missing {theirs}")
    if SCALES in shapes:
        keys = [f"{names.scale.format(level=i)}.scale" for i in range(len(config.strides))]
        wrong += [f"missing {key}" for key in keys if key not in left]
        scales = [left.pop(key) for key in keys if key in left]
        wrong += [
            f"{key} has shape {tuple(scale.shape)}, not that of one number"
            for key, scale in zip(keys, scales, strict=False)
            if scale.numel() != 1
        ]
        if not wrong:
            result[SCALES] = torch.stack([scale.reshape(()) for scale in scales])
    dropped = [key for key in left if key.endswith(COUNTER) or key.startswith(ignored)]
    wrong += [f"unknown {key}" for key in left if key not in dropped]
    wrong += [
        f"{rows.get(ours, ours)} has shape {tuple(tensor.shape)}, not {shapes[ours]}"
        for ours, tensor in result.items()
        if tuple(tensor.shape) != shapes[ours]
    ]
    if wrong:
        raise ConvertError(f"{len(wrong)} keys do not fit {config.backbone}: {'; '.join(wrong)}")
    for key in shapes.keys() - result.keys():
        if not key.endswith(COUNTER):
            raise AssertionError(f"the tables of this project have no place for {key}")
        result[key] = torch.zeros((), dtype=torch.int64)
    return {key: result[key] for key in shapes}, dropped


def from_ours(state: Mapping[str, Tensor], names: Names, config: ModelConfig) -> dict[str, Tensor]:
    """The way back, of networks without scales."""
    return {theirs: state[ours] for ours, theirs in table(names, config)}


def network_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of the network. Raises ConvertError if there can be none."""
    try:
        return dict(_shapes(config))
    except MissingPackageError as error:
        raise ConvertError(str(error)) from error
    except ConfigError as error:
        raise ConvertError(f"describes an impossible network: {error}") from error


@lru_cache(maxsize=8)
def _shapes(config: ModelConfig) -> tuple[tuple[str, tuple[int, ...]], ...]:
    with torch.device("meta"):
        network = FCOS(config, pretrained_backbone=False)
    return tuple((key, tuple(value.shape)) for key, value in network.state_dict().items())
