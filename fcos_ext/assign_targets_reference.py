"""FCOS target assignment in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .assign_targets_arguments import Boundary, Corners, Ties, check, grids_of, read_rows
from .grids import Grid, locations_of

_MAX_PAIRS = 1 << 18
"""(location, box) pairs handled at once; bounds the temporaries to some 10 MB."""


class AssignedTargets(NamedTuple):
    """Targets of every location; L runs over the levels, P3 first, each row-major in (y, x)."""

    labels: Tensor
    """int64 [N, L]: class of the assigned box, -1 background."""
    ltrb: Tensor
    """float32 [N, L, 4]: distances to its sides, 0 at background."""
    centerness: Tensor
    """float32 [N, L]: 1 at the centre of the box towards 0 at its border, 0 at background."""
    matched: Tensor
    """int64 [N, L]: row of the assigned box, counted over the whole batch, -1 background; of
    padded boxes [N, M, 4] the row in ``boxes.flatten(0, 1)``."""
    num_pos: Tensor
    """int64 [N]: locations of the image that are not background."""


@torch.no_grad()
def assign_targets_ref(
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
    """Same contract as :func:`assign_targets`, in plain PyTorch.

    Reads ``offsets`` or ``counts`` on the host, on any device, and raises ValueError accordingly.
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
    rows = read_rows(boxes, extents)

    boxes = boxes.to(torch.float32).reshape(-1, 4)
    labels = labels.to(torch.int64).reshape(-1)
    cost = _cost(boxes, ties, corners)
    num_locations = sum(height * width for height, width in feature_sizes)
    matched = torch.full((len(rows), num_locations), -1, dtype=torch.int64, device=boxes.device)
    ltrb = boxes.new_zeros((len(rows), num_locations, 4))
    centerness = boxes.new_zeros((len(rows), num_locations))

    start = 0
    for (height, width), grid, ends in zip(
        feature_sizes, grids_of(strides, center_sampling_radius), size_ranges, strict=True
    ):
        level = slice(start, start + height * width)
        start = level.stop
        locations = locations_of(height, width, grid, boxes.device)
        for image, (first, last) in enumerate(rows):
            if first == last:
                continue
            index = _match(locations, boxes[first:last], cost[first:last], grid, ends, boundary)
            positive = index >= 0
            # Background rows borrow box `first` here and are overwritten with zeros below.
            distances = _distances(locations, boxes[first + index.clamp(min=0)])
            matched[image, level] = torch.where(positive, first + index, -1)
            centerness[image, level] = torch.where(positive, _centerness(distances), 0.0)
            if normalize:
                distances = distances / distances.new_tensor(grid.unit)
            ltrb[image, level] = torch.where(positive[:, None], distances, 0.0)

    positive = matched >= 0
    assigned = torch.full_like(matched, -1)
    if len(boxes):
        assigned = torch.where(positive, labels[matched.clamp(min=0)], -1)
    return AssignedTargets(assigned, ltrb, centerness, matched, positive.sum(dim=1))


def _match(
    locations: Tensor,
    boxes: Tensor,
    cost: Tensor,
    grid: Grid,
    size_range: tuple[float, float],
    boundary: str,
) -> Tensor:
    """Index into ``boxes`` [M, 4], M > 0, for each of ``locations`` [P, 2], or -1: int64 [P]."""
    x0, y0, x1, y1 = boxes[..., None].unbind(1)  # each [M, 1]
    low, high = size_range

    chunks = []
    for x, y in locations.t().split(max(1, _MAX_PAIRS // len(boxes)), dim=1):
        left, top, right, bottom = x - x0, y - y0, x1 - x, y1 - y  # each [M, chunk]
        nearest = torch.minimum(torch.minimum(left, right), torch.minimum(top, bottom))
        size = torch.maximum(torch.maximum(left, right), torch.maximum(top, bottom))
        # Nothing is strictly inside a box with a NaN or with a side that is not above 0.
        candidate = nearest > 0
        if grid.reach is not None and grid.reach < math.inf:
            candidate &= (x - (x0 + x1) / 2).abs() < grid.reach
            candidate &= (y - (y0 + y1) / 2).abs() < grid.reach
        candidate &= (size > low) if boundary == "strict" else (size >= low)
        candidate &= (size <= high) if boundary == "inclusive" else (size < high)
        # torch.min documents that the first of equal minima is returned: the lower box index.
        smallest, index = torch.where(candidate, cost[:, None], math.inf).min(dim=0)
        chunks.append(torch.where(smallest < math.inf, index, -1))
    return torch.cat(chunks)


def _cost(boxes: Tensor, ties: str, corners: str) -> Tensor:
    """[K]: the box with the least one wins; infinite: it cannot. Of an infinite area, hence of all
    with an infinite coordinate, it is."""
    width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
    if corners == "pixels":
        width, height = width + 1, height + 1
    area = width * height
    return area if ties == "exact" else torch.where(area < 1e8, area - 1e8, math.inf)


def _distances(locations: Tensor, boxes: Tensor) -> Tensor:
    """l, t, r, b [P, 4] from ``locations`` [P, 2] to the sides of the box of each, [P, 4]."""
    return torch.cat((locations - boxes[:, :2], boxes[:, 2:] - locations), dim=1)


def _centerness(ltrb: Tensor) -> Tensor:
    """Equation 3 of arXiv 1904.01355, [...] of distances [..., 4]."""
    l_, t_, r_, b_ = ltrb.unbind(-1)
    horizontal = torch.minimum(l_, r_) / torch.maximum(l_, r_)
    vertical = torch.minimum(t_, b_) / torch.maximum(t_, b_)
    # PyTorch's float32 root is not correctly rounded on every CPU; that of float64 rounds to the
    # float32 nearest to the exact one.
    return torch.sqrt((horizontal * vertical).double()).to(ltrb.dtype)
