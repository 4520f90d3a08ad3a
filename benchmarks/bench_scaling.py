"""How cost grows with images, their size, classes and boxes: one of them at a time, the rest fixed.

    python -m benchmarks.bench_scaling [--quick] [--device cuda] [--output FILE]

Of the focal loss, the loss section and post-processing, by the line-ups of their own benchmarks.
For boxes see bench_assign_targets and bench_nms, for images in NMS bench_padded_batched_nms, for
processes bench_processes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from . import bench_fcos_loss, bench_postprocess, bench_sigmoid_focal_loss, shapes
from .harness import Case, main

OP = "scaling"
SMALL, USUAL, LARGE = (640, 640), shapes.IMAGE_SIZE, (1344, 1344)
IMAGES = (1, 2, 4, 8, 16, 32)
CLASSES = (1, 20, 80, 365, 1203)
#: What a case is made of: images, their size, classes.
Make = Callable[[int, tuple[int, int], int], Case]


def cases(device: torch.device, quick: bool = False) -> Sequence[Case]:
    threads = None if device.type == "cuda" else 1 if quick else 2
    fixed = 2 if device.type == "cpu" else 16

    def focal(images: int, size: tuple[int, int], classes: int) -> Case:
        mode = "forward + backward"
        case = bench_sigmoid_focal_loss.make_case(
            device, "levels", images, size, threads, torch.float32, mode, classes
        )
        # a compiled one for each number of classes would take most of the time
        return _without(case, "torch.compile of reference", "torchvision, one-hot given")

    def loss(images: int, size: tuple[int, int], classes: int) -> Case:
        case = bench_fcos_loss.make_case(device, images, size, threads, torch.float32, classes)
        return _without(case, "torch.compile of reference", "reference, eager")

    def detect(images: int, size: tuple[int, int], classes: int) -> Case:
        few = bench_postprocess.FEW
        case = bench_postprocess.make_case(
            device, few, "channels_last", threads, size, images, classes
        )
        return _without(case, "reference, eager")

    sections = {"focal loss": focal, "loss section": loss, "post-processing": detect}
    if quick:
        return [
            _named(section, "classes", n, make(1, (128, 160), n))
            for section, make in sections.items()
            for n in (20, 80)
        ]
    result = []
    for section, make in sections.items():
        result += [_named(section, "images", n, make(n, SMALL, 80)) for n in IMAGES]
        result += [
            _named(section, "image size", size[0] * size[1], make(fixed, size, 80))
            for size in (SMALL, USUAL, LARGE)
        ]
        result += [_named(section, "classes", n, make(fixed, SMALL, n)) for n in CLASSES]
    return result


def _named(section: str, axis: str, value: int, case: Case) -> Case:
    settings = {"section": section, "axis": axis, "value": value} | case.settings
    return replace(case, settings=settings)


def _without(case: Case, *providers: str) -> Case:
    kept = {name: call for name, call in case.providers.items() if name not in providers}
    return replace(case, providers=kept)


if __name__ == "__main__":
    sys.exit(main(OP, cases))
