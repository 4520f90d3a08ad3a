"""IoU, GIoU, DIoU and CIoU losses on distances (l, t, r, b) to the sides of a box."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ._levels import sum_dtype
from ._library import kernels, register
from ._ltrb import KIND_NUMBERS, NORMALIZER_FLOOR, IoUKind, check_options, check_rows, row_loss

Reduction = Literal["none", "sum", "mean"]

_DEVICES = kernels("iou_loss")
_REDUCTIONS = {reduction: number for number, reduction in enumerate(get_args(Reduction))}


def iou_loss(
    pred: Tensor,
    target: Tensor,
    weights: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    kind: IoUKind = "giou",
    reduction: Reduction = "sum",
    normalizer: Tensor | None = None,
    smooth: float = 0.0,
    eps: float = 1e-7,
) -> Tensor:
    """Overlap loss between boxes given as distances from one common location.

    A location (x, y) with distances (l, t, r, b) stands for the box (x - l, y - t, x + r, y + b).
    Because both boxes of a row share their location, it cancels, and so does the unit: pixels or
    strides give the same loss (up to ``smooth`` and ``eps``). With sides and products of sides::

        w = max(l + r, 0)                       h = max(t + b, 0)            (each box; A, B = w h)
        I = max(min l + min r, 0) * max(min t + min b, 0)                    intersection
        U = A + B - I                                                        union
        C = max(max l + max r, 0) * max(max t + max b, 0)                    enclosing box, cw * ch
        iou = (I + smooth) / (U + smooth + eps)

        iou         -log(max(iou, 1e-6))                     UnitBox, arXiv 1608.01471
        linear_iou  1 - iou
        giou        1 - iou + (C - U) / (C + eps)            arXiv 1902.09630
        diou        1 - iou + d2 / (cw^2 + ch^2 + eps)       arXiv 1911.08287, d2: squared
                                                             distance of the two centres
        ciou        diou + alpha v                           same paper, with
                    v = 4 / pi^2 (atan(w_target / h_target) - atan(w_pred / h_pred))^2
                    alpha = v / (1 - iou + v + eps)          without gradient, as the paper says

    ``giou``, ``diou`` and ``ciou`` equal torchvision's losses of the decoded boxes. Two rules go
    beyond them. ``v`` is 0, with zero gradient, where a side is not longer than ``eps``, because
    the aspect of such a box is undefined (an all-zero prediction is what ReLU gives a dead
    location). And a box turned inside out counts as empty instead of having a negative side.
    ``smooth=1`` is the (I + 1) / (U + 1) of the first FCOS code; that one depends on the unit.

    The loss is differentiable in ``pred`` alone; ``target``, ``weights`` and ``normalizer`` get no
    gradient. At a tie of a min or max half the gradient goes to ``pred``; where an intersection
    side is exactly 0 the gradient is the one from the overlapping side. ``iou`` has zero gradient
    below its floor. The math is float32 (float64 if ``pred`` is float64) and rounded once.

    Args:
        pred (Tensor[..., 4]): predicted l, t, r, b; any floating dtype. Negative values are legal:
            the predicted box then does not contain the location.
        target (Tensor[..., 4]): true l, t, r, b; any floating dtype.
        weights (Tensor[...], optional): factor of each row's loss.
        labels (Tensor[...], optional): integers. Rows with a negative label contribute exactly 0
            and get exactly zero gradient, whatever NaN or inf they hold. None: every row counts.
        kind: which of the losses above.
        reduction: ``"none"``: each row's loss; ``"sum"``; ``"mean"``: the sum of the weighted
            losses over the number of rows that take part, 0 if there are none.
        normalizer (Tensor[], optional): the sum is divided by max(normalizer, 1e-6). Only with
            ``reduction="sum"``.
        smooth: added to intersection and union, >= 0, in the area unit of the inputs.
        eps: keeps divisions finite, > 0.

    Returns:
        Tensor[...] of ``pred``'s dtype for ``"none"``, otherwise Tensor[] in float32 (float64 if
        ``pred`` is float64). Non-finite values in a row that takes part show up in it.

    Raises:
        TypeError: a tensor has the wrong kind of dtype, or is not a tensor.
        ValueError: shapes or devices do not agree, or an option has an unknown value.
    """
    check_rows("iou_loss", pred, target, labels, {"weights": weights})
    check_options("iou_loss", kind, smooth, eps)
    _check_reduction(pred, reduction, normalizer)
    if pred.device.type not in _DEVICES:
        return iou_loss_ref(
            pred,
            target,
            weights,
            labels=labels,
            kind=kind,
            reduction=reduction,
            normalizer=normalizer,
            smooth=smooth,
            eps=eps,
        )
    if labels is not None and labels.dtype not in (torch.int64, torch.int32):
        labels = labels.to(torch.int64)
    if normalizer is not None and normalizer.dtype != (dtype := sum_dtype(pred)):
        normalizer = normalizer.to(dtype)
    loss, _ = torch.ops.fcos_ext.iou_loss(
        pred,
        target,
        weights,
        labels,
        normalizer,
        KIND_NUMBERS[kind],
        _REDUCTIONS[reduction],
        smooth,
        eps,
    )
    return loss


def iou_loss_ref(
    pred: Tensor,
    target: Tensor,
    weights: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    kind: IoUKind = "giou",
    reduction: Reduction = "sum",
    normalizer: Tensor | None = None,
    smooth: float = 0.0,
    eps: float = 1e-7,
) -> Tensor:
    """Same contract as :func:`iou_loss`, in differentiable PyTorch, without synchronisation."""
    check_rows("iou_loss", pred, target, labels, {"weights": weights})
    check_options("iou_loss", kind, smooth, eps)
    _check_reduction(pred, reduction, normalizer)
    dtype = sum_dtype(pred)
    p = pred.to(dtype)
    t = target.detach().to(dtype)
    taking_part = None if labels is None else labels >= 0
    if taking_part is not None:
        # Masking the result alone would leave 0 * NaN in the gradient, so the input is masked too.
        p = torch.where(taking_part[..., None], p, 1.0)
        t = torch.where(taking_part[..., None], t, 1.0)

    loss = row_loss(p, t, kind, smooth, eps)
    if weights is not None:
        loss = loss * weights.detach().to(dtype)
    if taking_part is not None:
        loss = torch.where(taking_part, loss, 0.0)

    if reduction == "none":
        return loss.to(pred.dtype)
    if reduction == "mean":
        if taking_part is None:
            return loss.sum() / max(loss.numel(), 1)
        return loss.sum() / taking_part.sum().clamp(min=1)
    if normalizer is None:
        return loss.sum()
    return loss.sum() / normalizer.detach().to(dtype).clamp(min=NORMALIZER_FLOOR)


def _check_reduction(pred: Tensor, reduction: str, normalizer: Tensor | None) -> None:
    if reduction not in _REDUCTIONS:
        raise ValueError(
            f"iou_loss: reduction must be one of {tuple(_REDUCTIONS)}, got {reduction!r}"
        )
    if normalizer is None:
        return
    if not isinstance(normalizer, Tensor):
        raise TypeError(
            f"iou_loss: normalizer must be a Tensor without dimensions, got {type(normalizer)}"
        )
    if reduction != "sum":
        raise ValueError(f'iou_loss: normalizer needs reduction="sum", got {reduction!r}')
    if normalizer.dim() != 0:
        raise ValueError(
            f"iou_loss: normalizer must have no dimensions, got shape {list(normalizer.shape)}"
        )
    if normalizer.device != pred.device:
        raise ValueError(
            f"iou_loss: normalizer must be on the device of pred, {pred.device}, "
            f"got {normalizer.device}"
        )


def _fake(
    pred: Tensor,
    target: Tensor,
    weights: Tensor | None,
    labels: Tensor | None,
    normalizer: Tensor | None,
    kind: int,
    reduction: int,
    smooth: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    divisor = pred.new_empty((), dtype=sum_dtype(pred))
    if reduction == _REDUCTIONS["none"]:
        return pred.new_empty(pred.shape[:-1]), divisor
    return torch.empty_like(divisor), divisor


def _fake_backward(grad: Tensor, pred: Tensor, *inputs: Any) -> Tensor:
    return torch.empty_like(pred)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    pred, target, weights, labels, _, ctx.kind, reduction, ctx.smooth, ctx.eps = inputs
    divisor = None if reduction == _REDUCTIONS["none"] else output[1]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(pred, target, weights, labels, divisor)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    pred, target, weights, labels, divisor = ctx.saved_tensors
    grad_pred = torch.ops.fcos_ext.iou_loss_backward(
        grad, pred, target, weights, labels, divisor, ctx.kind, ctx.smooth, ctx.eps
    )
    return grad_pred, None, None, None, None, None, None, None, None


register("iou_loss", fake=_fake, setup_context=_setup_context, backward=_backward)
register("iou_loss_backward", fake=_fake_backward)
