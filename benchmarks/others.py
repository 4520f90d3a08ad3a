"""What other libraries have for the same: nothing where a library is not installed.

mmcv, apex, fvcore and detectron2; none of them is needed. The name of a provider holds the version
of its library. All pass the same check as the others before they are timed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .harness import Results

ALPHA, GAMMA = 0.25, 2.0
#: Of the authors' center sampling, in strides.
RADIUS = 1.5
#: From rows of logits or levels, labels (-1: background), one-hot targets, number of positives.
Loss = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
#: From boxes, scores, groups, whether there is but one group, and the number to keep.
Nms = Callable[[Tensor, Tensor, Tensor, bool, int | None], Tensor]


def library(name: str, module: str) -> Any:
    """The module of an installed library, else None; one that cannot be loaded counts as missing,
    such as mmcv without its compiled part."""
    try:
        importlib.import_module(name)
        return importlib.import_module(module)
    except ImportError:
        return None


def named(name: str, what: str = "") -> str:
    """Name and version, for people."""
    version = getattr(importlib.import_module(name), "__version__", None)
    if version is None:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "of no version"
    return f"{name} {version}{what and ', '}{what}"


def as_rows(logits: Any) -> Tensor:
    """Levels [N, C, H, W] as their detectors put them together; rows [L, C] as they are."""
    if isinstance(logits, Tensor):
        return logits
    return torch.cat([x.flatten(2).transpose(1, 2) for x in logits], dim=1).flatten(0, 1)


def focal_losses(device: torch.device, dtype: torch.dtype, num_classes: int) -> dict[str, Loss]:
    """Sums over all, divided by the number of positives. mmcv's and apex's are for GPUs, and know
    no bfloat16; apex's takes rows of whole 16 bytes."""
    found: dict[str, Loss] = {}
    if fvcore := library("fvcore", "fvcore.nn"):

        def jit(logits: Any, labels: Tensor, one_hot: Tensor, count: Tensor) -> Tensor:
            rows = as_rows(logits)
            loss = fvcore.sigmoid_focal_loss_jit(rows, one_hot, ALPHA, GAMMA, "sum")
            return loss / count.clamp(min=1)

        found[named("fvcore", "one-hot given")] = jit
    on_gpu = device.type == "cuda" and dtype is not torch.bfloat16
    if on_gpu and (mmcv := library("mmcv", "mmcv.ops")):

        def theirs(logits: Any, labels: Tensor, one_hot: Tensor, count: Tensor) -> Tensor:
            background_last = labels.flatten() % (num_classes + 1)  # -1 becomes C
            rows = as_rows(logits)
            loss = mmcv.sigmoid_focal_loss(rows, background_last, GAMMA, ALPHA, None, "sum")
            return loss / count.clamp(min=1)

        found[named("mmcv")] = theirs
    whole = num_classes * dtype.itemsize % 16 == 0
    if on_gpu and whole and (apex := library("apex", "apex.contrib.focal_loss.focal_loss")):

        def fused(logits: Any, labels: Tensor, one_hot: Tensor, count: Tensor) -> Tensor:
            positives = count.clamp(min=1).float().view(1)
            rows = as_rows(logits)
            return apex.focal_loss(rows, labels.flatten(), positives, num_classes, ALPHA, GAMMA)

        found[named("apex")] = fused
    return found


def nms(iou_threshold: float) -> dict[str, Nms]:
    """Of one group and of several."""
    found: dict[str, Nms] = {}
    if mmcv := library("mmcv", "mmcv.ops"):

        def theirs(
            boxes: Tensor, scores: Tensor, groups: Tensor, one: bool, limit: int | None
        ) -> Tensor:
            if one:
                _, keep = mmcv.nms(boxes, scores, iou_threshold)
            else:
                settings = {"type": "nms", "iou_threshold": iou_threshold}
                _, keep = mmcv.batched_nms(boxes, scores, groups, settings)
            return keep[:limit]

        found[named("mmcv")] = theirs
    if detectron2 := library("detectron2", "detectron2.layers"):

        def batched(
            boxes: Tensor, scores: Tensor, groups: Tensor, one: bool, limit: int | None
        ) -> Tensor:
            if one:
                return detectron2.nms(boxes, scores, iou_threshold)[:limit]
            return detectron2.batched_nms(boxes, scores, groups, iou_threshold)[:limit]

        found[named("detectron2")] = batched
    return found


def assignments(
    images: int, boxes_per_image: int, locations_per_level: Sequence[int]
) -> dict[str, Callable[..., Results]]:
    """Labels of all locations [N, L], -1 for background, from boxes of all images, their labels,
    offsets, and the anchors of a stride's size around the locations. detectron2's, without the
    network of its detector."""
    name = "detectron2.modeling.meta_arch.fcos"
    if not (theirs := library("detectron2", name)):
        return {}
    structures = importlib.import_module("detectron2.structures")
    background = boxes_per_image  # one more than the highest label
    detector = SimpleNamespace(center_sampling_radius=RADIUS, num_classes=background)
    detector._match_anchors = functools.partial(theirs.FCOS._match_anchors, detector)

    def assign(boxes: Tensor, labels: Tensor, offsets: Tensor, anchors: Tensor, *_: Any) -> Results:
        # As its users have them: instances of each image, anchors of each level.
        instances = [
            structures.Instances((1, 1), gt_boxes=structures.Boxes(b), gt_classes=c)
            for b, c in zip(
                boxes.view(images, boxes_per_image, 4),
                labels.view(images, boxes_per_image),
                strict=True,
            )
        ]
        levels = [structures.Boxes(level) for level in anchors.split(list(locations_per_level))]
        found, _ = theirs.FCOS.label_anchors(detector, levels, instances)
        stacked = torch.stack(found)
        return (torch.where(stacked == background, -1, stacked),)

    return {named("detectron2"): assign}
