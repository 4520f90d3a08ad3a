"""From outputs to boxes as each code base does it, step by step, for test_dialect_postprocess.py.

Slow, plain PyTorch for one image, written from a description of that code base's rules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fcos.model import Predictions

PADDED = (160, 192)
IMAGES = ((150, 170), (160, 121))  # as the network sees them
FILES = ((301, 339), (107, 81))
CLASSES, TOPK, KEEP = 3, 30, 100


class Level(NamedTuple):
    """The outputs of one image, [locations, ...], row by row."""

    stride: int
    grid: tuple[int, int]
    cls: Tensor
    ltrb: Tensor
    centerness: Tensor


class Found(NamedTuple):
    boxes: Tensor
    """xyxy, as the code base keeps them."""
    scores: Tensor
    labels: Tensor


def levels_of(predictions: Predictions, strides: tuple[int, ...], image: int) -> list[Level]:
    return [
        Level(
            stride,
            (logits.shape[2], logits.shape[3]),
            logits[image].flatten(1).t().sigmoid(),
            ltrb[image].flatten(1).t(),
            centerness[image].flatten().sigmoid(),
        )
        for stride, logits, ltrb, centerness in zip(strides, *predictions, strict=True)
    ]


def locations(level: Level, step: tuple[int, int], first: int) -> Tensor:
    rows, columns = level.grid
    return torch.tensor(
        [(first + x * step[1], first + y * step[0]) for y in range(rows) for x in range(columns)],
        dtype=torch.float32,
    )


def best(level: Level, keys: Tensor, passes: Tensor) -> tuple[Tensor, Tensor]:
    """Locations and classes of the best pairs that pass."""
    pairs = passes.nonzero()
    order = keys[passes].sort(descending=True).indices[:TOPK]
    return pairs[order].unbind(1)


def decoded(centers: Tensor, ltrb: Tensor) -> Tensor:
    return torch.cat([centers - ltrb[:, :2], centers + ltrb[:, 2:]], dim=1)


def clipped(boxes: Tensor, width: float, height: float) -> Tensor:
    return torch.stack([boxes[:, i].clamp(0, (width, height)[i % 2]) for i in range(4)], dim=1)


def suppressed(found: Found, threshold: float, one: int = 0) -> Found:
    """Greedy, class by class; ``one`` is added to sides."""
    boxes, scores, labels = found
    width, height = (boxes[:, 2:] - boxes[:, :2] + one).unbind(1)
    kept: list[int] = []
    for i in scores.argsort(descending=True).tolist():
        for j in kept:
            low = torch.maximum(boxes[i, :2], boxes[j, :2])
            high = torch.minimum(boxes[i, 2:], boxes[j, 2:])
            common = (high - low + one).clamp(min=0).prod()
            union = width[i] * height[i] + width[j] * height[j] - common
            if labels[i] == labels[j] and common / union > threshold:
                break
        else:
            kept.append(i)
    kept = kept[:KEEP]
    return Found(boxes[kept], scores[kept], labels[kept])


def scaled(boxes: Tensor, image: int) -> Tensor:
    (height, width), (to_height, to_width) = IMAGES[image], FILES[image]
    x, y = to_width / width, to_height / height
    return boxes * torch.tensor([x, y, x, y])


def joined(parts: list[tuple[Tensor, Tensor, Tensor]]) -> Found:
    return Found(*(torch.cat(each) for each in zip(*parts, strict=True)))


def to_xywh(boxes: Tensor, one: int) -> Tensor:
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2] + one], dim=1)


def after_rescaling(found: Found, image: int) -> Found:
    """detectron2's last step: scale, cut off, and drop what is empty."""
    boxes = clipped(scaled(found.boxes, image), FILES[image][1], FILES[image][0])
    full = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    return Found(boxes[full], found.scores[full], found.labels[full])


# ---- the code bases: levels and number of an image to x, y, width, height, scores, labels --------

Replay = Callable[[list[Level], int], Found]


