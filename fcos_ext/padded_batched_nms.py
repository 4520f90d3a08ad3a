"""Greedy non-maximum suppression of many images at once, in fixed shapes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._library import kernels, register
from .nms import _check, _pairwise_iou

_DEVICES = kernels("padded_batched_nms")


class PaddedKeep(NamedTuple):
    """What :func:`padded_batched_nms` keeps of each image."""

    keep: Tensor
    """int64 [N, D]: indices into K in order of falling score, then -1."""
    counts: Tensor
    """int64 [N]: how many of the D are indices."""


def padded_batched_nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    iou_threshold: float,
    max_detections: int,
    *,
    class_agnostic: bool = False,
) -> PaddedKeep:
    """:func:`~fcos_ext.batched_nms` of every image of a batch, stopped at ``max_detections``.

    Shapes are fixed by the arguments and nothing waits for the device. Same rules as
    :func:`~fcos_ext.nms`; candidates with a negative label or a score of NaN or -inf are absent,
    which is how images with fewer than K candidates are padded.

    Args:
        boxes (Tensor[N, K, 4]): x0, y0, x1, y1; any floating dtype.
        scores (Tensor[N, K]): any floating dtype, in any order, compared in that dtype.
        labels (Tensor[N, K]): class of each candidate, integers; only equal ones suppress.
        iou_threshold: in [0, 1].
        max_detections: D, at least 1.
        class_agnostic: boxes of all classes suppress each other.

    Returns:
        PaddedKeep: keep (Tensor[N, D]) and counts (Tensor[N]). Not differentiable.

    Raises:
        TypeError: boxes or scores are not floating point, or labels are not integers.
        ValueError: shapes or devices do not agree, or a number is out of its range.
    """
    if boxes.device.type not in _DEVICES:
        return padded_batched_nms_ref(
            boxes, scores, labels, iou_threshold, max_detections, class_agnostic=class_agnostic
        )
    _check_padded("padded_batched_nms", boxes, scores, labels, iou_threshold, max_detections)
    # Halves are float32 numbers too, so that this changes no comparison.
    if scores.dtype != torch.float64:
        scores = scores.float()
    if labels.dtype != torch.int32:
        labels = labels.long()
    return PaddedKeep(
        *torch.ops.fcos_ext.padded_batched_nms(
            boxes.detach().float(),
            scores.detach(),
            labels,
            iou_threshold,
            max_detections,
            class_agnostic,
        )
    )


@torch.no_grad()
def padded_batched_nms_ref(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    iou_threshold: float,
    max_detections: int,
    *,
    class_agnostic: bool = False,
) -> PaddedKeep:
    """Same contract as :func:`padded_batched_nms`, in plain PyTorch, D steps for all images."""
    _check_padded("padded_batched_nms", boxes, scores, labels, iou_threshold, max_detections)
    num_images, num_candidates = scores.shape
    boxes = boxes.to(torch.float32)
    index = torch.arange(num_candidates, device=boxes.device)
    # -inf marks who is absent, and below also who has been kept or suppressed.
    left = scores.masked_fill((labels < 0) | scores.isnan(), -torch.inf)
    groups = torch.zeros_like(labels) if class_agnostic else labels

    steps = min(max_detections, num_candidates)
    columns = []
    for _ in range(steps):
        # argmax documents that it returns the first of equal maxima.
        best = left.argmax(dim=1, keepdim=True)
        found = left.gather(1, best) > -torch.inf
        columns.append(torch.where(found, best, -1))
        best_box = boxes.gather(1, best[..., None].expand(-1, -1, 4))
        overlapping = _pairwise_iou(best_box, boxes)[:, 0] > iou_threshold
        leaving = (overlapping & (groups == groups.gather(1, best))) | (index == best)
        left = left.masked_fill(leaving, -torch.inf)
    columns.append(index.new_full((num_images, max_detections - steps), -1))
    keep = torch.cat(columns, dim=1)
    return PaddedKeep(keep, (keep >= 0).sum(dim=1))


def _check_padded(
    op: str,
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    iou_threshold: float,
    max_detections: int,
) -> None:
    _check(op, boxes, scores, ("labels", labels), iou_threshold, dims=2)
    if max_detections < 1:
        raise ValueError(f"{op}: max_detections must be at least 1, got {max_detections}")


def _fake(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    iou_threshold: float,
    max_detections: int,
    class_agnostic: bool,
) -> tuple[Tensor, Tensor]:
    num_images = boxes.shape[0]
    keep = boxes.new_empty((num_images, max_detections), dtype=torch.int64)
    return keep, boxes.new_empty((num_images,), dtype=torch.int64)


register("padded_batched_nms", fake=_fake)
