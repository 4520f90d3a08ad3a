"""The specification of box_and_centerness_loss: results, argument rules, formula in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ._levels import check_levels, check_normalizers, check_parts, flatten, sum_dtype
from ._ltrb import (
    NORMALIZER_FLOOR,
    IoUKind,
    check_options,
    check_row_targets,
    check_rows,
    overlap,
    row_loss,
)

Quality = Literal["centerness", "iou"]

_OP = "box_and_centerness_loss"
_QUALITIES = get_args(Quality)


class BoxAndCenternessLoss(NamedTuple):
    """Sums over the positive locations, each a 0-d tensor; all are 0 if there are none."""

    box: Tensor
    """Overlap losses, each times its weight. Differentiable in ``pred``."""
    centerness: Tensor
    """Cross-entropies. Differentiable in ``centerness``."""
    weight: Tensor
    """Weights of ``box``: of centerness targets, or, unweighted, of ones."""
    num_pos: Tensor
    """int64: how many locations are positive."""
    num_ignored: Tensor
    """int64: how many have a label below -1 or, with ``num_classes``, above the last class."""


def box_and_centerness_loss_ref(
    pred: Tensor | Sequence[Tensor],
    centerness: Tensor | Sequence[Tensor],
    target: Tensor,
    labels: Tensor,
    *,
    centerness_target: Tensor | None = None,
    weighted: bool = True,
    quality: Quality = "centerness",
    kind: IoUKind = "giou",
    smooth: float = 0.0,
    eps: float = 1e-7,
    num_classes: int | None = None,
    normalizers: Tensor | None = None,
    fused_gradient: bool = False,
) -> BoxAndCenternessLoss:
    """Same contract as :func:`box_and_centerness_loss`, in plain PyTorch, differentiable twice.

    ``fused_gradient`` has no effect.
    """
    check_arguments(
        pred,
        centerness,
        target,
        labels,
        centerness_target,
        quality,
        kind,
        smooth,
        eps,
        num_classes,
        normalizers,
    )
    rows = pred if isinstance(pred, Tensor) else flatten(pred)
    scores = centerness if isinstance(centerness, Tensor) else flatten(centerness).squeeze(-1)
    dtype = sum_dtype(rows)
    labels = labels.to(torch.int64)  # to be compared with any number of classes
    ignored = labels < -1
    if num_classes is not None:
        ignored = ignored | (labels >= num_classes)
    positive = (labels >= 0) & ~ignored
    # Masking the results alone would leave 0 * NaN in the gradients, so the inputs are masked too.
    p = torch.where(positive[..., None], rows.to(dtype), 1.0)
    t = torch.where(positive[..., None], target.detach().to(dtype), 1.0)
    x = torch.where(positive, scores.to(dtype), 0.0)
    if centerness_target is None:
        c = _centerness(t)
    else:
        c = torch.where(positive, centerness_target.detach().to(dtype), 0.0)
    weight = c if weighted else torch.ones_like(c)
    q = overlap(p.detach(), t, smooth, eps) if quality == "iou" else c

    def total(values: Tensor) -> Tensor:
        return torch.where(positive, values, 0.0).sum()

    box = total(row_loss(p, t, kind, smooth, eps) * weight)
    entropy = total(F.binary_cross_entropy_with_logits(x, q, reduction="none"))
    if normalizers is not None:
        count, weights = normalizers.detach().to(dtype).unbind()
        entropy = entropy / count.clamp(min=1)
        box = box / (weights.clamp(min=NORMALIZER_FLOOR) if weighted else count.clamp(min=1))
    return BoxAndCenternessLoss(box, entropy, total(weight), positive.sum(), ignored.sum())


def _centerness(ltrb: Tensor) -> Tensor:
    """Centerness [...] of locations with distances [..., 4]; 0 outside of the box."""
    l_, t_, r_, b_ = ltrb.unbind(-1)

    def balance(a: Tensor, b: Tensor) -> Tensor:
        low, high = torch.minimum(a, b), torch.maximum(a, b)
        empty = high <= 0
        return torch.where(empty, 0.0, low.clamp(min=0) / torch.where(empty, 1.0, high))

    return torch.sqrt(balance(l_, r_) * balance(t_, b_))


def check_arguments(
    pred: Tensor | Sequence[Tensor],
    centerness: Tensor | Sequence[Tensor],
    target: Tensor,
    labels: Tensor,
    centerness_target: Tensor | None,
    quality: str,
    kind: str,
    smooth: float,
    eps: float,
    num_classes: int | None,
    normalizers: Tensor | None,
) -> None:
    if isinstance(pred, Tensor) and isinstance(centerness, Tensor):
        per_row = {"centerness": centerness, "centerness_target": centerness_target}
        check_rows(_OP, pred, target, labels, per_row)
        device = pred.device
    elif isinstance(pred, Tensor) or isinstance(centerness, Tensor):
        raise TypeError(
            f"{_OP}: pred and centerness must both be tensors or both levels, got "
            f"{type(pred).__name__} and {type(centerness).__name__}"
        )
    else:
        _check_levels(pred, centerness, target, labels, centerness_target)
        device = pred[0].device
    check_options(_OP, kind, smooth, eps)
    if quality not in _QUALITIES:
        raise ValueError(f"{_OP}: quality must be one of {_QUALITIES}, got {quality!r}")
    if num_classes is not None and num_classes < 0:
        raise ValueError(f"{_OP}: num_classes must be >= 0, got {num_classes}")
    if normalizers is None:
        return
    check_normalizers(_OP, "normalizers", normalizers)
    if normalizers.device != device:
        raise ValueError(
            f"{_OP}: normalizers must be on the device of pred, {device}, got {normalizers.device}"
        )


def _check_levels(
    pred: Sequence[Tensor],
    centerness: Sequence[Tensor],
    target: Tensor,
    labels: Tensor,
    centerness_target: Tensor | None,
) -> None:
    images, locations = check_levels(_OP, "pred", pred, channels=4)
    check_levels(_OP, "centerness", centerness, channels=1)
    check_parts(_OP, {"pred": pred, "centerness": centerness})
    per_row = {"centerness_target": centerness_target}
    check_row_targets(_OP, (images, locations), pred[0].device, target, labels, per_row)
