"""FCOS target assignment: which box, if any, each location of the feature pyramid predicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Boundary = Literal["inclusive", "strict", "half_open"]

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
    """int64 [N, L]: its row in ``boxes`` (counted over the whole batch), -1 background."""
    num_pos: Tensor
    """int64 [N]: locations of the image that are not background."""


def assign_targets(
    boxes: Tensor,
    labels: Tensor,
    offsets: Tensor,
    *,
    feature_sizes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    size_ranges: Sequence[tuple[float, float]],
    center_sampling_radius: float = 1.5,
    boundary: Boundary = "inclusive",
    normalize: bool = False,
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
    one that comes first. Locations without a candidate are background. Source: arXiv 1904.01355,
    sections 3.1 to 3.3; rule 2 is the center sampling that its authors added later.

    Everything is computed in float32, each operation rounded as written here; ``radius s`` and the
    ranges are rounded to float32 too. centerness = sqrt((min(l, r) / max(l, r)) (min(t, b) /
    max(t, b))), of the distances in pixels.

    A box never matches if one of its sides is not above 0, or if a coordinate, a side or its area
    is not finite in float32. Images without boxes are ordinary: all background.

    Args:
        boxes (Tensor[K, 4]): x0, y0, x1, y1 in pixels of all images one after the other; any
            floating dtype.
        labels (Tensor[K]): class of each box, int32 or int64. Must be >= 0: the output's -1 means
            background, and ignored boxes are not known here.
        offsets (Tensor[N + 1]): int32 or int64; image i owns the boxes offsets[i] up to
            offsets[i + 1].
        feature_sizes: (height, width) of each level, in locations.
        strides: of each level, in pixels.
        size_ranges: (low, high) of each level, in pixels; ``math.inf`` is a legal bound.
        center_sampling_radius: in strides; 0 makes the whole box positive.
        boundary: which ends belong to a size range, see above.
        normalize: divide ``ltrb`` by the stride of the level.

    Returns:
        AssignedTargets: see there; nothing is differentiable.

    Raises:
        TypeError: a tensor has the wrong kind of dtype.
        ValueError: shapes, devices or lengths do not agree, ``offsets`` do not partition the
            boxes, or an option is out of its range.
    """
    return assign_targets_ref(
        boxes,
        labels,
        offsets,
        feature_sizes=feature_sizes,
        strides=strides,
        size_ranges=size_ranges,
        center_sampling_radius=center_sampling_radius,
        boundary=boundary,
        normalize=normalize,
    )


@torch.no_grad()
def assign_targets_ref(
    boxes: Tensor,
    labels: Tensor,
    offsets: Tensor,
    *,
    feature_sizes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    size_ranges: Sequence[tuple[float, float]],
    center_sampling_radius: float = 1.5,
    boundary: Boundary = "inclusive",
    normalize: bool = False,
) -> AssignedTargets:
    """Same contract as :func:`assign_targets`, in plain PyTorch; reads ``offsets`` on the host."""
    _check_tensors(boxes, labels, offsets)
    _check_levels(feature_sizes, strides, size_ranges)
    if not center_sampling_radius >= 0:
        raise ValueError(
            f"assign_targets: center_sampling_radius must be >= 0, got {center_sampling_radius}"
        )
    if boundary not in get_args(Boundary):
        raise ValueError(
            f"assign_targets: boundary must be one of {get_args(Boundary)}, got {boundary!r}"
        )
    bounds = _read_offsets(offsets, len(boxes))

    boxes = boxes.to(torch.float32)
    images = list(zip(bounds[:-1], bounds[1:], strict=True))
    num_locations = sum(height * width for height, width in feature_sizes)
    matched = torch.full((len(images), num_locations), -1, dtype=torch.int64, device=boxes.device)
    ltrb = boxes.new_zeros((len(images), num_locations, 4))
    centerness = boxes.new_zeros((len(images), num_locations))

    start = 0
    for (height, width), stride, (low, high) in zip(
        feature_sizes, strides, size_ranges, strict=True
    ):
        level = slice(start, start + height * width)
        start = level.stop
        locations = _locations(height, width, stride, boxes.device)
        radius = center_sampling_radius * stride
        for image, (first, last) in enumerate(images):
            if first == last:
                continue
            index = _match(locations, boxes[first:last], radius, low, high, boundary)
            positive = index >= 0
            # Background rows borrow box `first` here and are overwritten with zeros below.
            distances = _distances(locations, boxes[first + index.clamp(min=0)])
            matched[image, level] = torch.where(positive, first + index, -1)
            centerness[image, level] = torch.where(positive, _centerness(distances), 0.0)
            if normalize:
                distances = distances / stride
            ltrb[image, level] = torch.where(positive[:, None], distances, 0.0)

    positive = matched >= 0
    assigned = torch.full_like(matched, -1)
    if len(boxes):
        assigned = torch.where(positive, labels.to(torch.int64)[matched.clamp(min=0)], -1)
    return AssignedTargets(assigned, ltrb, centerness, matched, positive.sum(dim=1))


