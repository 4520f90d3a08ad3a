"""From the network's outputs to detections, in fixed shapes and without waiting for the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import fcos_ext

from .config import ModelConfig, PostprocessConfig
from .locations import level_locations
from .model import Predictions


class PaddedDetections(NamedTuple):
    """Detections of N images, at most D each, best first. Rows from ``counts`` on are padding."""

    boxes: Tensor
    """Tensor[N, D, 4]: xyxy in pixels of the original image, inside it."""
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
        model: strides and the unit of the distances.
        config: thresholds and limits.

    Candidates whose score or box is not finite are dropped.
    """
    candidates = [
        _select(logits, ltrb, centerness, stride, model.normalize_ltrb, config)
        for logits, ltrb, centerness, stride in zip(*predictions, model.strides, strict=True)
    ]
    boxes = torch.cat([boxes for boxes, _, _ in candidates], dim=1)
    scores = torch.cat([scores for _, scores, _ in candidates], dim=1)
    labels = torch.cat([labels for _, _, labels in candidates], dim=1)

    limit = image_sizes.to(boxes).flip(-1).repeat(1, 2).unsqueeze(1)  # [N, 1, (w, h, w, h)]
    finite = boxes.isfinite().all(dim=-1)  # asked before clipping makes infinity a number
    boxes = torch.minimum(boxes.clamp(min=0), limit)
    has_area = (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])
    valid = (scores > 0) & has_area & finite
    labels = torch.where(valid, labels, -1)

    keep, counts = fcos_ext.padded_batched_nms(
        boxes, scores, labels, config.iou_threshold, config.max_detections
    )
    index = keep.clamp(min=0)
    padding = keep < 0
    scale = (original_sizes.to(boxes) / image_sizes.to(boxes)).flip(-1).repeat(1, 2).unsqueeze(1)
    boxes = boxes.gather(1, index.unsqueeze(-1).expand(-1, -1, 4)) * scale
    scores = scores.gather(1, index)
    if config.score == "sqrt":
        scores = scores.clamp(min=0).sqrt()
    return PaddedDetections(
        boxes.masked_fill(padding.unsqueeze(-1), 0),
        scores.masked_fill(padding, 0),
        labels.gather(1, index).masked_fill(padding, -1),
        counts,
    )


def _select(
    logits: Tensor,
    ltrb: Tensor,
    centerness: Tensor,
    stride: int,
    normalized: bool,
    config: PostprocessConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """Best candidates of one level: boxes [N, K, 4], products of scores [N, K] or -1, labels."""
    num_images, num_classes, height, width = logits.shape
    cls = logits.float().sigmoid().flatten(2)
    product = cls * centerness.float().sigmoid().flatten(2)
    # not a number is more than any number to topk
    candidate = (cls > config.score_threshold) & product.isfinite()
    product = torch.where(candidate, product, -1.0).transpose(1, 2).flatten(1)  # [N, HW * C]
    count = min(config.topk_candidates, product.shape[1])
    scores, flat = product.topk(count, dim=1)
    # In index order, so that of equal scores the first location, then the first class, goes first
    # in the suppression. topk promises no order among equals.
    flat, order = flat.sort(dim=1)
    scores = scores.gather(1, order)
    location, labels = flat // num_classes, flat % num_classes

    distances = ltrb.float().flatten(2).transpose(1, 2)
    if normalized:
        distances = distances * stride
    distances = distances.gather(1, location.unsqueeze(-1).expand(-1, -1, 4))
    center = level_locations((height, width), stride, logits.device)[location]
    boxes = torch.cat([center - distances[..., :2], center + distances[..., 2:]], dim=-1)
    return boxes, scores, labels
