"""What each code base makes of the boxes of a file, for test_dialect_losses.py."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision import tv_tensors

from fcos.config import Config
from fcos.data.batches import Batch, Sample, collate
from fcos.data.transforms import train_transforms

CLASSES = 4
FILES = ((75, 100), (96, 64))
SHORTER = 150
RANGES = ((-1, 64), (64, 128), (128, 256), (256, 512), (512, 1e8))
Box = list[float]


class Truth(NamedTuple):
    """A picture's boxes, as x, y, width, height in the file."""

    size: tuple[int, int]
    xywh: Tensor
    labels: Tensor


def make_truths(seed: int) -> list[Truth]:
    """Many boxes within boxes, two of them of nearly the same area, and one at the end of the range
    of a level; and an image without any."""
    generator = torch.Generator().manual_seed(seed)

    def whole(low: int, high: int, count: int) -> Tensor:
        return torch.randint(low, high, (count,), generator=generator).float()

    truths = []
    for height, width in FILES:
        n = 14
        x, y = whole(0, width - 40, n), whole(0, height - 40, n)
        w, h = whole(6, 40, n), whole(6, 40, n)
        x[:2], y[:2], w[:2], h[:2] = 5.0, 9.0, 30.0, 24.0
        w[1] -= 0.05
        if width == 100:  # at twice the size, 64 pixels to both sides of a location of P3
            x[2], y[2], w[2], h[2] = 30.0, 35.0, 64.0, 30.0
        labels = torch.randint(CLASSES, (n,), generator=generator)
        truths.append(Truth((height, width), torch.stack([x, y, w, h], dim=1), labels))
    return [*truths, Truth((80, 100), torch.zeros(0, 4), torch.zeros(0).long())]


def make_batch(config: Config, truths: list[Truth]) -> Batch:
    """As training makes it, every picture flipped."""
    data = replace(config.data, min_sizes=(SHORTER,), max_size=260, flip_probability=1.0)
    transforms = train_transforms(data, config.model.corners)
    samples = []
    for i, (size, xywh, labels) in enumerate(truths):
        boxes = torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1)
        image = tv_tensors.Image(torch.zeros(3, *size, dtype=torch.uint8))
        truth = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size)
        image, target = transforms(image, {"boxes": truth, "labels": labels})
        boxes = target["boxes"].as_subclass(Tensor)
        samples.append(Sample(image.as_subclass(Tensor), boxes, target["labels"], i, size))
    return collate(samples, padding=data.padding)


# ---- what a location learns ----------------------------------------------------------------------


class Rules(NamedTuple):
    """In which the code bases differ."""

    one: int = 0  # the last pixel of a box is x + width - one
    radius: float = 1.5
    strict: bool = False  # detectron2's and torchvision's: ranges without ends, ties by subtraction
    from_zero: bool = False  # torchvision's locations
    in_strides: bool = True


class Targets(NamedTuple):
    """Of all images, levels and locations, in this order."""

    labels: Tensor
    ltrb: Tensor
    centerness: Tensor


def boxes_of(truth: Truth, batch: Batch, image: int, one: int) -> Tensor:
    """xyxy in the pixels of the flipped, resized picture, to whose size all scale."""
    height, width = batch.image_sizes[image].tolist()
    x, y, w, h = truth.xywh.t()
    boxes = torch.stack([x, y, x + w - one, y + h - one], dim=1)
    ratio = torch.tensor([width / truth.size[1], height / truth.size[0]]).repeat(2)
    x0, y0, x1, y1 = (boxes * ratio).t()
    return torch.stack([width - x1 - one, y0, width - x0 - one, y1], dim=1)


def targets_of(
    truths: list[Truth], batch: Batch, strides: tuple[int, ...], rules: Rules
) -> Targets:
    rows: list[tuple[int, list[float], float]] = []
    padded = batch.images.shape[2:]
    for image, truth in enumerate(truths):
        boxes = boxes_of(truth, batch, image, rules.one)
        sides = boxes[:, 2:] - boxes[:, :2] + rules.one
        area = sides[:, 0] * sides[:, 1]
        # The greatest of 1e8 - area, in float32, above 0; or the smallest area below 1e8.
        costs = (area - 1e8 if rules.strict else area).tolist()
        limit = 0.0 if rules.strict else 1e8
        for stride, (low, high) in zip(strides, ranges(len(strides)), strict=True):
            grid = -(-padded[0] // stride), -(-padded[1] // stride)
            step = (
                (padded[0] // grid[0], padded[1] // grid[1]) if rules.from_zero else (stride,) * 2
            )
            first = 0 if rules.from_zero else stride // 2
            for y in range(grid[0]):
                for x in range(grid[1]):
                    px, py = float(first + x * step[1]), float(first + y * step[0])
                    candidates = [
                        (cost, i)
                        for i, (box, cost) in enumerate(zip(boxes.tolist(), costs, strict=True))
                        if cost < limit and learns(px, py, box, (low, high), stride, rules)
                    ]
                    if not candidates:
                        rows.append((-1, [0.0] * 4, 0.0))
                        continue
                    found = min(candidates)[1]
                    ltrb = distances(px, py, boxes[found].tolist())
                    left, top, right, bottom = ltrb
                    horizontal = min(left, right) / max(left, right)
                    quality = math.sqrt(horizontal * min(top, bottom) / max(top, bottom))
                    unit = stride if rules.in_strides else 1
                    rows.append((int(truth.labels[found]), [d / unit for d in ltrb], quality))
    labels, ltrbs, centerness = zip(*rows, strict=True)
    return Targets(*map(torch.tensor, (labels, ltrbs, centerness)))


def ranges(levels: int) -> tuple[tuple[float, float], ...]:
    """The last level, whichever it is, learns all that is larger."""
    return (*RANGES[: levels - 1], (RANGES[levels - 1][0], 1e8))


def distances(px: float, py: float, box: Box) -> list[float]:
    return [px - box[0], py - box[1], box[2] - px, box[3] - py]


def learns(
    px: float, py: float, box: Box, ends: tuple[float, float], stride: int, rules: Rules
) -> bool:
    ltrb = distances(px, py, box)
    inside = min(ltrb) > 0
    if rules.radius:
        away = max(abs(px - (box[0] + box[2]) / 2), abs(py - (box[1] + box[3]) / 2))
        inside = inside and away < rules.radius * stride
    if rules.strict:
        return inside and ends[0] < max(ltrb) < ends[1]
    return inside and ends[0] <= max(ltrb) <= ends[1]