def _locations(height: int, width: int, stride: int, device: torch.device) -> Tensor:
    """Image positions (x, y), float32 [height * width, 2], row by row."""
    first = stride // 2
    x = torch.arange(width, device=device, dtype=torch.float32) * stride + first
    y = torch.arange(height, device=device, dtype=torch.float32) * stride + first
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack((grid_x, grid_y), dim=-1).reshape(-1, 2)


def _match(
    locations: Tensor, boxes: Tensor, radius: float, low: float, high: float, boundary: str
) -> Tensor:
    """Index into ``boxes`` [M, 4], M > 0, for each of ``locations`` [P, 2], or -1: int64 [P]."""
    x0, y0, x1, y1 = boxes[..., None].unbind(1)  # each [M, 1]
    area = (x1 - x0) * (y1 - y0)

    chunks = []
    for x, y in locations.t().split(max(1, _MAX_PAIRS // len(boxes)), dim=1):
        left, top, right, bottom = x - x0, y - y0, x1 - x, y1 - y  # each [M, chunk]
        nearest = torch.minimum(torch.minimum(left, right), torch.minimum(top, bottom))
        size = torch.maximum(torch.maximum(left, right), torch.maximum(top, bottom))
        # Nothing is strictly inside a box with a NaN or with a side that is not above 0.
        candidate = nearest > 0
        if radius > 0:
            candidate &= (x - (x0 + x1) / 2).abs() < radius
            candidate &= (y - (y0 + y1) / 2).abs() < radius
        candidate &= (size > low) if boundary == "strict" else (size >= low)
        candidate &= (size <= high) if boundary == "inclusive" else (size < high)
        # torch.min documents that the first of equal minima is returned: the lower box index.
        smallest, index = torch.where(candidate, area, math.inf).min(dim=0)
        # Also leaves out the boxes with an infinite area, hence all with an infinite coordinate.
        chunks.append(torch.where(smallest < math.inf, index, -1))
    return torch.cat(chunks)


def _distances(locations: Tensor, boxes: Tensor) -> Tensor:
    """l, t, r, b [P, 4] from ``locations`` [P, 2] to the sides of the box of each, [P, 4]."""
    return torch.cat((locations - boxes[:, :2], boxes[:, 2:] - locations), dim=1)


def _centerness(ltrb: Tensor) -> Tensor:
    """Equation 3 of arXiv 1904.01355, [...] of distances [..., 4]."""
    l_, t_, r_, b_ = ltrb.unbind(-1)
    horizontal = torch.minimum(l_, r_) / torch.maximum(l_, r_)
    vertical = torch.minimum(t_, b_) / torch.maximum(t_, b_)
    return torch.sqrt(horizontal * vertical)


def _check_tensors(boxes: Tensor, labels: Tensor, offsets: Tensor) -> None:
    if not boxes.is_floating_point():
        raise TypeError(f"assign_targets: boxes must be floating point, got {boxes.dtype}")
    for name, tensor in (("labels", labels), ("offsets", offsets)):
        if tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"assign_targets: {name} must be int32 or int64, got {tensor.dtype}")
        if tensor.device != boxes.device:
            raise ValueError(
                f"assign_targets: {name} must be on the device of boxes, {boxes.device}, "
                f"got {tensor.device}"
            )
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"assign_targets: boxes must have shape [K, 4], got {list(boxes.shape)}")
    if labels.shape != boxes.shape[:1]:
        raise ValueError(
            f"assign_targets: labels must have shape [K] with K = {len(boxes)} boxes, "
            f"got {list(labels.shape)}"
        )
    if offsets.dim() != 1 or len(offsets) == 0:
        raise ValueError(
            f"assign_targets: offsets must have shape [N + 1], got {list(offsets.shape)}"
        )


def _read_offsets(offsets: Tensor, num_boxes: int) -> list[int]:
    """``offsets`` as a list, checked."""
    bounds: list[int] = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != num_boxes:
        raise ValueError(
            f"assign_targets: offsets must start at 0 and end at the number of boxes, {num_boxes}, "
            f"got {bounds[0]} and {bounds[-1]}"
        )
    for i, (first, last) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        if first > last:
            raise ValueError(
                f"assign_targets: offsets must not decrease, got {first} then {last} at image {i}"
            )
    return bounds


def _check_levels(
    feature_sizes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    size_ranges: Sequence[tuple[float, float]],
) -> None:
    if not 0 < len(strides) == len(feature_sizes) == len(size_ranges):
        raise ValueError(
            "assign_targets: feature_sizes, strides and size_ranges must have one entry for each "
            f"level, got {len(feature_sizes)}, {len(strides)} and {len(size_ranges)}"
        )
    for level, (height, width) in enumerate(feature_sizes):
        if height < 1 or width < 1:
            raise ValueError(
                "assign_targets: feature_sizes must be (height, width) of at least 1, "
                f"got {(height, width)} at level {level}"
            )
    for level, stride in enumerate(strides):
        if stride < 1 or stride != int(stride):
            raise ValueError(
                f"assign_targets: strides must be whole numbers >= 1, got {stride} at level {level}"
            )
    for level, (low, high) in enumerate(size_ranges):
        if not low <= high:
            raise ValueError(
                "assign_targets: size_ranges must be (low, high) with low <= high, "
                f"got {(low, high)} at level {level}"
            )
