"""The box loss and the centerness loss of FCOS, of the same locations in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._box_and_centerness_loss_ref import (
    BoxAndCenternessLoss,
    Quality,
    box_and_centerness_loss_ref,
    check_arguments,
)
from ._levels import ANY_CLASS, new_like, sum_dtype
from ._library import below_autograd, kernels, register
from ._ltrb import KIND_NUMBERS, IoUKind

_OP = "box_and_centerness_loss"
_DEVICES = kernels(_OP)


def box_and_centerness_loss(
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
    """What a positive location of FCOS learns besides its class, arXiv 1904.01355 section 3.2.

    For each location with a label that names a class::

        c = sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b))       of the target; eq. 3
        q = c, or, with quality="iou", IoU(pred, target), a constant  see there
        box         c * iou_loss(pred, target, kind)                  see fcos_ext.iou_loss
        centerness  -q log(p) - (1 - q) log(1 - p)                    p = sigmoid(centerness)

    FCOS divides the first sum by that of the weights and the second by the number of positives;
    over several processes, by their averages. Either the caller does, as no more than four numbers
    take part in it, or the kernel, which is then told the ``normalizers``. ``c`` is 0 where the
    location lies outside its box. All locations are given, as the network makes them: background
    costs a look at its label.

    The outputs of a head are taken level by level as they are, in either memory layout: nothing is
    permuted, joined or copied, all levels are one launch, and each gradient has the memory format
    of its level. Or they are rows, [..., 4] and [...], of which ``pred`` may be a view [N, L, 4] of
    [N, 4, L]; its gradient has its strides.

    The math is float32 (float64 if ``pred`` is float64); gradients are rounded once, to the dtypes
    of ``pred`` and ``centerness``, and are not differentiable themselves. Under autocast the
    arguments are taken in the dtypes they come in.

    Args:
        pred (Tensor[..., 4], or a sequence of 1 to 8 Tensor[N, 4, H_l, W_l]): predicted distances
            l, t, r, b; any floating dtype.
        centerness (Tensor[...], or as many Tensor[N, 1, H_l, W_l]): raw scores, before the
            sigmoid; any floating dtype.
        target (Tensor[..., 4] or Tensor[N, L, 4]): true l, t, r, b; any floating dtype. L counts
            the locations of all levels, each row by row.
        labels (Tensor[...] or Tensor[N, L]): integers. Locations whose label is negative, or not
            below ``num_classes``, contribute exactly 0 and get exactly zero gradient, whatever NaN
            or inf they hold.
        centerness_target (Tensor, like labels, optional): ``c``, or any other weight and quality
            between 0 and 1 that the scores are to learn; any floating dtype.
        weighted: weight the box losses by ``c``; else by 1.
        quality: what the scores learn: "centerness", which is ``c``, or "iou", the overlap
            (I + smooth) / (U + smooth + eps) of the predicted with the true box. It is a target
            only: no gradient flows through it.
        kind: which overlap loss.
        smooth: see :func:`fcos_ext.iou_loss`.
        eps: see :func:`fcos_ext.iou_loss`.
        num_classes: labels from here on take no part. None: there is no highest.
        normalizers (Tensor[2], optional): a number of positives n and a sum of centerness targets
            s, which the kernel divides by: ``centerness`` by max(n, 1), ``box`` by max(s, 1e-6) or,
            unweighted, by max(n, 1). ``weight`` and ``num_pos`` are not divided.
        fused_gradient: the forward pass computes the gradients as well. A backward pass whose
            incoming gradients are both exactly 1 then has nothing left to do; with any others it
            recomputes. See :func:`fcos_ext.sigmoid_focal_loss`.

    Returns:
        BoxAndCenternessLoss: 0-d tensors, in float32 (float64 if ``pred`` is float64) but for the
        int64 counts. Non-finite values at a positive location show up in them.

    Raises:
        TypeError: a tensor has the wrong kind of dtype.
        ValueError: shapes or devices do not agree, or an option has an unknown value.
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
    first = pred if isinstance(pred, Tensor) else pred[0]
    if first.device.type not in _DEVICES:
        return box_and_centerness_loss_ref(
            pred,
            centerness,
            target,
            labels,
            centerness_target=centerness_target,
            weighted=weighted,
            quality=quality,
            kind=kind,
            smooth=smooth,
            eps=eps,
            num_classes=num_classes,
            normalizers=normalizers,
        )
    levels, scores, others = operands(pred, centerness, target, labels, centerness_target)
    if normalizers is not None:
        normalizers = normalizers.detach().to(sum_dtype(first))
    tensors = (*others, normalizers)
    options = (
        ANY_CLASS if num_classes is None else num_classes,
        KIND_NUMBERS[kind],
        weighted,
        quality == "iou",
        smooth,
        eps,
    )
    if torch.compiler.is_compiling():
        sums = torch.ops.fcos_ext.box_and_centerness_loss(levels, scores, *tensors, *options)
    elif torch.is_grad_enabled() and any(x.requires_grad for x in (*levels, *scores)):
        sums = _Loss.apply(fused_gradient, tensors, options, *levels, *scores)
    else:
        with below_autograd():
            sums = torch.ops.fcos_ext.box_and_centerness_loss(levels, scores, *tensors, *options)
    return BoxAndCenternessLoss(*sums)


