"""assign_targets on torchvision's own anchors: the same decisions as its FCOS, to the bit.

torchvision's locations start at 0, and their distance is the padded size of the image divided by
that of the level, rounded down: at 800 x 1216 those of P7 are 114 rows and 121 columns apart.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from benchmarks.bench_assign_targets import make_boxes, torchvision_targets
from fcos_ext import Grid, assign_targets, assign_targets_ref

INF = math.inf
UNITS = (8, 16, 32, 64, 128)
RANGES = [(0.0, 64.0), (64.0, 128.0), (128.0, 256.0), (256.0, 512.0), (512.0, INF)]


def geometry(image_size: tuple[int, int]) -> tuple[list[tuple[int, int]], list[Grid], Tensor]:
    """Sizes and grids of the levels, and torchvision's anchors."""
    height, width = image_size
    sizes = [(-(-height // unit), -(-width // unit)) for unit in UNITS]
    grids = [
        Grid((height // h, width // w), (0, 0), unit)
        for (h, w), unit in zip(sizes, UNITS, strict=True)
    ]
    generator = AnchorGenerator(tuple((unit,) for unit in UNITS), ((1.0,),) * len(UNITS))
    images = ImageList(torch.empty(1, 3, height, width), [image_size])
    return sizes, grids, generator(images, [torch.empty(1, 1, h, w) for h, w in sizes])[0]


def random_boxes(count: int, image_size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Many sizes and shapes, a third of them with (nearly) the area of another box."""
    boxes = make_boxes(count, image_size, generator)
    boxes += torch.randn(count, 4, generator=generator) * 0.3
    order = torch.randperm(count, generator=generator)
    near, of = order[: count // 3], order[count // 3 : 2 * (count // 3)]
    shift = torch.randint(-30, 30, (len(near), 2), generator=generator) / 2
    nudge = torch.rand(len(near), 2, generator=generator) * 0.02
    boxes[near] = boxes[of] + torch.cat([shift, shift + nudge], dim=1)
    return boxes


@pytest.mark.parametrize("radius", [1.5, 1.3, 1e6])
@pytest.mark.parametrize("image_size", [(800, 1216), (352, 512), (97, 331)], ids=str)
def test_same_decisions(device: str, image_size: tuple[int, int], radius: float) -> None:
    sizes, grids, anchors = geometry(image_size)
    generator = torch.Generator().manual_seed(0)
    ties = 0
    for counts in ((0, 30), (90, 1)):
        images = [random_boxes(n, image_size, generator) for n in counts]
        labels = [torch.randint(80, (n,), generator=generator) for n in counts]
        truth = torchvision_targets(images, labels, anchors, [h * w for h, w in sizes], radius)
        boxes, classes = torch.cat(images).to(device), torch.cat(labels).to(device)
        offsets = torch.tensor([0, *counts], device=device).cumsum(0)
        options: dict[str, Any] = {
            "feature_sizes": sizes,
            "strides": grids,
            "size_ranges": RANGES,
            "center_sampling_radius": radius,
            "boundary": "strict",
            "normalize": True,
        }
        first = torch.tensor([0, counts[0]])[:, None]
        positive = truth[0] >= 0
        for function in (assign_targets, assign_targets_ref):
            ours = [
                t.cpu() for t in function(boxes, classes, offsets, ties="torchvision", **options)
            ]
            assert torch.equal(ours[0], truth[0])
            assert torch.equal(ours[3], torch.where(positive, truth[3] + first, -1))
            assert torch.equal(ours[1][positive], truth[1][positive])
            torch.testing.assert_close(ours[2][positive], truth[2][positive], rtol=3e-7, atol=0)
        exact = assign_targets(boxes, classes, offsets, **options)
        ties += int((exact.matched.cpu() != ours[3]).sum())
    assert ties > 0


def test_boxes_as_large_as_the_offset_never_win() -> None:
    sizes, grids, anchors = geometry((352, 512))
    for side in (9_999.0, 9_999.999, 10_000.0, 10_001.0, 20_000.0):
        box = torch.tensor([[-4800.0, -4800, side - 4800, side - 4800]])
        truth = torchvision_targets(
            [box], [torch.zeros(1).long()], anchors, [h * w for h, w in sizes]
        )
        for function in (assign_targets, assign_targets_ref):
            ours = function(
                box,
                torch.zeros(1).long(),
                torch.tensor([0, 1]),
                feature_sizes=sizes,
                strides=grids,
                size_ranges=RANGES,
                boundary="strict",
                ties="torchvision",
            )
            assert torch.equal(ours.labels, truth[0])
            assert (ours.num_pos.item() == 0) == (side >= 10_000)
