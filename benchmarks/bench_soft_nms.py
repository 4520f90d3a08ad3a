"""Soft suppression of N images of K candidates in 80 classes, stopped at 100 boxes each.

    python -m benchmarks.bench_soft_nms [--quick] [--device cuda] [--output FILE]

Boxes are random, or "from a model", see ``bench_padded_batched_nms``.

Compared is our reference in eager mode: torchvision has no such function.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fcos_ext import padded_soft_nms, padded_soft_nms_ref
from fcos_ext.soft_nms import Method

from .bench_padded_batched_nms import (
    FROM_MODEL,
    MAX_DETECTIONS,
    candidates_of_model,
    make_candidates,
)
from .harness import OURS, Case, Results, main

OP = "soft_nms"
METHODS: tuple[Method, ...] = ("linear", "gaussian")


def with_method(function: Callable[..., Results], method: Method) -> Callable[..., Results]:
    def run(boxes: Tensor, scores: Tensor, labels: Tensor) -> Results:
        return function(boxes, scores, labels, 0.3, MAX_DETECTIONS, method=method)

    return run


def cases(device: torch.device, quick: bool = False) -> Sequence[Case]:
    threads = [None] if device.type == "cuda" else [1] if quick else [1, 2]
    sizes = [(2, 150)] if quick else [(1, 1000), (1, 5000), (16, 1000)]
    lines = [(*size, make_candidates) for size in sizes]
    lines.append((*((2, 200) if quick else FROM_MODEL), candidates_of_model))
    return [
        make_case(device, method, *line, number)
        for number, line, method in itertools.product(threads, lines, METHODS)
    ]


def make_case(
    device: torch.device,
    method: Method,
    images: int,
    count: int,
    make: Callable[[int, int, torch.Generator], tuple[Tensor, ...]],
    threads: int | None,
) -> Case:
    def make_inputs(seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(x.to(device) for x in make(images, count, generator))

    reference = with_method(padded_soft_nms_ref, method)
    settings: dict[str, object] = {"mode": method, "shape": [images, count]}
    if make is candidates_of_model:
        settings["boxes"] = "from a model"
    settings |= {"dtype": "float32"}
    if threads is not None:
        settings["threads"] = threads
    return Case(
        settings=settings,
        device=device,
        make_inputs=make_inputs,
        providers={OURS: with_method(padded_soft_nms, method), "reference, eager": reference},
        reference=lambda *args: tuple(x.double() for x in reference(*args)),
        # gaussian: the last bits of exp; a change of order would be far above it
        tolerance=0 if method == "linear" else 1e-6,
        # Each selection reads the boxes, labels and scores that are left, and writes the scores.
        bytes_moved=images * MAX_DETECTIONS * (count * 32 + 12),
    )


if __name__ == "__main__":
    sys.exit(main(OP, cases))
