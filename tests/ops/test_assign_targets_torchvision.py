"""assign_targets against the assignment of torchvision's FCOS, where both mean the same.

torchvision's ranges are strict, and its locations are the centres of anchors, which are put where
ours are. The one difference is documented by a test: it compares areas as 1e8 - area in float32,
which takes those for equal that are closer than 8 square pixels.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import bench_assign_targets, shapes
from benchmarks.bench_assign_targets import torchvision_anchors, torchvision_targets
from fcos_ext import AssignedTargets, assign_targets

IMAGE_SIZE = (480, 640)
SIZES = bench_assign_targets.feature_sizes(IMAGE_SIZE)
ANCHORS, LOCATIONS_PER_LEVEL = torchvision_anchors(SIZES)


def ours(images: list[Tensor], labels: list[Tensor], radius: float = 1.5) -> AssignedTargets:
    counts = torch.tensor([0, *map(len, images)])
    return assign_targets(
        torch.cat(images),
        torch.cat(labels),
        counts.cumsum(0),
        feature_sizes=SIZES,
        strides=shapes.STRIDES,
        size_ranges=bench_assign_targets.SIZE_RANGES,
        center_sampling_radius=radius,
        boundary="strict",
        normalize=True,
    )


def theirs(images: list[Tensor], labels: list[Tensor], radius: float = 1.5) -> tuple[Tensor, ...]:
    return torchvision_targets(images, labels, ANCHORS, LOCATIONS_PER_LEVEL, radius)


@pytest.mark.parametrize("radius", [1.0, 1.5, 2.5, 1e6])
@pytest.mark.parametrize("counts", [(8, 50), (0, 200), (0, 0)], ids=str)
def test_same_targets(counts: tuple[int, ...], radius: float) -> None:
    generator = torch.Generator().manual_seed(0)
    images = [bench_assign_targets.make_boxes(n, IMAGE_SIZE, generator) for n in counts]
    labels = [torch.randint(80, (n,), generator=generator) for n in counts]
    actual, truth = ours(images, labels, radius), theirs(images, labels, radius)
    assert torch.equal(actual.labels, truth[0])
    positive = truth[0] >= 0
    assert torch.equal(actual.num_pos, positive.sum(1))
    assert positive.any() or sum(counts) == 0
    # Their rows are those of the image.
    first = torch.tensor([0, counts[0]])[:, None]
    assert torch.equal(actual.matched, torch.where(positive, truth[3] + first, -1))
    assert torch.equal(actual.ltrb[positive], truth[1][positive])
    torch.testing.assert_close(actual.centerness[positive], truth[2][positive], rtol=3e-7, atol=0)


@pytest.mark.parametrize("longest, level", [(60, 0), (64, None), (68, 1), (128, None), (600, 4)])
def test_ends_of_ranges_belong_to_no_level(longest: float, level: int | None) -> None:
    """A box around a location that all levels share, and nearest to its left, top and bottom."""
    x = y = 64 + 256
    boxes = [torch.tensor([[x - 4.0, y - 4.0, x + longest, y + 4.0]])]
    labels = [torch.zeros(1).long()]
    actual, truth = ours(boxes, labels, math.inf), theirs(boxes, labels, math.inf)
    assert torch.equal(actual.labels, truth[0])
    at = (ANCHORS[:, :2] + ANCHORS[:, 2:]).div(2).eq(torch.tensor([x, y])).all(1)
    found: Any = [k for k, part in enumerate(split(actual.labels[0], at)) if part.ge(0).any()]
    assert level is None or found in ([], [level])
    assert level is not None or found == []


def split(labels: Tensor, at: Tensor) -> list[Tensor]:
    """What is at one location, level by level."""
    levels = labels.split(LOCATIONS_PER_LEVEL), at.split(LOCATIONS_PER_LEVEL)
    return [part[here] for part, here in zip(*levels, strict=True)]


def test_close_areas_are_a_tie_for_torchvision() -> None:
    """Here the smaller box wins whatever its place; there, the place decides."""
    small, large = [101.0, 101, 201, 201], [101.0, 101, 201, 201.02]  # 10,000 and 10,002
    winners = []
    for order in ([small, large], [large, small]):
        boxes, labels = [torch.tensor(order)], [torch.arange(2)]
        won = ours(boxes, labels).labels.max().item()
        assert order[won] == small
        winners.append(theirs(boxes, labels)[0].max().item())
    assert winners[0] == winners[1]
