"""What assign_targets must compute, for all pairs of a location and a box, in numpy float32."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fcos_ext.assign_targets import AssignedTargets, Grid

INF = math.inf
RULES = ("inclusive", "strict", "half_open")
TIES = ("exact", "torchvision")


def numbers_of(stride: int | Grid, radius: float) -> list[float]:
    """The grid of a level as the operator takes it."""
    if isinstance(stride, Grid):
        reach, unit, steps, firsts = stride.reach, stride.unit, stride.step, stride.first
    else:
        reach, unit, steps, firsts = None, stride, (stride, stride), (stride // 2, stride // 2)
    if reach is None:
        reach = radius * unit if radius else INF
    return [float(x) for x in (*steps, *firsts, unit, reach)]


@dataclass(frozen=True)
class Case:
    """One batch: boxes of each image, and the geometry."""

    images: list[np.ndarray]
    """float32 [M, 4] of each image."""
    feature_sizes: Sequence[tuple[int, int]]
    strides: Sequence[int | Grid]
    size_ranges: Sequence[tuple[float, float]]
    radius: float = 1.5
    boundary: str = "inclusive"
    normalize: bool = False
    padded: bool = False
    ties: str = "exact"
    corners: str = "edges"
    integers: torch.dtype = torch.int64
    """dtype of labels and of offsets or counts."""
    padding: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.float32))
    """Rows after those of the longest image, of padded boxes."""

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """boxes, labels, and offsets or counts; the label of row k is k + 100."""
        counts = [len(boxes) for boxes in self.images]
        if self.padded:
            M = max(counts, default=0) + len(self.padding)
            # Rows that do not count hold boxes that would win everywhere, or NaN.
            rows = np.tile(np.float32([-1e3, -1e3, 1e3, 1e3]), (len(counts), M, 1))
            rows[:, 1::2] = np.nan
            for image, boxes in zip(rows, self.images, strict=True):
                image[: len(boxes)] = boxes
                if len(self.padding):
                    image[-len(self.padding) :] = self.padding
            boxes, extents = torch.from_numpy(rows), torch.tensor(counts)
        else:
            packed = np.concatenate([np.zeros((0, 4), np.float32), *self.images])
            boxes, extents = torch.from_numpy(packed), torch.tensor(np.cumsum([0, *counts]))
        labels = torch.arange(100, 100 + boxes[..., 0].numel()).reshape(boxes.shape[:-1])
        return boxes, labels.to(self.integers), extents.to(self.integers)

    def first_rows(self) -> list[int]:
        """Of each image, in ``matched``."""
        counts = [len(boxes) for boxes in self.images]
        if self.padded:
            return [i * (max(counts, default=0) + len(self.padding)) for i in range(len(counts))]
        return [sum(counts[:i]) for i in range(len(counts))]

    def arguments(self) -> tuple[Any, ...]:
        """Of the operator."""
        return (
            *self.tensors(),
            [side for size in self.feature_sizes for side in size],
            [x for stride in self.strides for x in numbers_of(stride, self.radius)],
            [float(end) for ends in self.size_ranges for end in ends],
            RULES.index(self.boundary),
            self.normalize,
            TIES.index(self.ties),
            self.corners == "pixels",
        )

    def options(self) -> dict[str, Any]:
        """Of the public function."""
        return {
            "feature_sizes": self.feature_sizes,
            "strides": self.strides,
            "size_ranges": self.size_ranges,
            "center_sampling_radius": self.radius,
            "boundary": self.boundary,
            "normalize": self.normalize,
            "ties": self.ties,
            "corners": self.corners,
        }


def expected(case: Case) -> AssignedTargets:
    """The truth about a case."""
    with np.errstate(all="ignore"):
        images = [
            assign_image(case, boxes, first)
            for boxes, first in zip(case.images, case.first_rows(), strict=True)
        ]
    total = sum(height * width for height, width in case.feature_sizes)
    if not images:
        images = [tuple(np.zeros((0, total, *rest), np.float32) for rest in ((4,), (), ()))]
        ltrb, centerness, matched = (torch.from_numpy(x[0]) for x in zip(*images, strict=True))
    else:
        ltrb, centerness, matched = (
            torch.from_numpy(np.stack(parts)) for parts in zip(*images, strict=True)
        )
    matched = matched.long()
    positive = matched >= 0
    labels = torch.where(positive, matched + 100, -1)
    return AssignedTargets(labels, ltrb, centerness, matched, positive.sum(1))


def assign_image(case: Case, boxes: np.ndarray, first_row: int) -> tuple[np.ndarray, ...]:
    """ltrb, centerness and matched of an image."""
    f32 = np.float32
    levels = []
    x0, y0, x1, y1 = boxes.T[:, None, :]  # each [1, M]
    end = f32(case.corners == "pixels")
    area = (x1 - x0 + end) * (y1 - y0 + end)
    # The greatest 1e8 - area that is above 0 wins, for torchvision.
    cost = area if case.ties == "exact" else -(f32(1e8) - area)
    for (height, width), stride, (low, high) in zip(
        case.feature_sizes, case.strides, case.size_ranges, strict=True
    ):
        low, high = f32(low), f32(high)
        *axes, unit, reach = (f32(x) for x in numbers_of(stride, case.radius))
        step_y, step_x, first_y, first_x = axes
        row, column = np.divmod(np.arange(height * width), width)
        x = (column.astype(f32) * step_x + first_x)[:, None]
        y = (row.astype(f32) * step_y + first_y)[:, None]
        sides = np.stack([x - x0, y - y0, x1 - x, y1 - y], axis=-1)  # [locations, M, 4]
        assert sides.dtype == f32
        candidate = (sides > 0).all(-1) & np.isfinite(area)
        candidate &= cost < (INF if case.ties == "exact" else 0)
        if reach < INF:
            candidate &= np.abs(x - (x0 + x1) / f32(2)) < reach
            candidate &= np.abs(y - (y0 + y1) / f32(2)) < reach
        longest = sides.max(-1)
        candidate &= (longest > low) if case.boundary == "strict" else (longest >= low)
        candidate &= (longest <= high) if case.boundary == "inclusive" else (longest < high)

        matched = np.full(height * width, -1)
        ltrb = np.zeros((height * width, 4), f32)
        centerness = np.zeros(height * width, f32)
        # Boxes by cost, and those of equal costs by index: the first candidate is the best.
        order = np.lexsort((np.arange(len(boxes)), cost[0]))
        candidate = candidate[:, order]
        (found,) = candidate.any(1).nonzero()
        if len(found):
            best = order[candidate[found].argmax(1)]  # of the first True
            matched[found] = first_row + best
            ltrb[found] = sides[found, best]
            l_, t_, r_, b_ = ltrb[found].T
            ratio = (np.minimum(l_, r_) / np.maximum(l_, r_)) * (
                np.minimum(t_, b_) / np.maximum(t_, b_)
            )
            centerness[found] = np.sqrt(ratio)
            if case.normalize:
                ltrb[found] /= unit
        levels.append((ltrb, centerness, matched))
    return tuple(np.concatenate(parts) for parts in zip(*levels, strict=True))


def assert_identical(actual: Sequence[Tensor], case: Case, truth: AssignedTargets | None = None):
    """Equal to the truth, every bit."""
    truth = expected(case) if truth is None else truth
    for name, ours, exact in zip(AssignedTargets._fields, actual, truth, strict=True):
        assert ours.dtype == exact.dtype, name
        assert torch.equal(ours.cpu(), exact), (name, case)


# ---- random cases -------------------------------------------------------------------------------


def random_case(rng: random.Random) -> Case:
    """Small, and full of what is rare elsewhere."""
    levels = rng.choice([1, 1, 2, 3, 5])
    strides = [rng.choice([1, 4, 5, 8]) << i for i in range(levels)]
    # More than 32 columns or 8 rows are more than one tile of the CUDA kernel.
    feature_sizes = [
        (rng.choice([1, 2, 5, 9, 17]), rng.choice([1, 3, 8, 33, 40])) for _ in range(levels)
    ]
    size_ranges = random_ranges(rng, levels)
    images = [random_boxes(rng, strides, size_ranges) for _ in range(rng.choice([0, 1, 1, 2, 3]))]
    padded = rng.random() < 0.5
    return Case(
        images=images,
        feature_sizes=feature_sizes,
        strides=[random_grid(rng, s) if rng.random() < 0.4 else s for s in strides],
        size_ranges=size_ranges,
        radius=rng.choice([0.0, 0.0, 1.5, 1.5, 1.0, 0.5, 2.25, rng.random() * 4, 1e9, INF, 1e-9]),
        boundary=rng.choice(RULES),
        normalize=rng.random() < 0.5,
        padded=padded,
        integers=rng.choice([torch.int32, torch.int64]),
        padding=np.zeros((rng.choice([0, 0, 3]), 4), np.float32),
        ties=rng.choice(TIES),
        corners=rng.choice(["edges", "pixels"]),
    )


def random_grid(rng: random.Random, stride: int) -> Grid:
    """Near the stride, so that boxes made for that are somewhere around its locations."""
    return Grid(
        step=(
            stride * rng.choice([1, 0.9, 1.1]),
            stride * rng.choice([1, 0.93, rng.random() + 0.1]),
        ),
        first=(rng.choice([0, 0.3, -7.7, 1e3]), rng.choice([0, 1.1, -40, stride / 2])),
        unit=stride * rng.choice([1, 1.3, 0.7]),
        reach=rng.choice([None, None, 1.1 * stride, INF, 0.0]),
    )


def random_ranges(rng: random.Random, levels: int) -> list[tuple[float, float]]:
    kind = rng.randrange(3)
    if kind == 0:  # those of the paper, for small images
        edges = [0, 16, 32, 64, 128][:levels] + [INF]
        return list(zip(edges[:-1], edges[1:], strict=True))
    if kind == 1:
        return [
            rng.choice([(0, INF), (-INF, INF), (8, 8), (0, 0), (-5, -1), (INF, INF), (0, 1e39)])
            for _ in range(levels)
        ]
    return [tuple(sorted((rng.uniform(0, 90), rng.uniform(0, 90)))) for _ in range(levels)]


def random_boxes(rng: random.Random, strides: Sequence[int], ranges: Any) -> np.ndarray:
    boxes: list[tuple[float, ...]] = []
    # 300 are more than the CUDA kernel takes at a time.
    for _ in range(rng.choice([0, 1, 3, 12, 40] * 8 + [300])):
        stride = rng.choice(strides)
        kind = rng.randrange(8)
        if kind == 0 and boxes:  # equal areas
            x0, y0, x1, y1 = rng.choice(boxes)
            boxes.append(rng.choice([(x0, y0, x1, y1), (x0, y0, x0 + y1 - y0, y0 + x1 - x0)]))
        elif kind == 1 and boxes:  # nested
            x0, y0, x1, y1 = rng.choice(boxes)
            margin = rng.choice([-2, -0.5, 0.25, 3])
            boxes.append((x0 - margin, y0 - margin, x1 + margin, y1 + margin))
        elif kind <= 3:  # on the grid of locations, and half-way between them
            x, y = (stride / 2 * rng.randrange(-2, 30) for _ in range(2))
            w, h = (stride / 2 * rng.randrange(0, 20) for _ in range(2))
            boxes.append((x, y, x + w, y + h))
        elif kind == 4:  # a side exactly at, or beside, an end of a range
            ends = [end for pair in ranges for end in pair if abs(end) < 1e6] or [64.0]
            x, y = (stride // 2 + stride * rng.randrange(8) for _ in range(2))
            r = np.nextafter(np.float32(x + rng.choice(ends)), np.float32(rng.choice([x, 1e9])))
            r = rng.choice([float(r), x + rng.choice(ends)])
            boxes.append((x - rng.random() * 9, y - rng.random() * 9, r, y + rng.random() * 30))
        elif kind == 5 and rng.random() < 0.2:  # too large for torchvision, or just not
            x, y = rng.uniform(-5e3, -4e3), rng.uniform(-5e3, -4e3)
            w = rng.uniform(9e3, 1.1e4)
            boxes.append((x, y, x + w, y + 1e8 / w + rng.choice([0, -1e-3, 1e-3, -0.3])))
        elif kind == 5 and rng.random() < 0.5:
            odd = [math.nan, INF, -INF, 3e38, -3e38, 1e20, -1e20, 1e-40, 0.0, 20.0, 1e7]
            boxes.append(tuple(rng.choice(odd) for _ in range(4)))
        else:
            x, y = rng.uniform(-30, 170), rng.uniform(-30, 120)
            boxes.append((x, y, x + rng.expovariate(1 / 30), y + rng.expovariate(1 / 30)))
    with np.errstate(over="ignore"):
        return np.array(boxes, np.float32).reshape(-1, 4)
