"""FCOS target assignment: which box, if any, each location of the feature pyramid predicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ._library import kernels, register_constant

_DEVICES = kernels("assign_targets")

Boundary = Literal["inclusive", "strict", "half_open"]
Ties = Literal["exact", "torchvision"]

_BOUNDARIES: tuple[str, ...] = ("inclusive", "strict", "half_open")
"""The operator knows a rule by its place here."""
_TIES: tuple[str, ...] = ("exact", "torchvision")
"""As above."""
_INTEGERS = (torch.int64, torch.int32)

_MAX_LEVELS = 32
_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
_MAX_PAIRS = 1 << 18
"""(location, box) pairs handled at once; bounds the temporaries to some 10 MB."""


class Grid(NamedTuple):
    """Where the locations of a level are, if one stride does not tell it all. In pixels."""

    step: tuple[float, float]
    """From one row to the next and from one column to the next; above 0."""
    first: tuple[float, float]
    """y of the first row and x of the first column."""
    unit: float
    """What the center sampling and normalised distances are measured in; above 0."""
    reach: float | None = None
    """Of the center sampling, in place of ``center_sampling_radius`` units; ``math.inf``: none."""


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

    Returns:
        AssignedTargets: see there; nothing is differentiable.

    Raises:
        TypeError: a tensor has the wrong kind of dtype.
        ValueError: shapes, devices or lengths do not agree, an option is out of its range; and, on
            the CPU, ``offsets`` do not partition the boxes or ``counts`` leave 0..M. The host does
            not see what a GPU holds: there they are clamped, so that all rows they name exist.
    """
    extents = _check(
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
        )
    try:
        targets = torch.ops.fcos_ext.assign_targets(
            boxes,
            labels,
            extents,
            [side for size in feature_sizes for side in size],
            [x for grid in _grids(strides, center_sampling_radius) for x in _numbers(grid)],
            [end for ends in size_ranges for end in ends],
            _BOUNDARIES.index(boundary),
            normalize,
            _TIES.index(ties),
        )
    except RuntimeError:
        # On the CPU the operator checks the values; asked only now, as that takes its time.
        if boxes.device.type == "cpu":
            _read_rows(boxes, extents)  # raises ValueError
        raise
    return AssignedTargets(*targets)


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
) -> AssignedTargets:
    """Same contract as :func:`assign_targets`, in plain PyTorch.

    Reads ``offsets`` or ``counts`` on the host, on any device, and raises ValueError accordingly.
    """
    extents = _check(
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
    )
    rows = _read_rows(boxes, extents)

    boxes = boxes.to(torch.float32).reshape(-1, 4)
    labels = labels.to(torch.int64).reshape(-1)
    num_locations = sum(height * width for height, width in feature_sizes)
    matched = torch.full((len(rows), num_locations), -1, dtype=torch.int64, device=boxes.device)
    ltrb = boxes.new_zeros((len(rows), num_locations, 4))
    centerness = boxes.new_zeros((len(rows), num_locations))

    start = 0
    for (height, width), grid, ends in zip(
        feature_sizes, _grids(strides, center_sampling_radius), size_ranges, strict=True
    ):
        level = slice(start, start + height * width)
        start = level.stop
        locations = _locations(height, width, grid, boxes.device)
        for image, (first, last) in enumerate(rows):
            if first == last:
                continue
            index = _match(locations, boxes[first:last], grid, ends, boundary, ties)
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


def _grids(strides: Sequence[int | Grid], radius: float) -> list[Grid]:
    """The grid of each level, with its reach."""
    grids = []
    for stride in strides:
        grid = stride
        if not isinstance(grid, Grid):
            grid = Grid(step=(grid, grid), first=(grid // 2, grid // 2), unit=grid)
        if grid.reach is None:
            grid = grid._replace(reach=radius * grid.unit if radius > 0 else math.inf)
        grids.append(grid)
    return grids


def _numbers(grid: Grid) -> tuple[float, ...]:
    """Of the operator."""
    reach = math.inf if grid.reach is None else grid.reach
    return tuple(map(float, (*grid.step, *grid.first, grid.unit, reach)))


def _locations(height: int, width: int, grid: Grid, device: torch.device) -> Tensor:
    """Image positions (x, y), float32 [height * width, 2], row by row."""
    y, x = (
        torch.arange(count, device=device, dtype=torch.float32) * step + first
        for count, step, first in zip((height, width), grid.step, grid.first, strict=True)
    )
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack((grid_x, grid_y), dim=-1).reshape(-1, 2)


def _match(
    locations: Tensor,
    boxes: Tensor,
    grid: Grid,
    size_range: tuple[float, float],
    boundary: str,
    ties: str,
) -> Tensor:
    """Index into ``boxes`` [M, 4], M > 0, for each of ``locations`` [P, 2], or -1: int64 [P]."""
    x0, y0, x1, y1 = boxes[..., None].unbind(1)  # each [M, 1]
    low, high = size_range
    area = (x1 - x0) * (y1 - y0)
    # Of an infinite area, hence of all with an infinite coordinate, the cost is above any limit.
    cost, limit = (area, math.inf) if ties == "exact" else (area - 1e8, 0.0)

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
        smallest, index = torch.where(candidate, cost, math.inf).min(dim=0)
        chunks.append(torch.where(smallest < limit, index, -1))
    return torch.cat(chunks)


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


def _check(
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
    if boundary not in _BOUNDARIES:
        raise ValueError(f"assign_targets: boundary must be one of {_BOUNDARIES}, got {boundary!r}")
    if ties not in _TIES:
        raise ValueError(f"assign_targets: ties must be one of {_TIES}, got {ties!r}")
    return extents


def _read_rows(boxes: Tensor, extents: Tensor) -> list[tuple[int, int]]:
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
            _check_grid(stride, level)
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


def _check_grid(grid: Grid, level: int) -> None:
    reach = math.inf if grid.reach is None else grid.reach
    if not (
        all(_SMALLEST <= size <= _LARGEST for size in (*grid.step, grid.unit))
        and all(abs(first) <= _LARGEST for first in grid.first)
        and reach >= 0
    ):
        raise ValueError(
            "assign_targets: a Grid must have finite steps and unit above 0, finite firsts and a "
            f"reach >= 0, got {grid} at level {level}"
        )


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
