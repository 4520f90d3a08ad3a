"""What accelerate() gains on torchvision's FCOS, of two images of 800 x 1344 and 91 classes.

    python -m benchmarks.bench_accelerate [--quick] [--device cuda] [--output FILE]

Its loss, forward and backward, and its post-processing, by its own methods and by ours. They get
the same head outputs; the network, which both share, does not run.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.image_list import ImageList

from fcos_ext.integrations.torchvision import AcceleratedFCOS

from . import shapes
from .bench_assign_targets import feature_sizes, make_boxes
from .harness import OURS, Case, Results, main

OP = "accelerate"
NUM_CLASSES = 91
OUTPUTS = {"cls_logits": NUM_CLASSES, "bbox_regression": 4, "bbox_ctrness": 1}
BOXES_PER_IMAGE = (7, 50)
#: Mean of the logits of classes, and what that makes at a threshold of 0.2.
CANDIDATES = {"about 90": -6.6, "about 1,500": -5.85, "about 5,000": -5.4, "about 50,000": -4.5}


class NoBackbone(nn.Module):
    """What the constructor asks for."""

    out_channels = 32


def cases(device: torch.device, quick: bool = False) -> Sequence[Case]:
    images = 2 if device.type == "cpu" else 16
    image_size = (160, 224) if quick else shapes.IMAGE_SIZE
    result = []
    for threads in [None] if device.type == "cuda" else [1] if quick else [1, 2]:
        inputs = Inputs(device, images, image_size, threads)
        result += [loss_case(inputs, boxes) for boxes in BOXES_PER_IMAGE[: 1 if quick else None]]
        kinds = list(CANDIDATES)[1 if quick else 0 : 2 if quick else None]
        result += [detection_case(inputs, kind) for kind in kinds]
    return result


class Inputs:
    """The model, its anchors and random head outputs. The device is not used before a case runs."""

    def __init__(
        self, device: torch.device, images: int, image_size: tuple[int, int], threads: int | None
    ) -> None:
        self.device, self.images, self.image_size = device, images, image_size
        self.settings: dict[str, object] = {"shape": [images, *image_size]}
        if threads is not None:
            self.settings["threads"] = threads
        torch.manual_seed(0)
        self.ours = AcceleratedFCOS(NoBackbone(), NUM_CLASSES)
        self.theirs = FCOS(NoBackbone(), NUM_CLASSES)
        self.counts = [height * width for height, width in feature_sizes(image_size)]

    @functools.cached_property
    def anchors(self) -> list[Tensor]:
        """Of each image [L, 4]."""
        sizes = feature_sizes(self.image_size)
        features = [torch.zeros(self.images, 1, *size, device=self.device) for size in sizes]
        padded = torch.zeros(self.images, 3, *self.image_size)
        batch = ImageList(padded, [self.image_size] * self.images)
        anchors: list[Tensor] = self.ours.anchor_generator(batch, features)
        return anchors

    def head_outputs(self, seed: int, mean: float) -> tuple[Tensor, ...]:
        """Those of ``OUTPUTS``."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.images, sum(self.counts))
        logits, regression, centerness = (
            torch.randn(*shape, channels, generator=generator) for channels in OUTPUTS.values()
        )
        logits, regression = logits + mean, (2 * regression + 3).abs()
        return tuple(x.to(self.device) for x in (logits, regression, centerness))


def loss_case(inputs: Inputs, boxes: int) -> Case:
    def make_inputs(seed: int) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(seed)
        outputs = inputs.head_outputs(seed, shapes.LOGITS_MEAN)
        truths = [make_boxes(boxes, inputs.image_size, generator) for _ in range(inputs.images)]
        labels = torch.randint(NUM_CLASSES, (inputs.images, boxes), generator=generator)
        return *(x.requires_grad_() for x in outputs), *truths, labels.to(inputs.device)

    def step(model: Any, *tensors: Tensor) -> Results:
        outputs, truths, labels = tensors[:3], tensors[3:-1], tensors[-1]
        targets = [
            {"boxes": of_image.to(inputs.device), "labels": classes}
            for of_image, classes in zip(truths, labels, strict=True)
        ]
        given = dict(zip(OUTPUTS, outputs, strict=True))
        losses = model.compute_loss(targets, given, inputs.anchors, inputs.counts)
        terms = list(losses.values())
        return *terms, *torch.autograd.grad(torch.stack(terms).sum(), outputs)

    def truth(*tensors: Tensor) -> Results:
        return tuple(x.double() for x in step(inputs.theirs, *tensors))

    elements = inputs.images * sum(inputs.counts) * sum(OUTPUTS.values())
    return Case(
        settings={"section": "loss, forward and backward", "boxes": boxes} | inputs.settings,
        device=inputs.device,
        make_inputs=make_inputs,
        providers={
            OURS: lambda *tensors: step(inputs.ours, *tensors),
            "torchvision": lambda *tensors: step(inputs.theirs, *tensors),
        },
        reference=truth,
        tolerance=1e-5,
        bytes_moved=2 * 4 * elements,  # outputs once, and their gradients
    )


def detection_case(inputs: Inputs, candidates: str) -> Case:
    def detect(model: Any, *outputs: Tensor) -> Results:
        levels = {
            name: list(output.split(inputs.counts, dim=1))
            for name, output in zip(OUTPUTS, outputs, strict=True)
        }
        anchors = [list(of_image.split(inputs.counts)) for of_image in inputs.anchors]
        shapes_ = [inputs.image_size] * inputs.images
        detections = model.postprocess_detections(levels, anchors, shapes_)
        return tuple(torch.cat([d[name] for d in detections]) for name in ("boxes", "scores"))

    def truth(*outputs: Tensor) -> Results:
        return tuple(x.double() for x in detect(inputs.theirs, *outputs))

    elements = inputs.images * sum(inputs.counts) * (NUM_CLASSES + 1)
    return Case(
        settings={"section": "post-processing", "candidates an image": candidates}
        | inputs.settings,
        device=inputs.device,
        make_inputs=lambda seed: inputs.head_outputs(seed, CANDIDATES[candidates]),
        providers={
            OURS: lambda *outputs: detect(inputs.ours, *outputs),
            "torchvision": lambda *outputs: detect(inputs.theirs, *outputs),
        },
        reference=truth,
        tolerance=1e-6,
        bytes_moved=4 * elements,
    )


if __name__ == "__main__":
    sys.exit(main(OP, cases))
