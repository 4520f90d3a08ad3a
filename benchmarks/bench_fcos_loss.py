"""The loss section of FCOS for a batch of two images of 800 x 1344: from outputs to gradients.

    python -m benchmarks.bench_fcos_loss [--quick] [--device cuda] [--output FILE]

Assignment of 8 boxes an image to 22,400 locations, focal loss of 80 classes, box and centerness
loss, and the gradients of their sum. Compared are our reference in eager mode, ``torch.compile``
of it, and torchvision's ``FCOS.compute_loss``. That one gets the outputs as its head makes them,
permuted and joined, and anchors of one stride around our locations, with which both mean the same:
box losses without weights, size ranges without their ends.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.models.detection import FCOS
from torchvision.models.detection.fcos import FCOSHead

from fcos_ext import FCOSLossOptions, GroundTruth, fcos_loss, fcos_loss_ref

from . import shapes
from .bench_assign_targets import SIZE_RANGES, feature_sizes, make_boxes, torchvision_anchors
from .harness import OURS, Case, Results, main

OP = "fcos_loss"
BOXES_PER_IMAGE = 8
OPTIONS = FCOSLossOptions(
    strides=shapes.STRIDES, size_ranges=SIZE_RANGES, boundary="strict", box_weights="none"
)

# float32: of torchvision's box loss, which subtracts coordinates; ours has 1e-6
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-3}


class Inputs(NamedTuple):
    """In the order in which a provider gets them, the levels one by one."""

    levels: list[list[Tensor]]
    rows: list[Tensor]
    """The same outputs as rows [N, L, C], as torchvision's head makes them."""
    truth: GroundTruth


def inputs_of(arguments: tuple[Tensor, ...]) -> Inputs:
    *outputs, boxes, labels, offsets = arguments
    count = len(shapes.STRIDES)
    levels = [list(outputs[i * count : (i + 1) * count]) for i in range(3)]
    return Inputs(levels, list(outputs[3 * count :]), GroundTruth(boxes, labels, offsets))


def with_gradients(loss: Callable[..., Any]) -> Callable[..., Results]:
    """Of our functions: the three losses, and the gradients by all levels."""

    def run(*arguments: Tensor) -> Results:
        levels, _, truth = inputs_of(arguments)
        terms = loss(levels, truth, OPTIONS)
        leaves = [level for part in levels for level in part]
        gradients = torch.autograd.grad(terms.cls + terms.box + terms.centerness, leaves)
        return terms.cls, terms.box, terms.centerness, *gradients

    return run


def torchvision_loss(
    anchors: Tensor,
    locations_per_level: list[int],
    sizes: Sequence[tuple[int, int]],
    classes: int,
) -> Callable[..., Results]:
    on = functools.cache(anchors.to)  # a device, which may not exist before the case runs
    head = FCOSHead(32, 1, classes, num_convs=1)
    model = SimpleNamespace(center_sampling_radius=1.5, head=head)

    def run(*arguments: Tensor) -> Results:
        _, rows, (boxes, labels, offsets, _) = inputs_of(arguments)
        assert offsets is not None
        images = len(offsets) - 1
        parts = zip(boxes.chunk(images), labels.chunk(images), strict=True)
        targets = [{"boxes": b, "labels": c} for b, c in parts]
        names = ("cls_logits", "bbox_regression", "bbox_ctrness")
        outputs = dict(zip(names, rows, strict=True))
        each = [on(boxes.device)] * images
        terms = FCOS.compute_loss(model, targets, outputs, each, locations_per_level)
        gradients = torch.autograd.grad(sum(terms.values()), rows)
        # views [N, C, H, W] of them, to be compared with ours
        split = (
            part.mT.unflatten(2, size)
            for gradient in gradients
            for part, size in zip(gradient.split(locations_per_level, dim=1), sizes, strict=True)
        )
        return *terms.values(), *split

    return run


def cases(device: torch.device, quick: bool = False) -> Sequence[Case]:
    images = 2 if device.type == "cpu" else 16
    size = (128, 160) if quick else shapes.IMAGE_SIZE
    threads = [None] if device.type == "cuda" else [1] if quick else [1, 2]
    return [
        make_case(device, images, size, number, dtype)
        for number, dtype in itertools.product(threads, TOLERANCE)
        if not quick or dtype is torch.float32  # whose reference takes long to compile
    ]


def make_case(
    device: torch.device,
    images: int,
    image_size: tuple[int, int],
    threads: int | None,
    dtype: torch.dtype,
    classes: int = shapes.NUM_CLASSES,
) -> Case:
    channels_of_outputs = (classes, 4, 1)  # logits, distances, centerness
    sizes = feature_sizes(image_size)
    locations = shapes.num_locations(image_size) * images
    anchors, locations_per_level = torchvision_anchors(sizes)

    def make_inputs(seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        levels = []
        for channels, (h, w) in itertools.product(channels_of_outputs, sizes):
            values = shapes.make_logits(images * channels, h * w, generator)
            values = values.view(images, channels, h, w)
            if channels == 4:  # distances, in strides
                values = torch.rand(images, channels, h, w, generator=generator) * 4 + 0.1
            levels.append(values.to(device, dtype).requires_grad_())
        rows = []
        for i in range(0, len(levels), len(sizes)):
            part = [level.detach().flatten(2).mT for level in levels[i : i + len(sizes)]]
            rows.append(torch.cat(part, dim=1).requires_grad_())
        boxes = [make_boxes(BOXES_PER_IMAGE, image_size, generator) for _ in range(images)]
        labels = torch.randint(classes, (images * BOXES_PER_IMAGE,), generator=generator)
        offsets = torch.arange(images + 1) * BOXES_PER_IMAGE
        truth = (torch.cat(boxes), labels, offsets)
        return *levels, *rows, *(x.to(device) for x in truth)

    def true_results(*arguments: Tensor) -> Results:
        exact = [x.detach().double().requires_grad_() if x.requires_grad else x for x in arguments]
        with torch.enable_grad():
            return with_gradients(fcos_loss_ref)(*exact)

    providers = {
        OURS: with_gradients(fcos_loss),
        "torch.compile of reference": with_gradients(torch.compile(fcos_loss_ref, dynamic=False)),
        "reference, eager": with_gradients(fcos_loss_ref),
    }
    if dtype == torch.float32:  # in bfloat16 its box loss has lost most digits
        providers["torchvision"] = torchvision_loss(anchors, locations_per_level, sizes, classes)
    settings: dict[str, object] = {"mode": "forward + backward", "shape": [images, *image_size]}
    settings |= {"classes": classes, "dtype": str(dtype).removeprefix("torch.")}
    if threads is not None:
        settings["threads"] = threads
    # The logits are read and the gradients written. Labels, distances, centerness and box numbers
    # of the targets are written; labels and centerness are summed up, and the labels written anew
    # and read by both losses.
    outputs = classes + sum(channels_of_outputs)
    targets = (8 + 16 + 4 + 8) + (8 + 4 + 4) + (4 + 4)
    return Case(
        settings=settings,
        device=device,
        make_inputs=make_inputs,
        providers=providers,
        reference=true_results,
        tolerance=TOLERANCE[dtype],
        bytes_moved=locations * (outputs * dtype.itemsize + targets),
        logits=locations * classes,
    )


if __name__ == "__main__":
    sys.exit(main(OP, cases))
