"""Where the locations of the feature levels lie in the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fcos_ext.grids import Grid

Locations = Literal["half_stride", "torchvision"]


def feature_sizes(image_size: tuple[int, int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """(height, width) of each feature level, for an image of (height, width) pixels."""
    height, width = image_size
    return [(-(-height // s), -(-width // s)) for s in strides]


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
