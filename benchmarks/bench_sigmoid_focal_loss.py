"""Focal loss of a batch of two images, 44,800 locations of 80 classes: sum over all, / positives.

    python -m benchmarks.bench_sigmoid_focal_loss [--quick] [--device cuda] [--output FILE]

As rows, [44800, 80], and as the network gives it: five levels [2, 80, H, W] to an image. Compared
are what one would use instead: torchvision's function, with and without the making of
the one-hot targets that it needs, our reference in eager mode, and ``torch.compile`` of the
reference, which is the best form of it in plain PyTorch. See ``others`` for fvcore, mmcv and apex.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torchvision.ops
from torch import Tensor

from fcos_ext import sigmoid_focal_loss, sigmoid_focal_loss_ref

from . import others, shapes
from .harness import OURS, Case, Results, main

OP = "sigmoid_focal_loss"
#: From logits, labels, one-hot targets and the number of positives. Logits are rows or levels.
Loss = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
FORMS = ("rows", "levels")

# bfloat16: of torchvision's gradient, which is computed in that dtype; ours has 2e-3
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def one_hot_of(labels: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    targets = torch.zeros(len(labels), num_classes, dtype=dtype, device=labels.device)
    rows = (labels >= 0).nonzero()[:, 0]
    targets[rows, labels[rows]] = 1
    return targets


def ours(logits: Any, labels: Tensor, one_hot: Tensor, count: Tensor) -> Tensor:
    return sigmoid_focal_loss(logits, labels, normalizer=count)


def ours_fused(logits: Any, labels: Tensor, one_hot: Tensor, count: Tensor) -> Tensor:
    return sigmoid_focal_loss(logits, labels, normalizer=count, fused_gradient=True)


def reference(logits: Any, labels: Tensor, one_hot: Tensor, count: Tensor) -> Tensor:
    return sigmoid_focal_loss_ref(logits, labels, normalizer=count)


def torchvision_given(logits: Any, labels: Tensor, one_hot: Tensor, count: Tensor) -> Tensor:
    loss = torchvision.ops.sigmoid_focal_loss(others.as_rows(logits), one_hot, reduction="sum")
    return loss / count.clamp(min=1)


def torchvision_made(logits: Any, labels: Tensor, one_hot: Tensor, count: Tensor) -> Tensor:
    one_hot = one_hot_of(labels.flatten(), one_hot.shape[-1], one_hot.dtype)
    return torchvision_given(logits, labels, one_hot, count)


def with_gradient(loss: Loss) -> Callable[..., Results]:
    def run(*inputs: Tensor) -> Results:
        logits, others = _logits(inputs)
        value = loss(logits, *others)
        return value, *torch.autograd.grad(value, logits)

    return run


def without_gradient(loss: Loss) -> Callable[..., Results]:
    @torch.no_grad()
    def run(*inputs: Tensor) -> Results:
        logits, others = _logits(inputs)
        return (loss(logits, *others),)

    return run


def _logits(inputs: tuple[Tensor, ...]) -> tuple[Any, tuple[Tensor, ...]]:
    """Rows, or a list of levels; and the other arguments."""
    *logits, labels, one_hot, count = inputs
    return (logits[0] if len(logits) == 1 else logits), (labels, one_hot, count)


MODES = {"forward": without_gradient, "forward + backward": with_gradient}


def cases(device: torch.device, quick: bool = False) -> Sequence[Case]:
    images = 2 if device.type == "cpu" else 16
    size = (128, 160) if quick else shapes.IMAGE_SIZE
    threads = [None] if device.type == "cuda" else [1] if quick else [1, 2]
    return [
        make_case(device, form, images, size, number, dtype, mode)
        for form, number, dtype, mode in itertools.product(FORMS, threads, TOLERANCE, MODES)
        if not quick or (dtype is torch.float32) == (mode == "forward")  # half of them
    ]


def make_case(
    device: torch.device,
    form: str,
    images: int,
    image_size: tuple[int, int],
    threads: int | None,
    dtype: torch.dtype,
    mode: str,
    classes: int = shapes.NUM_CLASSES,
) -> Case:
    height, width = image_size
    sizes = [(-(-height // stride), -(-width // stride)) for stride in shapes.STRIDES]
    rows = shapes.num_locations(image_size) * images

    def make_inputs(seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        labels = shapes.make_labels(rows, classes, generator).to(device)
        one_hot = one_hot_of(labels, classes, dtype)
        if form == "rows":
            logits = [shapes.make_logits(rows, classes, generator)]
        else:
            labels = labels.view(images, -1)
            logits = [
                shapes.make_logits(images * classes, h * w, generator).view(images, classes, h, w)
                for h, w in sizes
            ]
        leaves = [x.to(device, dtype).requires_grad_() for x in logits]
        return *leaves, labels, one_hot, (labels >= 0).sum()

    def truth(*inputs: Tensor) -> Results:
        *logits, labels, one_hot, count = inputs
        exact = [x.detach().double().requires_grad_() for x in logits]
        with torch.enable_grad():
            return run(reference)(*exact, labels, one_hot, count)

    run = MODES[mode]
    providers = {OURS: run(ours)}
    if mode != "forward":
        providers[f"{OURS}, fused gradient"] = run(ours_fused)
    providers |= {
        "torch.compile of reference": run(torch.compile(reference, dynamic=False)),
        "reference, eager": run(reference),
        "torchvision, one-hot given": run(torchvision_given),
        "torchvision, one-hot made": run(torchvision_made),
    }
    theirs = others.focal_losses(device, dtype, classes)
    providers |= {name: run(loss) for name, loss in theirs.items()}
    # Labels and logits are read; then again, and the gradient is written.
    logits_bytes, labels_bytes = rows * classes * dtype.itemsize, rows * 8
    read, written = (1, 0) if mode == "forward" else (2, 1)
    settings: dict[str, object] = {"mode": mode, "form": form, "shape": [rows, classes]}
    settings |= {"dtype": str(dtype).removeprefix("torch.")}
    if threads is not None:
        settings["threads"] = threads
    return Case(
        settings=settings,
        device=device,
        make_inputs=make_inputs,
        providers=providers,
        reference=truth,
        tolerance=TOLERANCE[dtype],
        bytes_moved=read * (logits_bytes + labels_bytes) + written * logits_bytes,
        logits=rows * classes,
    )


if __name__ == "__main__":
    sys.exit(main(OP, cases))
