"""Greedy non-maximum suppression: torchvision's two functions."""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import kernels, register_constant

_DEVICES = kernels("nms")

# Ranks decided together, and ranks tested against them at once: the temporaries of pairwise IoU
# are bounded, whatever the number of boxes.
_BLOCK = 128
_CHUNK = 4096


def nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float, *, max_detections: int | None = None
) -> Tensor:
    """Keep boxes in order of falling score, dropping each that overlaps a kept one too much.

    With A, B the areas (x1 - x0)(y1 - y0) and I = max(min x1 - max x0, 0) max(min y1 - max y0, 0),
    a kept box suppresses a lower-ranked one if I / (A + B - I) > iou_threshold. This is
    torchvision's ``nms``, with every corner case decided, alike on all devices:

    - of equal scores the lower index comes first; boxes with a NaN score are dropped;
    - IoU and threshold are compared as float32, on boxes rounded to float32. (On a CPU torchvision
      compares with a float64 threshold, so at 0.6 it drops a box whose IoU is 0.6 as a float32.)
    - boxes that are empty, inside out, or have a NaN or infinite coordinate or area neither
      suppress nor are suppressed: their IoU is 0 or NaN.

    Args:
        boxes (Tensor[K, 4]): x0, y0, x1, y1; any floating dtype.
        scores (Tensor[K]): any floating dtype, compared in that dtype.
        iou_threshold: in [0, 1].
        max_detections: stop when so many boxes are kept, at least 1; None: keep all.

    Returns:
        Tensor: int64 indices of the kept boxes, highest score first. Not differentiable.

    Raises:
        TypeError: boxes or scores are not floating point.
        ValueError: shapes or devices do not agree, or a number is out of its range.
    """
    _check("nms", boxes, scores, None, iou_threshold, dims=1)
    limit = _limit("nms", max_detections)
    if boxes.device.type not in _DEVICES:
        return nms_ref(boxes, scores, iou_threshold, max_detections=max_detections)
    return torch.ops.fcos_ext.nms(boxes, scores, None, iou_threshold, limit)


def batched_nms(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor,
    iou_threshold: float,
    *,
    max_detections: int | None = None,
) -> Tensor:
    """:func:`nms` in which only boxes of the same group suppress each other.

    The result is torchvision's, but groups are compared as integers instead of moving their boxes
    apart, which costs coordinates their precision (an IoU is then off by up to 0.002 at group 79)
    and goes wrong with negative or infinite ones.

    Args:
        boxes (Tensor[K, 4]): x0, y0, x1, y1; any floating dtype.
        scores (Tensor[K]): any floating dtype, compared in that dtype.
        idxs (Tensor[K]): group of each box, usually its class: any integers, negative ones too.
        iou_threshold: in [0, 1].
        max_detections: stop when so many boxes are kept, at least 1; None: keep all.

    Returns:
        Tensor: int64 indices of the kept boxes, highest score first. Not differentiable.

    Raises:
        TypeError: boxes or scores are not floating point, or idxs are not integers.
        ValueError: shapes or devices do not agree, or a number is out of its range.
    """
    _check("batched_nms", boxes, scores, ("idxs", idxs), iou_threshold, dims=1)
    limit = _limit("batched_nms", max_detections)
    if boxes.device.type not in _DEVICES:
        return batched_nms_ref(boxes, scores, idxs, iou_threshold, max_detections=max_detections)
    return torch.ops.fcos_ext.nms(boxes, scores, idxs.to(torch.int64), iou_threshold, limit)


@torch.no_grad()
def nms_ref(
    boxes: Tensor, scores: Tensor, iou_threshold: float, *, max_detections: int | None = None
) -> Tensor:
    """Same contract as :func:`nms`, in plain PyTorch."""
    _check("nms", boxes, scores, None, iou_threshold, dims=1)
    limit = _limit("nms", max_detections)
    groups = torch.zeros_like(scores, dtype=torch.int64)
    return _greedy(boxes, scores, groups, iou_threshold, limit)


@torch.no_grad()
def batched_nms_ref(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor,
    iou_threshold: float,
    *,
    max_detections: int | None = None,
) -> Tensor:
    """Same contract as :func:`batched_nms`, in plain PyTorch."""
    _check("batched_nms", boxes, scores, ("idxs", idxs), iou_threshold, dims=1)
    limit = _limit("batched_nms", max_detections)
    return _greedy(boxes, scores, idxs, iou_threshold, limit)


