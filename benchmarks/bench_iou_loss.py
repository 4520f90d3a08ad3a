"""GIoU and centerness losses of a batch of two images, 44,800 locations: box_and_centerness_loss.

    python -m benchmarks.bench_iou_loss [--quick] [--device cuda] [--output FILE]

Compared are our reference in eager mode, ``torch.compile`` of the reference, which is the best form
of it in plain PyTorch, and what detectors are written with: the positive locations picked out, then
torchvision's box loss and PyTorch's cross-entropy.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
import torchvision.ops
from torch import Tensor

from fcos_ext import box_and_centerness_loss, box_and_centerness_loss_ref

from . import shapes
from .harness import OURS, Case, Results, main

OP = "iou_loss"
Sums = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Sums]

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}


def ours(pred: Tensor, scores: Tensor, target: Tensor, labels: Tensor) -> Sums:
    loss = box_and_centerness_loss(pred, scores, target, labels)
    return loss.box, loss.centerness


def reference(pred: Tensor, scores: Tensor, target: Tensor, labels: Tensor) -> Sums:
    loss = box_and_centerness_loss_ref(pred, scores, target, labels)
    return loss.box, loss.centerness


def torchvision_compacted(pred: Tensor, scores: Tensor, target: Tensor, labels: Tensor) -> Sums:
    positive = (labels >= 0).nonzero()[:, 0]
    pred, scores, target = pred[positive].float(), scores[positive].float(), target[positive]
    near, far = target[:, :2], target[:, 2:]
    centerness = (torch.minimum(near, far) / torch.maximum(near, far)).prod(dim=1).sqrt()
    pred, target = (torch.cat((-x[:, :2], x[:, 2:]), dim=1) for x in (pred, target))
    box = torchvision.ops.generalized_box_iou_loss(pred, target)
    entropy = F.binary_cross_entropy_with_logits(scores, centerness, reduction="sum")
    return (box * centerness).sum(), entropy


def with_gradient(loss: Loss) -> Callable[..., Results]:
    def run(pred: Tensor, scores: Tensor, target: Tensor, labels: Tensor) -> Results:
        box, centerness = loss(pred, scores, target, labels)
        return box, centerness, *torch.autograd.grad(box + centerness, (pred, scores))

    return run


def without_gradient(loss: Loss) -> Callable[..., Results]:
    @torch.no_grad()
    def run(pred: Tensor, scores: Tensor, target: Tensor, labels: Tensor) -> Results:
        return loss(pred, scores, target, labels)

    return run


MODES = {"forward": without_gradient, "forward + backward": with_gradient}


def cases(device: torch.device, quick: bool = False) -> Sequence[Case]:
    images = 2 if device.type == "cpu" else 16
    rows = shapes.num_locations((128, 160) if quick else shapes.IMAGE_SIZE) * images
    threads = [None] if device.type == "cuda" else [1] if quick else [1, 2]
    return [
        make_case(device, rows, number, dtype, mode)
        for number, dtype, mode in itertools.product(threads, TOLERANCE, MODES)
        if not quick or (dtype is torch.float32) == (mode == "forward")  # half of them
    ]


def make_case(
    device: torch.device, rows: int, threads: int | None, dtype: torch.dtype, mode: str
) -> Case:
    def make_inputs(seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        labels = shapes.make_labels(rows, shapes.NUM_CLASSES, generator)
        pred, target = (torch.rand(rows, 4, generator=generator) * 4 + 0.1 for _ in range(2))
        scores = torch.randn(rows, generator=generator)
        return (
            pred.to(device, dtype).requires_grad_(),
            scores.to(device, dtype).requires_grad_(),
            target.to(device),
            labels.to(device),
        )

    def truth(pred: Tensor, scores: Tensor, target: Tensor, labels: Tensor) -> Results:
        exact = (x.detach().double().requires_grad_() for x in (pred, scores))
        with torch.enable_grad():
            return form(reference)(*exact, target, labels)

    form = MODES[mode]
    # All labels are read, and few other values; then again, and the gradients are written.
    read, written = (1, 0) if mode == "forward" else (2, 1)
    settings: dict[str, object] = {"mode": mode, "locations": rows}
    settings |= {"dtype": str(dtype).removeprefix("torch.")}
    if threads is not None:
        settings["threads"] = threads
    return Case(
        settings=settings,
        device=device,
        make_inputs=make_inputs,
        providers={
            OURS: form(ours),
            "torch.compile of reference": form(torch.compile(reference, dynamic=False)),
            "reference, eager": form(reference),
            "torchvision, compacted": form(torchvision_compacted),
        },
        reference=truth,
        tolerance=TOLERANCE[dtype],
        bytes_moved=rows * (read * 8 + written * 5 * dtype.itemsize),
    )


if __name__ == "__main__":
    sys.exit(main(OP, cases))
