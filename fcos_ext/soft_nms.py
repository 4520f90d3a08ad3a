"""Soft non-maximum suppression: overlapping boxes lose score instead of being dropped.

Bodla et al., "Soft-NMS: Improving Object Detection With One Line of Code",
https://arxiv.org/abs/1704.04503.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ._library import kernels, register
from .nms import _check, _pairwise_iou

_DEVICES = kernels("soft_nms")

Method = Literal["linear", "gaussian"]


class PaddedSoftKeep(NamedTuple):
    """What :func:`padded_soft_nms` selects of each image."""

    keep: Tensor
    """int64 [N, D]: indices into K in order of selection, then -1."""
    scores: Tensor
    """[N, D], dtype of the scores given: decayed scores, falling, then 0."""
    counts: Tensor
    """int64 [N]: how many of the D are indices."""


def padded_soft_nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    iou_threshold: float,
    max_detections: int,
    *,
    sigma: float = 0.5,
    score_threshold: float = 0.001,
    method: Method = "linear",
    class_agnostic: bool = False,
) -> PaddedSoftKeep:
    """:func:`soft_nms` of every image of a batch, in fixed shapes, without waiting for the device.

    Candidates with a negative label are absent, which is how images with fewer than K candidates
    are padded.

    Args:
        boxes (Tensor[N, K, 4]): x0, y0, x1, y1; any floating dtype, used as float32.
        scores (Tensor[N, K]): any floating dtype, in any order, used as float32.
        labels (Tensor[N, K]): class of each candidate, integers; only equal ones decay each other.
        iou_threshold: in [0, 1]; of the linear method alone.
        max_detections: D, at least 1.
        sigma: above 0; of the gaussian method alone.
        score_threshold: finite, at least 0.
        method: "linear" or "gaussian".
        class_agnostic: boxes of all classes decay each other.

    Returns:
        PaddedSoftKeep: keep (Tensor[N, D]), scores (Tensor[N, D]) and counts (Tensor[N]). Not
        differentiable.

    Raises:
        TypeError: boxes or scores are not floating point, or labels are not integers.
        ValueError: shapes or devices do not agree, or an argument is out of its range.
    """
    if boxes.device.type not in _DEVICES:
        return padded_soft_nms_ref(
            boxes,
            scores,
            labels,
            iou_threshold,
            max_detections,
            sigma=sigma,
            score_threshold=score_threshold,
            method=method,
            class_agnostic=class_agnostic,
        )
    _check("padded_soft_nms", boxes, scores, ("labels", labels), iou_threshold, dims=2)
    _check_numbers("padded_soft_nms", sigma, score_threshold, method, max_detections)
    keep, kept_scores, counts = torch.ops.fcos_ext.soft_nms(
        boxes.detach().float(),
        scores.detach().float().masked_fill(labels < 0, 0),
        None if class_agnostic else labels.long(),
        iou_threshold,
        sigma,
        score_threshold,
        method == "gaussian",
        max_detections,
    )
    return PaddedSoftKeep(keep, kept_scores.to(scores.dtype), counts)


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor | None,
    iou_threshold: float,
    sigma: float = 0.5,
    score_threshold: float = 0.001,
    method: Method = "linear",
    max_detections: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Select the best box, lower the scores of those that it overlaps, and start again.

    Every score s of its group that is left becomes, with IoU as in :func:`~fcos_ext.nms`,

    - "linear": ``s (1 - iou)`` where ``iou > iou_threshold``,
    - "gaussian": ``s exp(-iou^2 / sigma)`` whatever the IoU is.

    Decided, alike on all devices: of equal scores the lower index is selected first. A box whose
    score is not above ``score_threshold``, from the start or once decayed, or is NaN, is dropped
    and changes no other. Empty boxes, boxes that are inside out, or have a NaN or infinite
    coordinate or area, neither decay others nor are decayed. All is computed in float32, each
    operation rounded, and the threshold is one. The kernels agree to the bit; with the gaussian
    method the last bits of their exp may differ from those of the reference, which only matters to
    boxes whose scores are as close to each other, or to the threshold.

    The number of results depends on the data: this waits for the device, :func:`padded_soft_nms`
    does not.

    Args:
        boxes (Tensor[K, 4]): x0, y0, x1, y1; any floating dtype, used as float32.
        scores (Tensor[K]): any floating dtype, used as float32.
        idxs (Tensor[K]): group of each box, usually its class: any integers. None: one group.
        iou_threshold: in [0, 1]; of the linear method alone.
        sigma: above 0; of the gaussian method alone. 0.5 is the paper's.
        score_threshold: finite, at least 0.
        method: "linear" or "gaussian".
        max_detections: how many to select at most; None: all.

    Returns:
        tuple[Tensor, Tensor]: int64 indices, and decayed scores in the dtype of the scores, in
        order of selection, which is that of falling scores. Not differentiable.

    Raises:
        TypeError: boxes or scores are not floating point, or idxs are not integers.
        ValueError: shapes or devices do not agree, or an argument is out of its range.
    """
    if boxes.device.type not in _DEVICES:
        return soft_nms_ref(
            boxes, scores, idxs, iou_threshold, sigma, score_threshold, method, max_detections
        )
    limit = _check_single(
        boxes, scores, idxs, iou_threshold, sigma, score_threshold, method, max_detections
    )
    results = torch.ops.fcos_ext.soft_nms(
        boxes.detach().float()[None],
        scores.detach().float()[None],
        None if idxs is None else idxs.long()[None],
        iou_threshold,
        sigma,
        score_threshold,
        method == "gaussian",
        limit,
    )
    return _first_image(results, scores.dtype)


