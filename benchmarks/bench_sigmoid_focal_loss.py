"""Focal loss of a batch of two images, 44,800 locations of 80 classes: sum over all, / positives.

    python -m benchmarks.bench_sigmoid_focal_loss [--quick] [--device cuda] [--output FILE]

Compared are what one would use instead: torchvision's function, with and without the making of
the one-hot targets that it needs, our reference in eager mode, and ``torch.compile`` of the
reference, which is the best form of it in plain PyTorch.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence

import torch
import torchvision.ops
from torch import Tensor

from fcos_ext import sigmoid_focal_loss, sigmoid_focal_loss_ref

from . import shapes
from .harness import OURS, Case, Results, main

OP = "sigmoid_focal_loss"
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# bfloat16: of torchvision's gradient, which is computed in that dtype; ours has 2e-3
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def one_hot_of(labels: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    targets = torch.zeros(len(labels), num_classes, dtype=dtype, device=labels.device)
    rows = (labels >= 0).nonzero()[:, 0]
    targets[rows, labels[rows]] = 1
    return targets


def ours(logits: Tensor, labels: Tensor, one_hot: Tensor, count: Tensor) -> Tensor:
    return sigmoid_focal_loss(logits, labels, normalizer=count)


def reference(logits: Tensor, labels: Tensor, one_hot: Tensor, count: Tensor) -> Tensor:
    return sigmoid_focal_loss_ref(logits, labels, normalizer=count)


def torchvision_given(logits: Tensor, labels: Tensor, one_hot: Tensor, count: Tensor) -> Tensor:
    loss = torchvision.ops.sigmoid_focal_loss(logits, one_hot, reduction="sum")
    return loss / count.clamp(min=1)


def torchvision_made(logits: Tensor, labels: Tensor, one_hot: Tensor, count: Tensor) -> Tensor:
    one_hot = one_hot_of(labels, logits.shape[-1], logits.dtype)
    return torchvision_given(logits, labels, one_hot, count)


def with_gradient(loss: Loss) -> Callable[..., Results]:
    def run(logits: Tensor, labels: Tensor, one_hot: Tensor, count: Tensor) -> Results:
        value = loss(logits, labels, one_hot, count)
        return value, torch.autograd.grad(value, logits)[0]

    return run


def without_gradient(loss: Loss) -> Callable[..., Results]:
    @torch.no_grad()
    def run(logits: Tensor, labels: Tensor, one_hot: Tensor, count: Tensor) -> Results:
        return (loss(logits, labels, one_hot, count),)

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
    classes = shapes.NUM_CLASSES

    def make_inputs(seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        labels = shapes.make_labels(rows, classes, generator).to(device)
        logits = shapes.make_logits(rows, classes, generator).to(device, dtype).requires_grad_()
        return logits, labels, one_hot_of(labels, classes, dtype), (labels >= 0).sum()

    def truth(logits: Tensor, *others: Tensor) -> Results:
        with torch.enable_grad():
            return form(reference)(logits.detach().double().requires_grad_(), *others)

    form = MODES[mode]
    # Labels and logits are read; then again, and the gradient is written.
    logits_bytes, labels_bytes = rows * classes * dtype.itemsize, rows * 8
    read, written = (1, 0) if mode == "forward" else (2, 1)
    settings: dict[str, object] = {"mode": mode, "shape": [rows, classes]}
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
            "torchvision, one-hot given": form(torchvision_given),
            "torchvision, one-hot made": form(torchvision_made),
        },
        reference=truth,
        tolerance=TOLERANCE[dtype],
        bytes_moved=read * (logits_bytes + labels_bytes) + written * logits_bytes,
    )


if __name__ == "__main__":
    sys.exit(main(OP, cases))
