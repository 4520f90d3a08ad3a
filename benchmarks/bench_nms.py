"""nms and batched_nms of 100 to 20,000 boxes, in one group and in 80.

    python -m benchmarks.bench_nms [--quick] [--device cuda] [--output FILE]

Compared are torchvision's ``nms`` (one group) and ``batched_nms`` (80), mmcv's and detectron2's
where these are installed, and our reference in eager mode. The reference loops until nothing is
left, so that ``torch.compile`` does not apply. To "keep 100", the others keep all and cut.

Boxes are random, or "from a model": the best candidates that a trained one has for a crowded image
(see ``candidates``), shuffled, of its three classes or taken for one.

Corners are whole numbers, scores differ, and the threshold is 0.5: then torchvision's offsets and
float64 threshold are exact, and all results have to be equal.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence

import torch
import torchvision.ops
from torch import Tensor

from fcos_ext import batched_nms, batched_nms_ref, nms, nms_ref

from . import candidates, others, shapes
from .harness import OURS, Case, Results, main

OP = "nms"
IOU_THRESHOLD = 0.5
CLASSES = shapes.NUM_CLASSES
FROM_MODEL = "from a model"
#: (n, layout, groups) of the boxes, in the order of interest.
LINE_UP = [
    (1000, "random", CLASSES),
    (1000, "clustered", CLASSES),
    (5000, "random", CLASSES),
    (5000, "clustered", CLASSES),
    (1000, "random", 1),
    (1000, "clustered", 1),
    (5000, "random", 1),
    (5000, "clustered", 1),
    (5000, "disjoint", 1),
    (5000, "identical", 1),
    (100, "random", CLASSES),
    (20_000, "random", CLASSES),
    (20_000, "random", 1),
    (1000, FROM_MODEL, 3),
    (1000, FROM_MODEL, 1),
    (2000, FROM_MODEL, 3),
    (2000, FROM_MODEL, 1),
]
#: The reference takes a second and more where few of more boxes than these are suppressed.
MAX_REFERENCE = 1000
Inputs = tuple[Tensor, Tensor, Tensor]


def random_boxes(n: int, generator: torch.Generator) -> Tensor:
    """Anywhere, sides 10 to 100: most stay."""
    corner = torch.rand(n, 2, generator=generator) * torch.tensor(shapes.IMAGE_SIZE[::-1])
    return torch.cat((corner, corner + 10 + 90 * torch.rand(n, 2, generator=generator)), dim=1)


def clustered_boxes(n: int, generator: torch.Generator) -> Tensor:
    """Twenty around each object, as a detector makes them: most go."""
    objects = random_boxes(-(-n // 20), generator)
    objects[:, 2:] += 40
    return objects.repeat(20, 1)[:n] + 4 * torch.randn(n, 4, generator=generator)


def disjoint_boxes(n: int, generator: torch.Generator) -> Tensor:
    """All stay, and every pair has to be looked at."""
    index = torch.randperm(n, generator=generator)
    corner = torch.stack((index % 200, index // 200), dim=1) * 30.0
    return torch.cat((corner, corner + 20), dim=1)


def identical_boxes(n: int, generator: torch.Generator) -> Tensor:
    """One stays."""
    return torch.tensor([[10.0, 10.0, 90.0, 90.0]]).repeat(n, 1)


def boxes_of_model(n: int, generator: torch.Generator) -> Inputs:
    """Of one of its images: boxes, scores and labels, in random order."""
    found = _candidates()
    image = int(torch.randint(len(found.boxes), (), generator=generator))
    order = torch.randperm(n, generator=generator)
    scores = torch.arange(n, 0, -1)[order] / n  # no two alike, as they may be in half precision
    return found.boxes[image, order], scores, found.labels[image, order]


@functools.cache
def _candidates() -> candidates.Candidates:
    return candidates.load()


LAYOUTS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "random": random_boxes,
    "clustered": clustered_boxes,
    "disjoint": disjoint_boxes,
    "identical": identical_boxes,
}


def ours(boxes: Tensor, scores: Tensor, groups: Tensor, one: bool, limit: int | None) -> Tensor:
    if one:
        return nms(boxes, scores, IOU_THRESHOLD, max_detections=limit)
    return batched_nms(boxes, scores, groups, IOU_THRESHOLD, max_detections=limit)


def reference(
    boxes: Tensor, scores: Tensor, groups: Tensor, one: bool, limit: int | None
) -> Tensor:
    if one:
        return nms_ref(boxes, scores, IOU_THRESHOLD)[:limit]
    return batched_nms_ref(boxes, scores, groups, IOU_THRESHOLD)[:limit]


def torchvisions(
    boxes: Tensor, scores: Tensor, groups: Tensor, one: bool, limit: int | None
) -> Tensor:
    if one:
        return torchvision.ops.nms(boxes, scores, IOU_THRESHOLD)[:limit]
    return torchvision.ops.batched_nms(boxes, scores, groups, IOU_THRESHOLD)[:limit]


def cases(device: torch.device, quick: bool = False) -> Sequence[Case]:
    threads = [None] if device.type == "cuda" else [1] if quick else [1, 2]
    line_up = [line for line in LINE_UP if line[0] <= 1000] if quick else LINE_UP
    return [
        make_case(device, *line, number, limit)
        for line in line_up
        for number in threads
        for limit in (None, 100)
        if limit is None or 1000 <= line[0] <= 5000
    ]


def make_case(
    device: torch.device, n: int, layout: str, groups: int, threads: int | None, limit: int | None
) -> Case:
    def make_inputs(seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        if layout == FROM_MODEL:
            boxes, scores, idxs = boxes_of_model(n, generator)
            return boxes.to(device), scores.to(device), idxs.to(device)
        boxes = LAYOUTS[layout](n, generator).round()
        scores = torch.randperm(n, generator=generator) / n
        # As the boxes, twenty alike: those of an object have one class.
        idxs = torch.randint(groups, (-(-n // 20),), generator=generator).repeat(20)[:n]
        return boxes.to(device), scores.to(device), idxs.to(device)

    def provider(function: Callable[..., Tensor]) -> Callable[..., Results]:
        @functools.wraps(function)
        def run(*inputs: Tensor) -> Results:
            return (function(*inputs, groups == 1, limit),)

        return run

    def truth(*inputs: Tensor) -> Results:
        # To compare with, in float64: it holds indices exactly.
        return (reference(*inputs, groups == 1, limit).double(),)

    settings: dict[str, object] = {
        "mode": "keep all" if limit is None else f"keep {limit}",
        "shape": [n, 4],
        "boxes": layout,
        "groups": groups,
        "dtype": "float32",
    }
    if threads is not None:
        settings["threads"] = threads
    providers = {OURS: ours, "torchvision": torchvisions} | others.nms(IOU_THRESHOLD)
    if n <= MAX_REFERENCE:
        providers["reference, eager"] = reference
    return Case(
        settings=settings,
        device=device,
        make_inputs=make_inputs,
        providers={name: provider(function) for name, function in providers.items()},
        reference=truth,
        tolerance=0.0,
        bytes_moved=n * (4 * 4 + 4 + (8 if groups > 1 else 0)),
    )


if __name__ == "__main__":
    sys.exit(main(OP, cases))