def _greedy(
    boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float, limit: int
) -> Tensor:
    """Kept indices of ``boxes`` [K, 4], in blocks of falling score; a negative limit is none."""
    ranks = torch.argsort(scores, descending=True, stable=True)
    ranks = ranks[~scores[ranks].isnan()]
    boxes = boxes.to(torch.float32)

    def suppresses(upper: Tensor, lower: Tensor) -> Tensor:
        iou = _pairwise_iou(boxes[upper], boxes[lower])
        # The comparison rounds the threshold to float32.
        return (iou > iou_threshold) & (groups[upper][:, None] == groups[lower])

    kept = [ranks[:0]]
    missing = len(ranks) if limit < 0 else limit
    while len(ranks) and missing > 0:
        block, rest = ranks[:_BLOCK], ranks[_BLOCK:]
        block = block[_resolve(suppresses(block, block).triu(diagonal=1))][:missing]
        kept.append(block)
        missing -= len(block)
        ranks = torch.cat(
            [chunk[~suppresses(block, chunk).any(dim=0)] for chunk in rest.split(_CHUNK)]
        )
    return torch.cat(kept)


def _resolve(suppresses: Tensor) -> Tensor:
    """Greedy choice within a block: bool [B], of ``suppresses`` [B, B], i over j for i < j only.

    Box j stays unless a box that stays suppresses it. As that depends on smaller indices alone,
    each pass over all boxes settles at least one more, and a pass without a change ends it.
    """
    stays = suppresses.new_ones(len(suppresses))
    while True:
        previous = stays
        stays = ~(suppresses & stays[:, None]).any(dim=0)
        if torch.equal(stays, previous):
            return stays


def _pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU [..., P, Q] of float32 boxes [..., P, 4] and [..., Q, 4]."""
    # One contiguous row for each coordinate: the pairs are then read in steps of one number.
    ax0, ay0, ax1, ay1 = a.movedim(-1, 0).contiguous()[..., :, None].unbind(0)
    bx0, by0, bx1, by1 = b.movedim(-1, 0).contiguous()[..., None, :].unbind(0)
    width = (torch.minimum(ax1, bx1) - torch.maximum(ax0, bx0)).clamp(min=0)
    height = (torch.minimum(ay1, by1) - torch.maximum(ay0, by0)).clamp(min=0)
    intersection = width * height
    area_a, area_b = (ax1 - ax0) * (ay1 - ay0), (bx1 - bx0) * (by1 - by0)
    return intersection / (area_a + area_b - intersection)


def _limit(op: str, max_detections: int | None) -> int:
    """As the operator takes it: -1 for no limit."""
    if max_detections is None:
        return -1
    if max_detections < 1:
        raise ValueError(f"{op}: max_detections must be at least 1, got {max_detections}")
    return max_detections


def _check(
    op: str,
    boxes: Tensor,
    scores: Tensor,
    groups: tuple[str, Tensor] | None,
    iou_threshold: float,
    dims: int,
) -> None:
    """Raise unless boxes are [*, 4] and scores and groups [*], with ``dims`` dimensions in *."""
    for name, tensor in (("boxes", boxes), ("scores", scores)):
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} must be floating point, got {tensor.dtype}")
    shape = "[K, 4]" if dims == 1 else "[N, K, 4]"
    if boxes.dim() != dims + 1 or boxes.shape[-1] != 4:
        raise ValueError(f"{op}: boxes must have shape {shape}, got {list(boxes.shape)}")
    others = [("scores", scores)] if groups is None else [("scores", scores), groups]
    for name, tensor in others:
        if tensor.shape != boxes.shape[:-1]:
            raise ValueError(
                f"{op}: {name} must have the shape of boxes without its last dimension, "
                f"{list(boxes.shape[:-1])}, got {list(tensor.shape)}"
            )
        if tensor.device != boxes.device:
            raise ValueError(
                f"{op}: {name} must be on the device of boxes, {boxes.device}, got {tensor.device}"
            )
    if groups is not None:
        name, tensor = groups
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError(f"{op}: {name} must be integers, got {tensor.dtype}")
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"{op}: iou_threshold must be in [0, 1], got {iou_threshold}")


def _fake(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor | None,
    iou_threshold: float,
    max_detections: int,
) -> Tensor:
    # How many are kept is only known from the values.
    count = torch.library.get_ctx().new_dynamic_size()
    return boxes.new_empty((count,), dtype=torch.int64)


register_constant("nms", fake=_fake)
