"""From the outputs of a network for images of 800 x 1344, 80 classes, to 100 detections each.

    python -m benchmarks.bench_postprocess [--quick] [--device cuda] [--output FILE]

Compared are the ``postprocess_detections`` of torchvision's FCOS, with its thresholds and its
locations, and our reference in eager mode. With channels_last outputs torchvision gets the memory
that its own head makes; with contiguous ones (NCHW) it gets views of them.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.image_list import ImageList

from fcos_ext import PostprocessOptions, postprocess, postprocess_ref

from . import shapes
from .harness import OURS, Case, Results, main

OP = "postprocess"
OPTIONS = PostprocessOptions(
    strides=shapes.STRIDES,
    score_threshold=0.2,
    threshold_on="final",
    # Not torchvision's 0.6, with which it compares in float64: it would drop a box whose overlap
    # is 3/5 exactly, as 0.6 in float32 is a little more.
    iou_threshold=0.5,
    locations="torchvision",
)
#: Scores above the threshold an image. Above 1,000 torchvision suppresses class by class.
FEW, MANY = 650, 4000


def make_outputs(
    images: int,
    candidates: int,
    image_size: tuple[int, int],
    generator: torch.Generator,
    classes: int = shapes.NUM_CLASSES,
) -> list[list[Tensor]]:
    """Logits, distances and centerness of each level; ``candidates`` logits an image are high."""
    logits, ltrb, centerness = [], [], []
    per_level = candidates // len(shapes.STRIDES)
    # No two of these are nearly equal, and their centerness is the same: torchvision computes
    # scores a little differently, and would have another order.
    high = torch.linspace(-1, 3, per_level * len(shapes.STRIDES))
    order = torch.rand(images, len(high), generator=generator).argsort(dim=1)
    for level, stride in enumerate(shapes.STRIDES):
        size = [-(-side // stride) for side in image_size]
        pairs = classes * size[0] * size[1]
        x = torch.randn(images, pairs, generator=generator) - 9
        weights = torch.randn(images, 1, *size, generator=generator)
        for i in range(images):
            chosen = torch.randperm(pairs, generator=generator)[:per_level]
            x[i, chosen] = high[order[i, level * per_level :][: len(chosen)]]
            weights[i].view(-1)[chosen % (size[0] * size[1])] = 1.0
        logits.append(x.view(images, classes, *size))
        # In eighths of a stride: torchvision moves the boxes of each class far to the side, which
        # these do not lose a bit by.
        ltrb.append(torch.randint(4, 28, (images, 4, *size), generator=generator) / 8)
        centerness.append(weights)
    return [logits, ltrb, centerness]


def grouped(outputs: Sequence[Tensor]) -> Any:
    """Arguments of providers are tensors: the levels of logits, of distances, of centerness."""
    levels = len(outputs) // 3
    return tuple(list(outputs[i * levels : (i + 1) * levels]) for i in range(3))


def ours(image_size: tuple[int, int], *outputs: Tensor) -> Results:
    sizes = image_sizes(len(outputs[0]), image_size, outputs[0].device)
    return postprocess(grouped(outputs), sizes, OPTIONS, padded_size=image_size)[:4]


def reference(image_size: tuple[int, int], *outputs: Tensor) -> Results:
    sizes = image_sizes(len(outputs[0]), image_size, outputs[0].device)
    return postprocess_ref(grouped(outputs), sizes, OPTIONS, padded_size=image_size)[:4]


@functools.cache
def image_sizes(images: int, image_size: tuple[int, int], device: torch.device) -> Tensor:
    return torch.tensor([image_size] * images, device=device)


class Backbone(torch.nn.Module):
    out_channels = 32


@functools.cache
def torchvision_model(
    images: int, image_size: tuple[int, int], classes: int, device: torch.device
) -> tuple[FCOS, list[list[Tensor]]]:
    """And the anchors of a batch, level by level."""
    anchors = AnchorGenerator(tuple((s,) for s in shapes.STRIDES), ((1.0,),) * len(shapes.STRIDES))
    model = FCOS(Backbone(), classes, anchor_generator=anchors, nms_thresh=OPTIONS.iou_threshold)
    sizes = [[-(-side // stride) for side in image_size] for stride in shapes.STRIDES]
    batch = ImageList(torch.zeros(images, 3, *image_size, device=device), [image_size] * images)
    maps = [torch.zeros(images, 1, *size, device=device) for size in sizes]
    counts = [height * width for height, width in sizes]
    return model, [list(x.split(counts)) for x in model.anchor_generator(batch, maps)]


def torchvision_postprocess(image_size: tuple[int, int], *outputs: Tensor) -> Results:
    images = len(outputs[0])
    model, anchors = torchvision_model(images, image_size, outputs[0].shape[1], outputs[0].device)
    logits, ltrb, centerness = (
        [x.flatten(2).transpose(1, 2) for x in levels] for levels in grouped(outputs)
    )
    heads = {"cls_logits": logits, "bbox_regression": ltrb, "bbox_ctrness": centerness}
    found = model.postprocess_detections(heads, anchors, [image_size] * images)
    boxes = logits[0].new_zeros(images, OPTIONS.max_detections, 4)
    scores, labels = boxes.new_zeros(boxes.shape[:2]), boxes.new_full(boxes.shape[:2], -1)
    for i, image in enumerate(found):
        count = len(image["scores"])
        boxes[i, :count], scores[i, :count] = image["boxes"], image["scores"]
        labels[i, :count] = image["labels"]
    return boxes, scores, labels, torch.tensor([len(image["scores"]) for image in found])


def cases(device: torch.device, quick: bool = False) -> Sequence[Case]:
    threads = [None] if device.type == "cuda" else [1] if quick else [1, 2]
    layouts = ["channels_last"] if quick else ["channels_last", "contiguous"]
    return [
        make_case(device, candidates, layout, number, (256, 320) if quick else shapes.IMAGE_SIZE)
        for number, layout, candidates in itertools.product(threads, layouts, [FEW, MANY])
    ]


def make_case(
    device: torch.device,
    candidates: int,
    layout: str,
    threads: int | None,
    image_size: tuple[int, int],
    images: int | None = None,
    classes: int = shapes.NUM_CLASSES,
) -> Case:
    images = images or (16 if device.type == "cuda" else 2)
    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format

    def make_inputs(seed: int) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(seed)
        outputs = make_outputs(images, candidates, image_size, generator, classes)
        tensors = [x for levels in outputs for x in levels]
        return (image_size, *(x.to(device).contiguous(memory_format=memory) for x in tensors))

    locations = sum(-(-image_size[0] // s) * -(-image_size[1] // s) for s in shapes.STRIDES)
    settings: dict[str, object] = {"mode": "forward", "shape": [images, *image_size]}
    settings |= {"classes": classes, "candidates": candidates, "layout": layout, "dtype": "float32"}
    if threads is not None:
        settings["threads"] = threads
    return Case(
        settings=settings,
        device=device,
        make_inputs=make_inputs,
        providers={
            OURS: ours,
            "torchvision": torchvision_postprocess,
            "reference, eager": reference,
        },
        reference=lambda *args: tuple(x.double() for x in reference(*args)),
        tolerance=1e-5,
        # Logits and centerness are read, the distances of few locations, and little is written.
        bytes_moved=images * locations * (classes + 1) * 4,
        logits=images * locations * classes,
    )


if __name__ == "__main__":
    sys.exit(main(OP, cases))
