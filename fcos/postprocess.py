"""From the network's outputs to detections, in fixed shapes and without waiting for the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import fcos_ext

from .config import ModelConfig, PostprocessConfig
from .locations import level_anchors
from .model import Predictions


class PaddedDetections(NamedTuple):
    """Detections of N images, at most D each, best first. Rows from ``counts`` on are padding."""

    boxes: Tensor
    """Tensor[N, D, 4]: xyxy in pixels of the original image, inside it; with ``model.corners``
    "pixels" their ends may be less than a pixel beyond."""
    scores: Tensor
    """Tensor[N, D]: final scores, descending; 0 in the padding."""
    labels: Tensor
    """Tensor[N, D]: int64, 0..C-1; -1 in the padding."""
    counts: Tensor
    """Tensor[N]: int64, detections of each image."""


def postprocess(
    predictions: Predictions,
    image_sizes: Tensor,
    original_sizes: Tensor,
    model: ModelConfig,
    config: PostprocessConfig,
) -> PaddedDetections:
    """Score, select, decode, clip, suppress, and scale back to the original image.

    Args:
        predictions: outputs of the network for N images.
        image_sizes (Tensor[N, 2]): (height, width) of the images as the network saw them, without
            their padding.
        original_sizes (Tensor[N, 2]): (height, width) that the boxes are scaled to.
        model: strides, places of the locations, the unit of the distances and where boxes end.
        config: thresholds and limits.

    Candidates whose score or box is not finite are dropped.
    """
    options = fcos_ext.PostprocessOptions(
        strides=tuple(model.strides),
        normalize_ltrb=model.normalize_ltrb,
        score=config.score,
        score_threshold=config.score_threshold,
        threshold_on=config.threshold_on,
        topk_candidates=config.topk_candidates,
        topk_by=config.topk_by,
        iou_threshold=config.iou_threshold,
        max_detections=config.max_detections,
        clip=config.clip == "before_nms",
        locations=model.locations,
        keep_empty=config.keep_empty,
        overlaps=config.overlaps,
        corners=model.corners,
    )
    device = predictions.logits[0].device
    # The sides of padded images are multiples of the finest strides.
    finest, stride = predictions.logits[0].shape, model.strides[0]
    padded_size = (finest[2] * stride, finest[3] * stride)
    anchors = None
    if model.locations == "torchvision" and torch.compiler.is_compiling():
        # Steps that follow from the size are numbers, for which the operator would be compiled
        # anew; tensors leave the size open.
        anchors = level_anchors(padded_size, model.strides, device)
    found = fcos_ext.postprocess(
        predictions,
        image_sizes.to(device, non_blocking=True),
        options,
        anchors=anchors,
        original_sizes=original_sizes.to(device, non_blocking=True),
        padded_size=padded_size if anchors is None else None,
    )
    padded = PaddedDetections(found.boxes, found.scores, found.labels, found.counts)
    if config.clip == "after_nms":
        padded = _clip(padded, original_sizes.to(device, non_blocking=True))
    return padded


def _clip(found: PaddedDetections, sizes: Tensor) -> PaddedDetections:
    """Boxes cut off at the border of the images; those that lie beyond become padding."""
    limit = sizes.to(found.boxes).flip(-1).repeat(1, 2).unsqueeze(1)  # [N, 1, (w, h, w, h)]
    boxes = found.boxes.clamp(min=0).minimum(limit)
    kept = (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])
    order = torch.argsort(~kept, dim=1, stable=True)
    kept = kept.gather(1, order)
    return PaddedDetections(
        (boxes.gather(1, order.unsqueeze(-1).expand_as(boxes)) * kept.unsqueeze(-1)),
        found.scores.gather(1, order) * kept,
        found.labels.gather(1, order).where(kept, -1),
        kept.sum(dim=1),
    )
