"""Targets of a batch of two images, 22,400 locations each, with M boxes an image.

    python -m benchmarks.bench_assign_targets [--quick] [--device cuda] [--output FILE]

Compared are what one would use instead: torchvision's assignment, detectron2's where it is
installed, and our reference in eager mode.
torchvision's is its own ``FCOS.compute_loss``, which ends where the losses would begin. It keeps
all pairs of a location and a box, of which there are too many for it at 5,000 boxes an image.

With the environment variable FCOS_COCO_BOXES, a JSON of COCO's annotations, there are also batches
of its images, each with the boxes that it has.

The label of a box is its number in the image, so that the labels tell which box was assigned.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import random
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import FCOS
from torchvision.models.detection._utils import BoxLinearCoder

from fcos_ext import assign_targets, assign_targets_ref

from . import others, shapes
from .harness import OURS, Case, Results, main

OP = "assign_targets"
BOXES_PER_IMAGE = (0, 8, 50, 500, 5000)
TORCHVISION_MAX = 500
COCO_BATCHES = (1, 2, 8, 16, 32)
#: The ranges of the paper, which torchvision has too: 4 to 8 strides.
SIZE_RANGES = ((0, 64), (64, 128), (128, 256), (256, 512), (512, math.inf))


def make_boxes(count: int, image_size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """float32 [count, 4], of the sizes and shapes of COCO's at this scale.

    The square root of the area has median 104 pixels, and log-normal deviations of 1.07; that of
    the ratio of width and height is 0.74. Sides are multiples of 4 and no two areas are the same:
    torchvision cannot tell areas apart that are closer than 8.
    """
    height, width = image_size
    pool = 16 * count + 64
    scale = 4.64 + 1.07 * torch.randn(pool, generator=generator)
    shape = 0.37 * torch.randn(pool, generator=generator)
    sides = torch.stack([scale + shape, scale - shape], dim=1).exp()
    sides = sides.div(4).round().mul(4).clamp(min=4)
    sides = sides[(sides[:, 0] <= width) & (sides[:, 1] <= height)]
    seen: dict[float, int] = {}
    for index, area in enumerate(sides.prod(1).tolist()):
        seen.setdefault(area, index)
    sides = sides[list(seen.values())[:count]]
    assert len(sides) == count
    free = torch.tensor([width, height]) - sides
    corner = (torch.rand(count, 2, generator=generator) * free).mul(4).round().div(4)
    return torch.cat([corner, corner + sides], dim=1)


@functools.cache
def coco_boxes(annotations: Path) -> list[Tensor]:
    """float32 [M, 4] of each wide image, as it is resized for training: to 800 x up to 1333."""
    content = json.loads(annotations.read_text())
    rows = defaultdict(list)
    for annotation in content["annotations"]:
        if not annotation["iscrowd"]:
            rows[annotation["image_id"]].append(annotation["bbox"])
    boxes = []
    for image in content["images"]:
        if image["width"] < image["height"]:
            continue
        scale = min(800 / image["height"], 1333 / image["width"])
        xywh = torch.tensor(rows[image["id"]], dtype=torch.float32).view(-1, 4) * scale
        boxes.append(torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1))
    return boxes


def feature_sizes(image_size: tuple[int, int]) -> list[tuple[int, int]]:
    height, width = image_size
    return [(-(-height // stride), -(-width // stride)) for stride in shapes.STRIDES]


# ---- torchvision --------------------------------------------------------------------------------


def torchvision_anchors(sizes: Sequence[tuple[int, int]]) -> tuple[Tensor, list[int]]:
    """A square of one stride around each of our locations, and their number in each level."""
    levels = []
    for (height, width), stride in zip(sizes, shapes.STRIDES, strict=True):
        y, x = (torch.arange(n) * stride + stride // 2 for n in (height, width))
        centers = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 2)
        levels.append(torch.cat([centers - stride / 2, centers + stride / 2], dim=1))
    return torch.cat(levels), [len(level) for level in levels]


class TargetsOnly:
    """In the place of torchvision's head: makes the targets that its loss makes, and no loss."""

    box_coder = BoxLinearCoder(normalize_by_size=True)

    def compute_loss(
        self, targets: list[dict[str, Tensor]], _: Any, anchors: list[Tensor], matched: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """labels, ltrb, centerness and the matches within each image, all [N, L, ...]."""
        labels, boxes = [], []
        for target, index in zip(targets, matched, strict=True):
            if len(target["labels"]) == 0:
                labels.append(index)
                boxes.append(index.new_zeros((len(index), 4), dtype=torch.float32))
                continue
            rows = index.clip(min=0)
            classes = target["labels"][rows]
            classes[index < 0] = -1
            labels.append(classes)
            boxes.append(target["boxes"][rows])
        ltrb = self.box_coder.encode(torch.stack(anchors), torch.stack(boxes))
        horizontal, vertical = ltrb[..., [0, 2]], ltrb[..., [1, 3]]
        centerness = torch.sqrt(
            (horizontal.min(dim=-1)[0] / horizontal.max(dim=-1)[0])
            * (vertical.min(dim=-1)[0] / vertical.max(dim=-1)[0])
        )
        return torch.stack(labels), ltrb, centerness, torch.stack(matched)


def torchvision_targets(
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    anchors: Tensor,
    locations_per_level: list[int],
    center_sampling_radius: float = 1.5,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """labels, ltrb and centerness (both of any value at background), matches in the image."""
    targets = [{"boxes": b, "labels": c} for b, c in zip(boxes, labels, strict=True)]
    model = SimpleNamespace(center_sampling_radius=center_sampling_radius, head=TargetsOnly())
    return FCOS.compute_loss(model, targets, {}, [anchors] * len(boxes), locations_per_level)


# ---- cases --------------------------------------------------------------------------------------


def cases(device: torch.device, quick: bool = False) -> Sequence[Case]:
    images = 2 if device.type == "cpu" else 16
    threads = [None] if device.type == "cuda" else [1] if quick else [1, 2]
    counts = (0, 8) if quick else BOXES_PER_IMAGE
    image_size = (128, 160) if quick else shapes.IMAGE_SIZE
    result = [
        make_case(device, images, image_size, M, number)
        for number, M in itertools.product(threads, counts)
    ]
    if coco := os.environ.get("FCOS_COCO_BOXES"):
        result += [
            make_case(device, batch, shapes.IMAGE_SIZE, Path(coco), number)
            for number, batch in itertools.product(threads, COCO_BATCHES)
        ]
    return result


def make_case(
    device: torch.device,
    images: int,
    image_size: tuple[int, int],
    M: int | Path,
    threads: int | None,
) -> Case:
    """Of M boxes an image, or of those of COCO's annotations."""
    sizes = feature_sizes(image_size)
    anchors, locations_per_level = torchvision_anchors(sizes)
    options: dict[str, Any] = {
        "feature_sizes": sizes,
        "strides": shapes.STRIDES,
        "size_ranges": SIZE_RANGES,
        "boundary": "strict",
        "normalize": True,
    }

    def make_inputs(seed: int) -> tuple[Any, ...]:
        if isinstance(M, int):
            generator = torch.Generator().manual_seed(seed)
            boxes = [make_boxes(M, image_size, generator).to(device) for _ in range(images)]
        else:
            boxes = random.Random(seed).sample(coco_boxes(M), images)
            boxes = [each.to(device) for each in boxes]
        labels = [torch.arange(len(each), device=device) for each in boxes]
        counts = torch.tensor([0, *(len(each) for each in boxes)], device=device)
        packed = (torch.cat(boxes), torch.cat(labels), counts.cumsum(0))
        # As torchvision's users have them: a list for each image.
        return *packed, anchors.to(device), boxes, labels

    def ours(boxes: Tensor, labels: Tensor, offsets: Tensor, *_: Any) -> Results:
        return (assign_targets(boxes, labels, offsets, **options).labels,)

    def reference(boxes: Tensor, labels: Tensor, offsets: Tensor, *_: Any) -> Results:
        return (assign_targets_ref(boxes, labels, offsets, **options).labels,)

    def torchvision(_: Tensor, __: Tensor, ___: Tensor, anchors: Tensor, *split: Any) -> Results:
        return (torchvision_targets(*split, anchors, locations_per_level)[0],)

    def truth(*inputs: Any) -> Results:
        return tuple(labels.double() for labels in reference(*inputs))

    def truth_of_torchvision(boxes: Tensor, labels: Tensor, offsets: Tensor, *_: Any) -> Results:
        """Real boxes have areas that it cannot tell apart."""
        targets = assign_targets_ref(boxes, labels, offsets, ties="torchvision", **options)
        return (targets.labels.double(),)

    locations = sum(locations_per_level)
    of_coco = isinstance(M, Path)
    count = sum(map(len, coco_boxes(M))) / len(coco_boxes(M)) if isinstance(M, Path) else M
    settings: dict[str, object] = {
        "boxes": "COCO" if of_coco else M,
        "shape": [images, locations],
        "dtype": "float32",
    }
    if threads is not None:
        settings["threads"] = threads
    providers = {OURS: ours, "reference, eager": reference}
    if count <= TORCHVISION_MAX:
        providers["torchvision"] = torchvision
    if isinstance(M, int) and M <= TORCHVISION_MAX:
        providers |= others.assignments(images, M, locations_per_level)
    return Case(
        settings=settings,
        device=device,
        make_inputs=make_inputs,
        providers=providers,
        reference=truth,
        tolerance=0.0,
        # labels and matches, centerness, distances
        bytes_moved=round(images * (locations * (8 + 8 + 4 + 16) + count * (16 + 8))),
        environment="FCOS_COCO_BOXES=instances_val2017.json" if of_coco else "",
        own_reference={"torchvision": truth_of_torchvision} if of_coco else {},
    )


if __name__ == "__main__":
    sys.exit(main(OP, cases))
