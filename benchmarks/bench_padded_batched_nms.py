"""Greedy suppression of N images of K candidates in 80 classes, stopped at 100 boxes each.

    python -m benchmarks.bench_padded_batched_nms [--quick] [--device cuda] [--output FILE]

Boxes are random, or "from a model": the 2,000 best candidates for each of four crowded images, in
three classes; see ``candidates``.

Compared are a loop of torchvision's ``batched_nms`` over the images, cut off at 100, and our
reference in eager mode.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence

import torch
import torchvision.ops
from torch import Tensor

from fcos_ext import padded_batched_nms, padded_batched_nms_ref

from . import candidates, shapes
from .harness import OURS, Case, Results, main

OP = "padded_batched_nms"
IOU_THRESHOLD, MAX_DETECTIONS = 0.6, 100
BATCHES = (1, 2, 4, 8, 16, 32)
#: Images and candidates of each.
FROM_MODEL = (4, 2000)


def make_candidates(
    images: int, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes [N, K, 4] of sides 10 to 210 in an image, scores and labels [N, K]."""
    height, width = shapes.IMAGE_SIZE
    corner = torch.rand(images, count, 2, generator=generator)
    corner *= torch.tensor([width, height])
    sides = torch.rand(images, count, 2, generator=generator) * 200 + 10
    # No two of an image are equal: torchvision leaves their order open.
    order = torch.rand(images, count, generator=generator).argsort(dim=1)
    scores = (order + 0.5) / count
    labels = torch.randint(shapes.NUM_CLASSES, (images, count), generator=generator)
    return torch.cat([corner, corner + sides], dim=-1), scores, labels


def candidates_of_model(
    images: int, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Its best, shuffled, and moved within their pixel: no overlap is at the threshold then."""
    found = candidates.load()
    order = torch.rand(images, count, generator=generator).argsort(dim=1)
    boxes = found.boxes[:images].gather(1, order.unsqueeze(-1).expand(-1, -1, 4))
    boxes += torch.rand(boxes.shape, generator=generator)
    # Ranks in place of scores, some of which are equal in half precision.
    return boxes, (count - order) / count, found.labels[:images].gather(1, order)


def ours(boxes: Tensor, scores: Tensor, labels: Tensor) -> Results:
    return padded_batched_nms(boxes, scores, labels, IOU_THRESHOLD, MAX_DETECTIONS)


def reference(boxes: Tensor, scores: Tensor, labels: Tensor) -> Results:
    return padded_batched_nms_ref(boxes, scores, labels, IOU_THRESHOLD, MAX_DETECTIONS)


def torchvision_loop(boxes: Tensor, scores: Tensor, labels: Tensor) -> Results:
    keep = labels.new_full((len(boxes), MAX_DETECTIONS), -1)
    counts = []
    for row, image in zip(keep, zip(boxes, scores, labels, strict=True), strict=True):
        kept = torchvision.ops.batched_nms(*image, IOU_THRESHOLD)[:MAX_DETECTIONS]
        row[: len(kept)] = kept
        counts.append(len(kept))
    return keep, torch.tensor(counts, device=keep.device)


def cases(device: torch.device, quick: bool = False) -> Sequence[Case]:
    threads = [None] if device.type == "cuda" else [1] if quick else [1, 2]
    sizes = [(2, 100)] if quick else list(itertools.product(BATCHES, [1000, 5000]))
    lines = [(*size, make_candidates) for size in sizes]
    lines.append((*((2, 200) if quick else FROM_MODEL), candidates_of_model))
    return [make_case(device, *line, number) for number, line in itertools.product(threads, lines)]


def make_case(
    device: torch.device,
    images: int,
    count: int,
    make: Callable[[int, int, torch.Generator], tuple[Tensor, ...]],
    threads: int | None,
) -> Case:
    def make_inputs(seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(x.to(device) for x in make(images, count, generator))

    settings: dict[str, object] = {"mode": "forward", "shape": [images, count]}
    if make is candidates_of_model:
        settings["boxes"] = "from a model"
    settings |= {"dtype": "float32"}
    if threads is not None:
        settings["threads"] = threads
    return Case(
        settings=settings,
        device=device,
        make_inputs=make_inputs,
        providers={
            OURS: ours,
            "torchvision, image by image": torchvision_loop,
            "reference, eager": reference,
        },
        reference=lambda *args: tuple(x.double() for x in reference(*args)),
        tolerance=0,
        # Scores and labels are read, boxes of those that are looked at, and indices written.
        bytes_moved=images * (count * 12 + MAX_DETECTIONS * 24 + 8),
    )


if __name__ == "__main__":
    sys.exit(main(OP, cases))