def operands(
    pred: Tensor | Sequence[Tensor],
    centerness: Tensor | Sequence[Tensor],
    target: Tensor,
    labels: Tensor,
    centerness_target: Tensor | None,
) -> tuple[list[Tensor], list[Tensor], tuple[Tensor, Tensor, Tensor | None]]:
    """The tensors as the operators take them: levels, or one of rows [L, 4] or [N, L, 4]."""
    if labels.dtype not in (torch.int64, torch.int32):
        labels = labels.to(torch.int64)
    if not isinstance(pred, Tensor) or not isinstance(centerness, Tensor):
        return list(pred), list(centerness), (target, labels, centerness_target)
    if labels.dim() not in (1, 2):
        rows = labels.shape[-1:] or (1,)  # of the innermost dimension
        rows = (labels.shape[:-1].numel(), *rows)
        pred, target = (x.reshape(*rows, 4) for x in (pred, target))
        centerness, labels = (x.reshape(rows) for x in (centerness, labels))
        if centerness_target is not None:
            centerness_target = centerness_target.reshape(rows)
    return [pred], [centerness], (target, labels, centerness_target)


# ---- the operators: shapes and gradients --------------------------------------------------------


def _fake(pred: Sequence[Tensor], *others: Any) -> tuple[Tensor, ...]:
    sums = (pred[0].new_empty((), dtype=sum_dtype(pred[0])) for _ in range(3))
    counts = (pred[0].new_empty((), dtype=torch.int64) for _ in range(2))
    return *sums, *counts


def _fake_gradients(
    pred: Sequence[Tensor], centerness: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    return [new_like(level) for level in pred], [new_like(level) for level in centerness]


def _fake_backward(
    grad_box: Tensor,
    grad_centerness: Tensor,
    pred: Sequence[Tensor],
    centerness: Sequence[Tensor],
    *others: Any,
) -> tuple[list[Tensor], list[Tensor]]:
    return _fake_gradients(pred, centerness)


def _fake_with_gradient(
    pred: Sequence[Tensor], centerness: Sequence[Tensor], *others: Any
) -> tuple[Any, ...]:
    return *_fake(pred), *_fake_gradients(pred, centerness)


def _fake_rescale_(*arguments: Any) -> None:
    return None


def _arguments(ctx: Any) -> tuple[Any, ...]:
    """Of the operators, from ``pred`` on."""
    tensors = ctx.saved_tensors
    others, levels = tensors[:4], tensors[4:]
    half = len(levels) // 2
    return levels[:half], levels[half:], *others, *ctx.options


def _incoming(pred: Tensor, *grads: Tensor | None) -> list[Tensor]:
    """Gradients of ``box`` and ``centerness``: 0 of one that nobody used."""
    return [pred.new_zeros((), dtype=sum_dtype(pred)) if g is None else g for g in grads]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pred, centerness, *others = inputs
    ctx.options = others[4:]
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)  # or the results without a gradient would cost a launch each
    ctx.save_for_backward(*others[:4], *pred, *centerness)


def _backward(
    ctx: Any, grad_box: Tensor | None, grad_centerness: Tensor | None, *_: Any
) -> tuple[Any, ...]:
    arguments = _arguments(ctx)
    gradients = torch.ops.fcos_ext.box_and_centerness_loss_backward(
        *_incoming(arguments[0][0], grad_box, grad_centerness), *arguments
    )
    return *gradients, *[None] * (4 + len(ctx.options))


class _Loss(torch.autograd.Function):
    """The sums, whose gradients are, if they are to be fused, made along with them.

    Their buffers are handed over at the first backward pass, and from then on belong to whoever
    received them; later passes make their own. Without buffers it does what the operator's own
    gradient does, in less time: that one is wrapped for lists of tensors.
    """

    @staticmethod
    def forward(
        ctx: Any,
        fused: bool,
        tensors: tuple[Tensor | None, ...],
        options: tuple[Any, ...],
        *levels: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.options = options
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *levels)
        half = len(levels) // 2
        arguments = (levels[:half], levels[half:], *tensors, *options)
        ctx.gradients = None
        with below_autograd():
            if fused:
                *sums, by_pred, by_centerness = (
                    torch.ops.fcos_ext.box_and_centerness_loss_with_gradient(*arguments)
                )
                ctx.gradients = by_pred, by_centerness
            else:
                sums = torch.ops.fcos_ext.box_and_centerness_loss(*arguments)
        ctx.mark_non_differentiable(*sums[2:])
        return tuple(sums)

    @staticmethod
    def backward(
        ctx: Any, grad_box: Tensor | None, grad_centerness: Tensor | None, *_: Any
    ) -> tuple[Any, ...]:
        arguments = _arguments(ctx)
        grads = _incoming(arguments[0][0], grad_box, grad_centerness)
        gradients, ctx.gradients = ctx.gradients, None
        if torch.is_grad_enabled():  # create_graph=True: the second derivative has to raise
            gradients = torch.ops.fcos_ext.box_and_centerness_loss_backward(*grads, *arguments)
        else:
            with below_autograd():
                if gradients is None:
                    gradients = torch.ops.fcos_ext.box_and_centerness_loss_backward(
                        *grads, *arguments
                    )
                else:
                    torch.ops.fcos_ext.box_and_centerness_loss_rescale_(
                        *gradients, *grads, *arguments
                    )
        by_pred, by_centerness = gradients
        return None, None, None, *by_pred, *by_centerness


register(_OP, fake=_fake, setup_context=_setup_context, backward=_backward)
register(f"{_OP}_backward", fake=_fake_backward)
register(f"{_OP}_with_gradient", fake=_fake_with_gradient)
if _DEVICES:  # it writes into its arguments, for which there is no gradient to register
    torch.library.register_fake(f"fcos_ext::{_OP}_rescale_", _fake_rescale_)
