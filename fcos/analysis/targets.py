"""What every location of one picture learns, level by level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_ext.grids import Grid

from ..data.padding import padded_size
from ..locations import feature_sizes, level_grids
from .assignment import assign, network_boxes
from .conventions import Conventions


@dataclass(frozen=True)
class LevelTargets:
    """A feature level: H rows and W columns of locations."""

    name: str
    stride: int
    step: tuple[int, int]
    """Pixels from one row to the next, and from one column to the next."""
    first: tuple[int, int]
    """y of the first row and x of the first column."""
    size_range: tuple[float, float]
    matched: NDArray[np.int64]
    """[H, W]: the box that the location learns, -1 background."""
    centerness: NDArray[np.float32]
    """[H, W]: its centerness target, 0 at background."""
    ltrb: NDArray[np.float32]
    """[H, W, 4]: distances to the sides of the box in pixels, 0 at background."""
    candidates: NDArray[np.int64]
    """[H, W]: boxes that the location lies in and might learn; from 2 on it is ambiguous."""

    def boxes(self) -> NDArray[np.int64]:
        """The boxes that the level learns."""
        return np.unique(self.matched[self.matched >= 0])

    def location(self, row: Any, column: Any) -> tuple[Any, Any]:
        """(x, y) in the resized picture; of integers or of arrays of them."""
        (step_y, step_x), (first_y, first_x) = self.step, self.first
        return first_x + column * step_x, first_y + row * step_y

    def extent(self) -> tuple[float, float, float, float]:
        """Left, right, bottom and top of cells that each have a location in the middle."""
        (step_y, step_x), (first_y, first_x) = self.step, self.first
        rows, columns = self.matched.shape
        left, top = first_x - step_x / 2, first_y - step_y / 2
        return left, left + columns * step_x, top + rows * step_y, top


@dataclass(frozen=True)
class PictureTargets:
    """A picture of M boxes."""

    size: tuple[int, int]
    """(height, width) of the resized picture."""
    boxes: NDArray[np.float32]
    """[M, 4] xyxy in the resized picture."""
    labels: NDArray[np.int64]
    """[M]"""
    levels: tuple[LevelTargets, ...]

    def positives(self) -> NDArray[np.int64]:
        """[M, D]: locations of each level that learn each box."""
        count = len(self.boxes)
        return np.stack(
            [
                np.bincount(level.matched[level.matched >= 0], minlength=count)
                for level in self.levels
            ],
            axis=1,
        )


def picture_targets(
    boxes: NDArray[np.float32],
    labels: NDArray[np.int64],
    size: tuple[int, int],
    conventions: Conventions,
) -> PictureTargets:
    """What the locations of a picture learn, by the compiled assignment.

    Args:
        boxes (ndarray[M, 4]): xyxy in the pixels of the file.
        labels (ndarray[M]): int64.
        size: (height, width) of the file.
        conventions: Levels, resizing and the rest.
    """
    boxes, resized = network_boxes(boxes, size, conventions)
    together = assign(boxes, labels, np.array([0, len(boxes)]), resized, conventions)
    grids = feature_sizes(resized, conventions.strides)
    candidates = np.zeros(sum(height * width for height, width in grids), dtype=np.int64)
    for index in range(len(boxes)):  # each alone, so that no other box can take a location
        one = slice(index, index + 1)
        alone = assign(boxes[one], labels[one], np.array([0, 1]), resized, conventions)
        candidates += (alone.matched[0] >= 0).numpy()

    places = level_grids(padded_size(resized), conventions.strides, conventions.locations)
    levels, start = [], 0
    for name, stride, grid, ends, (height, width) in zip(
        conventions.level_names,
        conventions.strides,
        places,
        conventions.size_ranges,
        grids,
        strict=True,
    ):
        step, first = (stride, stride), (stride // 2, stride // 2)
        if isinstance(grid, Grid):
            (step_y, step_x), (first_y, first_x) = grid.step, grid.first
            step, first = (int(step_y), int(step_x)), (int(first_y), int(first_x))
        mine = slice(start, start + height * width)
        start = mine.stop
        levels.append(
            LevelTargets(
                name,
                stride,
                step,
                first,
                ends,
                together.matched[0, mine].numpy().reshape(height, width),
                together.centerness[0, mine].numpy().reshape(height, width),
                together.ltrb[0, mine].numpy().reshape(height, width, 4),
                candidates[mine].reshape(height, width),
            )
        )
    return PictureTargets(resized, boxes, labels, tuple(levels))
