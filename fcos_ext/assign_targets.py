"""FCOS target assignment: which box, if any, each location of the feature pyramid predicts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._library import kernels, register_constant
from .assign_targets_arguments import (
    BOUNDARIES,
    TIES,
    Boundary,
    Corners,
    Ties,
    check,
    grids_of,
    read_rows,
)
from .assign_targets_reference import AssignedTargets, assign_targets_ref
from .grids import Grid

__all__ = [
    "AssignedTargets",
    "Boundary",
    "Corners",
    "Grid",
    "Ties",
    "assign_targets",
    "assign_targets_ref",
]

_DEVICES = kernels("assign_targets")


def assign_targets(
    boxes: Tensor,
    labels: Tensor,
    offsets: Tensor | None = None,
    *,
    counts: Tensor | None = None,
    feature_sizes: Sequence[tuple[int, int]],
    strides: Sequence[int | Grid],
    size_ranges: Sequence[tuple[float, float]],
    center_sampling_radius: float = 1.5,
    boundary: Boundary = "inclusive",
    normalize: bool = False,
    ties: Ties = "exact",
    corners: Corners = "edges",
) -> AssignedTargets:
    """Assign at most one ground-truth box to every location of a batch, in pixels, per FCOS.

    Column x, row y of a level with stride s is the image location (floor(s / 2) + x s,
    floor(s / 2) + y s). With l = px - x0, t = py - y0, r = x1 - px, b = y1 - py, a location
    (px, py) is a candidate for a box (x0, y0, x1, y1) of its image if

    1. it lies strictly inside the box: min(l, t, r, b) > 0;
    2. it lies in the window around the centre c = ((x0 + x1) / 2, (y0 + y1) / 2), if
       ``center_sampling_radius`` is above 0: |px - cx| < radius s and |py - cy| < radius s;
    3. max(l, t, r, b) is in the size range (low, high) of the level: low <= . <= high for
       ``boundary="inclusive"``, low < . < high for ``"strict"``, low <= . < high for
       ``"half_open"`` (the only rule by which adjoining ranges share nothing and miss nothing).

    Of several boxes the one with the smallest area (x1 - x0)(y1 - y0) wins; of equal areas, the
    one that comes first. With ``ties="torchvision"`` what decides is 1e8 - area, as torchvision's
    FCOS has it: float32 numbers of this size are 8 apart, so that areas closer than that may be
    equal; and a box of 1e8 or more never wins. Locations without a candidate are background.
    Source: arXiv 1904.01355, sections 3.1 to 3.3; rule 2 is the center sampling that its authors
    added later.

    Everything is computed in float32, each operation rounded as written here; ``radius s`` and the
    ranges are rounded to float32 too. centerness = sqrt((min(l, r) / max(l, r)) (min(t, b) /
    max(t, b))), of the distances in pixels. CPU, CUDA and the reference agree to the bit.

    A box never matches if one of its sides is not above 0, or if a coordinate, a side or its area
    is not finite in float32. Images without boxes are ordinary: all background.

    The boxes of the images come in one of two forms, packed with ``offsets`` or padded with
    ``counts``. All shapes of the result follow from shapes of the arguments, and on CUDA the host
    waits for nothing, so that a CUDA graph can hold the call: with padded boxes its replays take
    batches of any content.

    Args:
        boxes (Tensor[K, 4] or Tensor[N, M, 4]): x0, y0, x1, y1 in pixels, any floating dtype:
            packed, of all images one after the other; or padded, M for each image.
        labels (Tensor[K] or Tensor[N, M]): class of each box, int64 or int32. Must be >= 0: the
            output's -1 means background, and ignored boxes are not known here.
        offsets (Tensor[N + 1]): of packed boxes, int64 or int32: image i owns the boxes offsets[i]
            up to offsets[i + 1].
        counts (Tensor[N]): of padded boxes, int64 or int32: image i owns the first counts[i] of its
            M boxes. What the others hold does not matter.
        feature_sizes: (height, width) of each level, in locations.
        strides: of each level, in pixels; or a :class:`Grid`, of which the stride s is short for
            ``Grid(step=(s, s), first=(s // 2, s // 2), unit=s)``. At most 32 levels.
        size_ranges: (low, high) of each level, in pixels; ``math.inf`` is a legal bound.
        center_sampling_radius: in strides; 0 makes the whole box positive.
        boundary: which ends belong to a size range, see above.
        normalize: divide ``ltrb`` by the stride, or unit, of the level.
        ties: how areas are compared, see above.
        corners: where boxes end: at their edges; or at their last column and row of pixels, by
            which areas are (x1 - x0 + 1)(y1 - y0 + 1), as in the first FCOS code, and all else is
            as above.

    Returns:
        AssignedTargets: see there; nothing is differentiable.

    Raises:
        TypeError: a tensor has the wrong kind of dtype.
        ValueError: shapes, devices or lengths do not agree, an option is out of its range; and, on
            the CPU, ``offsets`` do not partition the boxes or ``counts`` leave 0..M. The host does
            not see what a GPU holds: there they are clamped, so that all rows they name exist.
    """
    extents = check(
        boxes,
        labels,
        offsets,
        counts,
        feature_sizes,
        strides,
        size_ranges,
        center_sampling_radius,
        boundary,
        ties,
        corners,
    )
    if boxes.device.type not in _DEVICES:
        return assign_targets_ref(
            boxes,
            labels,
            offsets,
            counts=counts,
            feature_sizes=feature_sizes,
            strides=strides,
            size_ranges=size_ranges,
            center_sampling_radius=center_sampling_radius,
            boundary=boundary,
            normalize=normalize,
            ties=ties,
            corners=corners,
        )
    try:
        targets = torch.ops.fcos_ext.assign_targets(
            boxes,
            labels,
            extents,
            [side for size in feature_sizes for side in size],
            [x for grid in grids_of(strides, center_sampling_radius) for x in _numbers(grid)],
            [end for ends in size_ranges for end in ends],
            BOUNDARIES.index(boundary),
            normalize,
            TIES.index(ties),
            corners == "pixels",
        )
    except RuntimeError:
        # On the CPU the operator checks the values; asked only now, as that takes its time.
        if boxes.device.type == "cpu":
            read_rows(boxes, extents)  # raises ValueError
        raise
    return AssignedTargets(*targets)


def _numbers(grid: Grid) -> tuple[float, ...]:
    """Of the operator."""
    reach = math.inf if grid.reach is None else grid.reach
    return tuple(map(float, (*grid.step, *grid.first, grid.unit, reach)))


def _fake(
    boxes: Tensor,
    labels: Tensor,
    extents: Tensor,
    feature_sizes: Sequence[int],
    grids: Sequence[float],
    size_ranges: Sequence[float],
    boundary: int,
    normalize: bool,
    ties: int,
    pixels: bool = False,
) -> tuple[Tensor, ...]:
    sides = zip(feature_sizes[::2], feature_sizes[1::2], strict=True)
    N = boxes.shape[0] if boxes.dim() == 3 else extents.shape[0] - 1
    L = sum(height * width for height, width in sides)
    return (
        boxes.new_empty((N, L), dtype=torch.int64),
        boxes.new_empty((N, L, 4), dtype=torch.float32),
        boxes.new_empty((N, L), dtype=torch.float32),
        boxes.new_empty((N, L), dtype=torch.int64),
        boxes.new_empty((N,), dtype=torch.int64),
    )


register_constant("assign_targets", fake=_fake)
