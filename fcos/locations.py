"""Where the locations of the feature levels lie in the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fcos_ext.grids import Grid

Locations = Literal["half_stride", "torchvision"]


def feature_sizes(
    image_size: tuple[int, int], strides: Sequence[int], backbone: str = ""
) -> list[tuple[int, int]]:
    """(height, width) of each feature level, for a padded image of (height, width) pixels.

    Each convolution of a pyramid rounds up; means over 4, 8 or more pixels of an HRNet's finest
    branch, which become its levels, round down where any are left.
    """
    if backbone.startswith("hrnet"):
        height, width = (
            [-(-max(1, pixels // (s // 2)) // 2) for s in strides] for pixels in image_size
        )
        return list(zip(height, width, strict=True))
    rows, columns = image_size
    return [(-(-rows // s), -(-columns // s)) for s in strides]


def level_grids(
    padded_size: tuple[int, int], strides: Sequence[int], locations: Locations
) -> list[int | Grid]:
    """Positions of each level's locations, as :func:`fcos_ext.assign_targets` takes them.

    Args:
        padded_size: (height, width) of the images with their padding.
        strides: of the levels, in pixels.
        locations: see :class:`fcos.config.ModelConfig`. torchvision has "anchors" around the
            locations, whose side is the stride: it stays the unit of distances and of the center
            sampling where the steps are shorter.
    """
    if locations == "half_stride":
        return list(strides)
    height, width = padded_size
    return [
        Grid(step=(height // rows, width // columns), first=(0.0, 0.0), unit=stride)
        for stride, (rows, columns) in zip(
            strides, feature_sizes(padded_size, strides), strict=True
        )
    ]


def level_anchors(
    padded_size: tuple[int, int], strides: Sequence[int], device: torch.device
) -> list[Tensor]:
    """torchvision's squares of a stride around each location, float32 [H_l W_l, 4] of each level.

    They say what :func:`level_grids` does, as tensors.
    """
    height, width = padded_size
    levels = []
    for stride, (rows, columns) in zip(strides, feature_sizes(padded_size, strides), strict=True):
        y = torch.arange(rows, device=device) * (height // rows)
        x = torch.arange(columns, device=device) * (width // columns)
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
        centers = torch.stack((grid_x, grid_y), dim=-1).reshape(-1, 2).float()
        levels.append(torch.cat((centers - stride / 2, centers + stride / 2), dim=1))
    return levels
