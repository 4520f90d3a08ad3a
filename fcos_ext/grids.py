"""Where the locations of a feature level are in the image."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


class Grid(NamedTuple):
    """Where the locations of a level are, if one stride does not tell it all. In pixels."""

    step: tuple[float, float]
    """From one row to the next and from one column to the next; above 0."""
    first: tuple[float, float]
    """y of the first row and x of the first column."""
    unit: float
    """What the center sampling and normalised distances are measured in; above 0."""
    reach: float | None = None
    """Of the center sampling, in place of ``center_sampling_radius`` units; ``math.inf``: none.
    Only for targets."""


def grid_of(stride: int | Grid) -> Grid:
    """The grid that a stride is short for."""
    if isinstance(stride, Grid):
        return stride
    return Grid(step=(stride, stride), first=(stride // 2, stride // 2), unit=stride)


def check_grid(op: str, grid: Grid, level: int) -> None:
    """Raise ValueError unless the numbers can be computed with."""
    reach = math.inf if grid.reach is None else grid.reach
    if not (
        all(_SMALLEST <= size <= _LARGEST for size in (*grid.step, grid.unit))
        and all(abs(first) <= _LARGEST for first in grid.first)
        and reach >= 0
    ):
        raise ValueError(
            f"{op}: a Grid must have finite steps and unit above 0, finite firsts and a "
            f"reach >= 0, got {grid} at level {level}"
        )


def locations_of(height: int, width: int, grid: Grid, device: torch.device) -> Tensor:
    """Image positions (x, y), float32 [height * width, 2], row by row."""
    y, x = (
        torch.arange(count, device=device, dtype=torch.float32) * step + first
        for count, step, first in zip((height, width), grid.step, grid.first, strict=True)
    )
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack((grid_x, grid_y), dim=-1).reshape(-1, 2)