@torch.no_grad()
def padded_soft_nms_ref(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    iou_threshold: float,
    max_detections: int,
    *,
    sigma: float = 0.5,
    score_threshold: float = 0.001,
    method: Method = "linear",
    class_agnostic: bool = False,
) -> PaddedSoftKeep:
    """Same contract as :func:`padded_soft_nms`, in plain PyTorch, D steps for all images."""
    _check("padded_soft_nms", boxes, scores, ("labels", labels), iou_threshold, dims=2)
    _check_numbers("padded_soft_nms", sigma, score_threshold, method, max_detections)
    keep, kept_scores, counts = _select(
        boxes.float(),
        scores.float().masked_fill(labels < 0, 0),
        None if class_agnostic else labels,
        iou_threshold,
        sigma,
        score_threshold,
        method == "gaussian",
        max_detections,
    )
    return PaddedSoftKeep(keep, kept_scores.to(scores.dtype), counts)


@torch.no_grad()
def soft_nms_ref(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor | None,
    iou_threshold: float,
    sigma: float = 0.5,
    score_threshold: float = 0.001,
    method: Method = "linear",
    max_detections: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as :func:`soft_nms`, in plain PyTorch."""
    limit = _check_single(
        boxes, scores, idxs, iou_threshold, sigma, score_threshold, method, max_detections
    )
    results = _select(
        boxes.float()[None],
        scores.float()[None],
        None if idxs is None else idxs[None],
        iou_threshold,
        sigma,
        score_threshold,
        method == "gaussian",
        limit,
    )
    return _first_image(results, scores.dtype)


def _select(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor | None,
    iou_threshold: float,
    sigma: float,
    score_threshold: float,
    gaussian: bool,
    max_detections: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the operator does, with float32 boxes [N, K, 4] and scores [N, K]."""
    num_images, num_candidates = scores.shape
    index = torch.arange(num_candidates, device=boxes.device)
    # 0 stands for a score that is out of the running, NaN among them.
    left = torch.where(scores > score_threshold, scores, 0)
    # Out-of-place arithmetic with 0-d float32 tensors rounds like float32.
    variance = left.new_full((), sigma)
    columns, values = [], []
    steps = min(max_detections, num_candidates)
    for _ in range(steps):
        # argmax documents that it returns the first of equal maxima.
        best = left.argmax(dim=1, keepdim=True)
        score = left.gather(1, best)
        columns.append(torch.where(score > 0, best, -1))
        values.append(score)
        iou = _pairwise_iou(boxes.gather(1, best[..., None].expand(-1, -1, 4)), boxes)[:, 0]
        if gaussian:
            decays, factor = iou > 0, torch.exp(-(iou * iou / variance))
        else:
            decays, factor = iou > iou_threshold, 1 - iou
        if groups is not None:
            decays = decays & (groups == groups.gather(1, best))
        left = torch.where(decays & (score > 0), left * factor, left)
        left = torch.where((left > score_threshold) & (index != best), left, 0)
    rest = max_detections - steps
    columns.append(index.new_full((num_images, rest), -1))
    values.append(left.new_zeros((num_images, rest)))
    keep = torch.cat(columns, dim=1)
    return keep, torch.cat(values, dim=1), (keep >= 0).sum(dim=1)


def _first_image(
    results: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    keep, scores, counts = results
    count = int(counts[0])
    return keep[0, :count], scores[0, :count].to(dtype)


def _check_single(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor | None,
    iou_threshold: float,
    sigma: float,
    score_threshold: float,
    method: str,
    max_detections: int | None,
) -> int:
    """Raise unless all is in order, and return how many boxes to select at most."""
    groups = None if idxs is None else ("idxs", idxs)
    _check("soft_nms", boxes, scores, groups, iou_threshold, dims=1)
    limit = max(1, len(boxes)) if max_detections is None else max_detections
    _check_numbers("soft_nms", sigma, score_threshold, method, limit)
    return limit


def _check_numbers(
    op: str, sigma: float, score_threshold: float, method: str, max_detections: int
) -> None:
    if max_detections < 1:
        raise ValueError(f"{op}: max_detections must be at least 1, got {max_detections}")
    if not 0 < sigma < float("inf"):
        raise ValueError(f"{op}: sigma must be finite and above 0, got {sigma}")
    if not 0 <= score_threshold < float("inf"):
        raise ValueError(
            f"{op}: score_threshold must be finite and at least 0, got {score_threshold}"
        )
    if method not in ("linear", "gaussian"):
        raise ValueError(f"{op}: method must be 'linear' or 'gaussian', got {method!r}")


def _fake(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor | None,
    iou_threshold: float,
    sigma: float,
    score_threshold: float,
    gaussian: bool,
    max_detections: int,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (boxes.shape[0], max_detections)
    keep = boxes.new_empty(shape, dtype=torch.int64)
    counts = boxes.new_empty(shape[:1], dtype=torch.int64)
    return keep, boxes.new_empty(shape, dtype=torch.float32), counts


register("soft_nms", fake=_fake)