def maskrcnn_benchmark(levels: list[Level], image: int, normalized: bool, one_in_nms: int) -> Found:
    """tianzhi0549/FCOS, and rosinality/fcos-pytorch, whose NMS is torchvision's."""
    height, width = IMAGES[image]
    parts = []
    for level in levels:
        stride = level.stride
        score = level.cls * level.centerness[:, None]
        place, label = best(level, score, level.cls > 0.05)
        ltrb = level.ltrb[place] * (stride if normalized else 1)
        centers = locations(level, (stride, stride), stride // 2)[place]
        boxes = clipped(decoded(centers, ltrb), width - 1, height - 1)
        sides = boxes[:, 2:] - boxes[:, :2] + 1
        assert (sides >= 0).all()  # of at least its min_size, which is 0
        parts.append((boxes, score[place, label].sqrt(), label))
    found = suppressed(joined(parts), 0.6, one_in_nms)
    return found._replace(boxes=to_xywh(scaled(found.boxes, image), 1))


def original(levels: list[Level], image: int) -> Found:
    return maskrcnn_benchmark(levels, image, normalized=False, one_in_nms=1)


def original_imprv(levels: list[Level], image: int) -> Found:
    return maskrcnn_benchmark(levels, image, normalized=True, one_in_nms=1)


def rosinality(levels: list[Level], image: int) -> Found:
    return maskrcnn_benchmark(levels, image, normalized=False, one_in_nms=0)


def adelaidet(levels: list[Level], image: int) -> Found:
    parts = []
    for level in levels:
        stride = level.stride
        score = level.cls * level.centerness[:, None]
        place, label = best(level, score, level.cls > 0.05)
        centers = locations(level, (stride, stride), stride // 2)[place]
        boxes = decoded(centers, level.ltrb[place] * stride)
        parts.append((boxes, score[place, label].sqrt(), label))
    found = after_rescaling(suppressed(joined(parts), 0.6), image)
    return found._replace(boxes=to_xywh(found.boxes, 0))


def detectron2(levels: list[Level], image: int) -> Found:
    parts = []
    for level in levels:
        stride = level.stride
        score = (level.cls * level.centerness[:, None]).sqrt()
        place, label = best(level, score, score > 0.2)
        anchors = locations(level, (stride, stride), 0) + 0.5 * stride
        boxes = decoded(anchors[place], level.ltrb[place].relu() * stride)
        parts.append((boxes, score[place, label], label))
    found = after_rescaling(suppressed(joined(parts), 0.6), image)
    return found._replace(boxes=to_xywh(found.boxes, 0))


def torchvision(levels: list[Level], image: int) -> Found:
    height, width = IMAGES[image]
    parts = []
    for level in levels:
        score = (level.cls * level.centerness[:, None]).sqrt()
        place, label = best(level, score, score > 0.2)
        step = PADDED[0] // level.grid[0], PADDED[1] // level.grid[1]
        boxes = decoded(locations(level, step, 0)[place], level.ltrb[place] * level.stride)
        parts.append((clipped(boxes, width, height), score[place, label], label))
    found = suppressed(joined(parts), 0.6)
    return found._replace(boxes=to_xywh(scaled(found.boxes, image), 0))


def mmdetection(levels: list[Level], image: int, normalized: bool, threshold: float) -> Found:
    height, width = IMAGES[image]
    parts = []
    for level in levels:
        stride = level.stride
        place, label = best(level, level.cls, level.cls > 0.05)
        ltrb = level.ltrb[place] * (stride if normalized else 1)
        centers = locations(level, (stride, stride), 0) + 0.5 * stride
        boxes = clipped(decoded(centers[place], ltrb), width, height)
        parts.append((boxes, level.cls[place, label] * level.centerness[place], label))
    found = joined(parts)
    boxes = scaled(found.boxes, image)
    full = (boxes[:, 2:] - boxes[:, :2] > 0).all(dim=1)
    found = suppressed(Found(boxes[full], found.scores[full], found.labels[full]), threshold)
    return found._replace(boxes=to_xywh(found.boxes, 0))


def mmdet(levels: list[Level], image: int) -> Found:
    return mmdetection(levels, image, normalized=False, threshold=0.5)


def mmdet_tricks(levels: list[Level], image: int) -> Found:
    return mmdetection(levels, image, normalized=True, threshold=0.6)


REPLAYS: dict[str, Replay] = {
    "original": original,
    "original-imprv": original_imprv,
    "adelaidet": adelaidet,
    "adelaidet-iou": adelaidet,
    "adelaidet-rt": adelaidet,
    "detectron2": detectron2,
    "torchvision": torchvision,
    "mmdet": mmdet,
    "mmdet-tricks": mmdet_tricks,
    "rosinality": rosinality,
}
