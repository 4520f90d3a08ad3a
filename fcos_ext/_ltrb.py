"""Boxes as distances (l, t, r, b): argument rules and formulas that the box losses share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

IoUKind = Literal["iou", "linear_iou", "giou", "diou", "ciou"]
KIND_NUMBERS = {kind: number for number, kind in enumerate(get_args(IoUKind))}

IOU_FLOOR = 1e-6
"""``-log(iou)`` is taken of at least this, so that the loss of disjoint boxes is 13.8, not inf."""
NORMALIZER_FLOOR = 1e-6
"""A sum of centerness may be well below 1, hence a floor that only keeps 0 out of the division."""


# ---- formulas -----------------------------------------------------------------------------------


def row_loss(pred: Tensor, target: Tensor, kind: str, smooth: float, eps: float) -> Tensor:
    """Loss of each row, [...], of ``pred`` and ``target`` [..., 4] in one dtype."""
    w_pred, h_pred = _sides(pred)
    w_target, h_target = _sides(target)
    w_common, h_common = _sides(torch.minimum(pred, target))
    w_around, h_around = _sides(torch.maximum(pred, target))

    intersection = w_common * h_common
    union = w_pred * h_pred + w_target * h_target - intersection
    iou = (intersection + smooth) / (union + smooth + eps)
    if kind == "iou":
        return -torch.log(torch.where(iou < IOU_FLOOR, IOU_FLOOR, iou))
    if kind == "linear_iou":
        return 1 - iou
    if kind == "giou":
        around = w_around * h_around
        return 1 - (iou - (around - union) / (around + eps))

    # The centre lies at ((r - l) / 2, (b - t) / 2) from the location.
    l_, t_, r_, b_ = pred.unbind(-1)
    gl, gt, gr, gb = target.unbind(-1)
    dx = ((r_ - l_) - (gr - gl)) / 2
    dy = ((b_ - t_) - (gb - gt)) / 2
    diagonal = w_around * w_around + h_around * h_around + eps
    diou = 1 - iou + (dx * dx + dy * dy) / diagonal
    if kind == "diou":
        return diou

    has_aspect = (w_pred > eps) & (h_pred > eps) & (w_target > eps) & (h_target > eps)
    # As above: the undefined quotients must not enter the graph at all.
    angle = _angle(w_target, h_target, has_aspect) - _angle(w_pred, h_pred, has_aspect)
    v = (4 / math.pi**2) * angle * angle
    alpha = (v / (1 - iou + v + eps)).detach()
    return diou + alpha * v


def overlap(pred: Tensor, target: Tensor, smooth: float, eps: float) -> Tensor:
    """IoU of each row, (I + smooth) / (U + smooth + eps) [...], of ``pred`` and ``target`` [..., 4]
    in one dtype."""
    w_pred, h_pred = _sides(pred)
    w_target, h_target = _sides(target)
    w_common, h_common = _sides(torch.minimum(pred, target))
    intersection = w_common * h_common
    union = w_pred * h_pred + w_target * h_target - intersection
    return (intersection + smooth) / (union + smooth + eps)


def _sides(ltrb: Tensor) -> tuple[Tensor, Tensor]:
    """Width and height [...] of boxes [..., 4], at least 0."""
    l_, t_, r_, b_ = ltrb.unbind(-1)
    width, height = l_ + r_, t_ + b_
    # not clamp(), whose gradient at exactly the limit is 1 or 0 by the version of PyTorch
    return torch.where(width < 0, 0.0, width), torch.where(height < 0, 0.0, height)


def _angle(width: Tensor, height: Tensor, defined: Tensor) -> Tensor:
    """atan(width / height) where ``defined``, the same constant elsewhere."""
    return torch.atan(torch.where(defined, width, 1.0) / torch.where(defined, height, 1.0))


# ---- argument rules -----------------------------------------------------------------------------


def check_rows(
    op: str,
    pred: Tensor,
    target: Tensor,
    labels: Tensor | None,
    per_row: dict[str, Tensor | None],
) -> None:
    """Raise unless boxes [..., 4], integer labels [...] and floating values [...] agree."""
    if pred.dim() == 0 or pred.shape[-1] != 4:
        raise ValueError(f"{op}: pred must have shape [..., 4], got {list(pred.shape)}")
    if not pred.is_floating_point():
        raise TypeError(f"{op}: pred must be floating point, got {pred.dtype}")
    check_row_targets(op, pred.shape[:-1], pred.device, target, labels, per_row)


def check_row_targets(
    op: str,
    rows: Sequence[int],
    device: torch.device,
    target: Tensor,
    labels: Tensor | None,
    per_row: dict[str, Tensor | None],
) -> None:
    """Raise unless they are of rows of this shape, and on this device."""
    if list(target.shape) != [*rows, 4]:
        raise ValueError(
            f"{op}: target must have the shape of pred, {[*rows, 4]}, got {list(target.shape)}"
        )
    for name, tensor in (("target", target), *per_row.items()):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} must be floating point, got {tensor.dtype}")
    if labels is not None and (
        labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool
    ):
        raise TypeError(f"{op}: labels must be integers, got {labels.dtype}")
    for name, tensor in (("labels", labels), *per_row.items()):
        if tensor is not None and list(tensor.shape) != list(rows):
            raise ValueError(
                f"{op}: {name} must have the shape of pred without its last dimension, "
                f"{list(rows)}, got {list(tensor.shape)}"
            )
    for name, tensor in (("target", target), ("labels", labels), *per_row.items()):
        if tensor is not None and tensor.device != device:
            raise ValueError(
                f"{op}: {name} must be on the device of pred, {device}, got {tensor.device}"
            )


def check_options(op: str, kind: str, smooth: float, eps: float) -> None:
    """Raise unless they are what :func:`iou_loss` takes."""
    if kind not in KIND_NUMBERS:
        raise ValueError(f"{op}: kind must be one of {tuple(KIND_NUMBERS)}, got {kind!r}")
    if not 0 <= smooth < math.inf:
        raise ValueError(f"{op}: smooth must be finite and >= 0, got {smooth}")
    if not 0 < eps < math.inf:
        raise ValueError(f"{op}: eps must be finite and > 0, got {eps}")
