"""The box loss and the centerness loss of FCOS, of the same rows in one pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._library import kernels, register
from .iou_loss import KIND_NUMBERS, IoUKind, check_options, check_rows, row_loss, sum_dtype

_OP = "box_and_centerness_loss"
_DEVICES = kernels(_OP)


class BoxAndCenternessLoss(NamedTuple):
    """Sums over the positive rows, each a 0-d tensor; all are 0 if there are none."""

    box: Tensor
    """Overlap losses, each times its weight. Differentiable in ``pred``."""
    centerness: Tensor
    """Cross-entropies. Differentiable in ``centerness``."""
    weight: Tensor
    """Weights of ``box``: of centerness targets, or, unweighted, of ones."""
    num_pos: Tensor
    """int64: how many rows are positive."""


def box_and_centerness_loss(
    pred: Tensor,
    centerness: Tensor,
    target: Tensor,
    labels: Tensor,
    *,
    centerness_target: Tensor | None = None,
    weighted: bool = True,
    kind: IoUKind = "giou",
    smooth: float = 0.0,
    eps: float = 1e-7,
) -> BoxAndCenternessLoss:
    """What a positive location of FCOS learns besides its class, arXiv 1904.01355 section 3.2.

    For each row with a label that is not negative::

        c = sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b))       of the target; eq. 3
        box         c * iou_loss(pred, target, kind)                  see fcos_ext.iou_loss
        centerness  -c log(p) - (1 - c) log(1 - p)                    p = sigmoid(centerness)

    FCOS divides the first sum by that of the weights and the second by the number of positives;
    over several processes, by their averages. That is left to the caller, as no more than four
    numbers take part in it. ``c`` is 0 where the location lies outside its box. All rows may be
    given, as the network makes them: background costs a look at its label. ``pred`` may be a view
    [N, L, 4] of [N, 4, L]; its gradient has its strides.

    The math is float32 (float64 if ``pred`` is float64); gradients are rounded once, to the dtypes
    of ``pred`` and ``centerness``, and are not differentiable themselves. Under autocast the
    arguments are taken in the dtypes they come in.

    Args:
        pred (Tensor[..., 4]): predicted distances l, t, r, b; any floating dtype.
        centerness (Tensor[...]): raw scores, before the sigmoid; any floating dtype.
        target (Tensor[..., 4]): true l, t, r, b; any floating dtype.
        labels (Tensor[...]): integers. Rows with a negative label contribute exactly 0 and get
            exactly zero gradient, whatever NaN or inf they hold.
        centerness_target (Tensor[...], optional): ``c``, or any other quality between 0 and 1 that
            the scores are to learn; any floating dtype.
        weighted: weight the box losses by ``c``; else by 1.
        kind: which overlap loss.
        smooth: see :func:`fcos_ext.iou_loss`.
        eps: see :func:`fcos_ext.iou_loss`.

    Returns:
        BoxAndCenternessLoss: four 0-d tensors, in float32 (float64 if ``pred`` is float64) but for
        the int64 ``num_pos``. Non-finite values in a positive row show up in them.

    Raises:
        TypeError: a tensor has the wrong kind of dtype.
        ValueError: shapes or devices do not agree, or an option has an unknown value.
    """
    _check(pred, centerness, target, labels, centerness_target, kind, smooth, eps)
    if pred.device.type not in _DEVICES:
        return box_and_centerness_loss_ref(
            pred,
            centerness,
            target,
            labels,
            centerness_target=centerness_target,
            weighted=weighted,
            kind=kind,
            smooth=smooth,
            eps=eps,
        )
    if labels.dtype not in (torch.int64, torch.int32):
        labels = labels.to(torch.int64)
    return BoxAndCenternessLoss(
        *torch.ops.fcos_ext.box_and_centerness_loss(
            pred,
            centerness,
            target,
            labels,
            centerness_target,
            KIND_NUMBERS[kind],
            weighted,
            smooth,
            eps,
        )
    )


def box_and_centerness_loss_ref(
    pred: Tensor,
    centerness: Tensor,
    target: Tensor,
    labels: Tensor,
    *,
    centerness_target: Tensor | None = None,
    weighted: bool = True,
    kind: IoUKind = "giou",
    smooth: float = 0.0,
    eps: float = 1e-7,
) -> BoxAndCenternessLoss:
    """Same contract as :func:`box_and_centerness_loss`, in plain PyTorch, differentiable twice."""
    _check(pred, centerness, target, labels, centerness_target, kind, smooth, eps)
    dtype = sum_dtype(pred)
    positive = labels >= 0
    # Masking the results alone would leave 0 * NaN in the gradients, so the inputs are masked too.
    p = torch.where(positive[..., None], pred.to(dtype), 1.0)
    t = torch.where(positive[..., None], target.detach().to(dtype), 1.0)
    x = torch.where(positive, centerness.to(dtype), 0.0)
    if centerness_target is None:
        c = _centerness(t)
    else:
        c = torch.where(positive, centerness_target.detach().to(dtype), 0.0)
    weight = c if weighted else torch.ones_like(c)

    def total(values: Tensor) -> Tensor:
        return torch.where(positive, values, 0.0).sum()

    return BoxAndCenternessLoss(
        total(row_loss(p, t, kind, smooth, eps) * weight),
        total(F.binary_cross_entropy_with_logits(x, c, reduction="none")),
        total(weight),
        positive.sum(),
    )


def _centerness(ltrb: Tensor) -> Tensor:
    """Centerness [...] of locations with distances [..., 4]; 0 outside of the box."""
    l_, t_, r_, b_ = ltrb.unbind(-1)

    def balance(a: Tensor, b: Tensor) -> Tensor:
        low, high = torch.minimum(a, b), torch.maximum(a, b)
        empty = high <= 0
        return torch.where(empty, 0.0, low.clamp(min=0) / torch.where(empty, 1.0, high))

    return torch.sqrt(balance(l_, r_) * balance(t_, b_))


def _check(
    pred: Tensor,
    centerness: Tensor,
    target: Tensor,
    labels: Tensor,
    centerness_target: Tensor | None,
    kind: str,
    smooth: float,
    eps: float,
) -> None:
    check_rows(
        _OP,
        pred,
        target,
        labels,
        {"centerness": centerness, "centerness_target": centerness_target},
    )
    check_options(_OP, kind, smooth, eps)


def _fake(
    pred: Tensor,
    centerness: Tensor,
    target: Tensor,
    labels: Tensor,
    centerness_target: Tensor | None,
    kind: int,
    weighted: bool,
    smooth: float,
    eps: float,
) -> tuple[Tensor, ...]:
    sums = tuple(pred.new_empty((), dtype=sum_dtype(pred)) for _ in range(3))
    return *sums, pred.new_empty((), dtype=torch.int64)


def _fake_backward(
    grad_box: Tensor, grad_centerness: Tensor, pred: Tensor, centerness: Tensor, *inputs: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(pred), torch.empty_like(centerness)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.kind, ctx.weighted, ctx.smooth, ctx.eps = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*tensors)


def _backward(
    ctx: Any, grad_box: Tensor, grad_centerness: Tensor, *_: Tensor
) -> tuple[Tensor | None, ...]:
    by_pred, by_centerness = torch.ops.fcos_ext.box_and_centerness_loss_backward(
        grad_box,
        grad_centerness,
        *ctx.saved_tensors,
        ctx.kind,
        ctx.weighted,
        ctx.smooth,
        ctx.eps,
    )
    return by_pred, by_centerness, None, None, None, None, None, None, None


register(_OP, fake=_fake, setup_context=_setup_context, backward=_backward)
register(f"{_OP}_backward", fake=_fake_backward)
