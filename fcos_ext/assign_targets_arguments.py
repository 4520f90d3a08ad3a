"""What :func:`fcos_ext.assign_targets` takes: rules, and the forms it is computed in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .grids import Grid, check_grid, grid_of

Boundary = Literal["inclusive", "strict", "half_open"]
Ties = Literal["exact", "torchvision"]
Corners = Literal["edges", "pixels"]

BOUNDARIES: tuple[str, ...] = ("inclusive", "strict", "half_open")
"""The operator knows a rule by its place here."""
TIES: tuple[str, ...] = ("exact", "torchvision")
"""As above."""
CORNERS: tuple[str, ...] = ("edges", "pixels")
_INTEGERS = (torch.int64, torch.int32)

_MAX_LEVELS = 32


def check(
    boxes: Tensor,
    labels: Tensor,
    offsets: Tensor | None,
    counts: Tensor | None,
    feature_sizes: Sequence[tuple[int, int]],
    strides: Sequence[int | Grid],
    size_ranges: Sequence[tuple[float, float]],
    center_sampling_radius: float,
    boundary: str,
    ties: str,
    corners: str,
) -> Tensor:
    """Everything but the values of tensors. Returns ``offsets`` or ``counts``, which is given."""
    if offsets is not None and counts is None:
        name, extents, padded = "offsets", offsets, False
    elif counts is not None and offsets is None:
        name, extents, padded = "counts", counts, True
    else:
        given = "neither" if offsets is None else "both"
        raise ValueError(f"assign_targets: offsets or counts must be given, got {given}")
    if not boxes.is_floating_point():
        raise TypeError(f"assign_targets: boxes must be floating point, got {boxes.dtype}")
    for what, tensor in (("labels", labels), (name, extents)):
        if tensor.dtype not in _INTEGERS:
            raise TypeError(f"assign_targets: {what} must be int64 or int32, got {tensor.dtype}")
        if tensor.device != boxes.device:
            raise ValueError(
                f"assign_targets: {what} must be on the device of boxes, {boxes.device}, "
                f"got {tensor.device}"
            )
    shape = boxes.shape
    if len(shape) != 2 + padded or shape[-1] != 4:
        expected = "[N, M, 4] with counts" if padded else "[K, 4] with offsets"
        raise ValueError(f"assign_targets: boxes must have shape {expected}, got {list(shape)}")
    if labels.shape != shape[:-1]:
        raise ValueError(
            "assign_targets: labels must have the shape of boxes without its last dimension, "
            f"{list(shape[:-1])}, got {list(labels.shape)}"
        )
    if extents.dim() != 1 or (len(extents) != shape[0] if padded else len(extents) == 0):
        expected = f"[N] with N = {shape[0]} images" if padded else "[N + 1]"
        raise ValueError(
            f"assign_targets: {name} must have shape {expected}, got {list(extents.shape)}"
        )
    _check_levels(feature_sizes, strides, size_ranges)
    if not center_sampling_radius >= 0:
        raise ValueError(
            f"assign_targets: center_sampling_radius must be >= 0, got {center_sampling_radius}"
        )
    if boundary not in BOUNDARIES:
        raise ValueError(f"assign_targets: boundary must be one of {BOUNDARIES}, got {boundary!r}")
    if ties not in TIES:
        raise ValueError(f"assign_targets: ties must be one of {TIES}, got {ties!r}")
    if corners not in CORNERS:
        raise ValueError(f"assign_targets: corners must be one of {CORNERS}, got {corners!r}")
    return extents


def read_rows(boxes: Tensor, extents: Tensor) -> list[tuple[int, int]]:
    """First row of each image and the one after its last; the values are checked."""
    values: list[int] = extents.tolist()
    if boxes.dim() == 3:
        capacity = boxes.shape[1]
        for i, count in enumerate(values):
            if not 0 <= count <= capacity:
                raise ValueError(
                    f"assign_targets: counts must lie in 0..M with M = {capacity}, got {count} at "
                    f"image {i}"
                )
        return [(i * capacity, i * capacity + count) for i, count in enumerate(values)]
    if values[0] != 0 or values[-1] != len(boxes):
        raise ValueError(
            "assign_targets: offsets must start at 0 and end at the number of boxes, "
            f"{len(boxes)}, got {values[0]} and {values[-1]}"
        )
    rows = list(zip(values[:-1], values[1:], strict=True))
    for i, (first, last) in enumerate(rows):
        if first > last:
            raise ValueError(
                f"assign_targets: offsets must not decrease, got {first} then {last} at image {i}"
            )
    return rows


def _check_levels(
    feature_sizes: Sequence[tuple[int, int]],
    strides: Sequence[int | Grid],
    size_ranges: Sequence[tuple[float, float]],
) -> None:
    if not 0 < len(strides) == len(feature_sizes) == len(size_ranges):
        raise ValueError(
            "assign_targets: feature_sizes, strides and size_ranges must have one entry for each "
            f"level, got {len(feature_sizes)}, {len(strides)} and {len(size_ranges)}"
        )
    if len(strides) > _MAX_LEVELS:
        raise ValueError(
            f"assign_targets: strides must be of at most {_MAX_LEVELS} levels, got {len(strides)}"
        )
    for level, (height, width) in enumerate(feature_sizes):
        if height < 1 or width < 1:
            raise ValueError(
                "assign_targets: feature_sizes must be (height, width) of at least 1, "
                f"got {(height, width)} at level {level}"
            )
    for level, stride in enumerate(strides):
        if isinstance(stride, Grid):
            check_grid("assign_targets", stride, level)
        elif stride < 1 or stride != int(stride):
            raise ValueError(
                f"assign_targets: strides must be whole numbers >= 1, got {stride} at level {level}"
            )
    for level, (low, high) in enumerate(size_ranges):
        if not low <= high:
            raise ValueError(
                "assign_targets: size_ranges must be (low, high) with low <= high, "
                f"got {(low, high)} at level {level}"
            )


def grids_of(strides: Sequence[int | Grid], radius: float) -> list[Grid]:
    """The grid of each level, with its reach."""
    grids = []
    for stride in strides:
        grid = grid_of(stride)
        if grid.reach is None:
            grid = grid._replace(reach=radius * grid.unit if radius > 0 else math.inf)
        grids.append(grid)
    return grids
