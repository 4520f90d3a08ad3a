"""Sigmoid focal loss with integer labels, from Lin et al., https://arxiv.org/abs/1708.02002."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, cast, overload

import torch
from torch import Tensor

from ._levels import new_like, sum_dtype
from ._library import below_autograd, kernels, register
from ._sigmoid_focal_loss_ref import Reduction, check_arguments, num_participating, reference

_DEVICES = kernels("sigmoid_focal_loss")

F = TypeVar("F")


def _typed_like(function: F) -> Callable[[Callable[..., Any]], F]:
    """For type checkers: what is decorated has the overloads of ``function``."""
    return lambda other: cast(F, other)


@overload
def sigmoid_focal_loss(
    logits: Tensor,
    labels: Tensor,
    alpha: float = ...,
    gamma: float = ...,
    *,
    quality: Tensor | None = ...,
    reduction: Reduction = ...,
    normalizer: Tensor | None = ...,
    fused_gradient: bool = ...,
) -> Tensor: ...
@overload
def sigmoid_focal_loss(
    logits: Sequence[Tensor],
    labels: Tensor,
    alpha: float = ...,
    gamma: float = ...,
    *,
    quality: Tensor | None = ...,
    reduction: Literal["mean", "sum"] = ...,
    normalizer: Tensor | None = ...,
    fused_gradient: bool = ...,
) -> Tensor: ...
@overload
def sigmoid_focal_loss(
    logits: Sequence[Tensor],
    labels: Tensor,
    alpha: float = ...,
    gamma: float = ...,
    *,
    quality: Tensor | None = ...,
    reduction: Literal["none"],
    normalizer: Tensor | None = ...,
    fused_gradient: bool = ...,
) -> list[Tensor]: ...
def sigmoid_focal_loss(
    logits: Tensor | Sequence[Tensor],
    labels: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    *,
    quality: Tensor | None = None,
    reduction: Reduction = "sum",
    normalizer: Tensor | None = None,
    fused_gradient: bool = False,
) -> Tensor | list[Tensor]:
    """Focal loss of C binary classifiers a location, ``-alpha_t (1 - p_t)^gamma log(p_t)``.

    A location's label names its one positive class, so that no one-hot tensor is ever made. The
    loss is computed in float32 (float64 for float64 logits) and rounded once, for any finite logit
    without overflow or loss of small values. The gradient is recomputed from the logits: nothing
    but them is kept for it. It flows to ``logits`` only, and is itself not differentiable.

    The outputs of a head are taken as they are, level by level: nothing is permuted, joined or
    copied, all levels are one launch, and each gradient has the memory format of its level.

    Under autocast the logits are taken in the dtype they come in.

    Args:
        logits (Tensor[..., C], or a sequence of 1 to 8 Tensor[N, C, H_l, W_l]): raw scores:
            float32, float64, float16 or bfloat16. Levels may each be contiguous or channels_last;
            any other layout is copied.
        labels (Tensor[...] or Tensor[N, L]): int64 or int32; for levels, L counts the locations of
            all of them, each row by row. 0..C-1 the positive class, -1 background (every class
            negative); a location with any other label, by convention -2, is ignored: its loss and
            gradient are zero.
        alpha: weight of a positive, in 0..1; a negative has ``1 - alpha``. -1: both have 1.
        gamma: focusing exponent, >= 0; 0 gives the weighted binary cross-entropy.
        quality (Tensor, like labels, optional): soft target in 0..1 of the positive class, such as
            the overlap of its box: the term of that class becomes ``|y - p|^gamma BCE(p, y)`` with
            the same weight (quality focal loss, Li et al., https://arxiv.org/abs/2006.04388,
            eq. 6). 1 is the ordinary loss. What it says elsewhere does not matter.
        reduction: "sum"; "mean", over the logits of all locations that are not ignored (0 if there
            are none); or "none".
        normalizer (Tensor[], optional): with "sum": the sum is divided by ``max(normalizer, 1)``,
            on the device. Usually the number of positives.
        fused_gradient: for "sum" and "mean": the forward pass computes the gradient as well, from
            the same read of the logits. A backward pass whose incoming gradient is exactly 1 then
            has nothing left to do; with any other (a loss that is scaled for float16, or weighed
            against others) it recomputes, as it does the second time through the same graph.
            Faster if the loss is summed and ``backward()`` called on it, and the logits are
            needed anyway, at the price of memory for the gradient from the forward pass on.
            Without effect under ``torch.compile`` and where no gradient is asked for.

    Returns:
        Tensor[]: the reduced loss, float32 (float64 for float64 logits); or, for "none", the loss
        of each logit, in the dtype and shape of ``logits``, for levels as a list.

    Raises:
        ValueError: an argument is out of its range or has the wrong shape.
        TypeError: logits are not floating point, or labels are not integers.
    """
    check_arguments(logits, labels, alpha, gamma, quality, reduction, normalizer)
    levels = [logits] if isinstance(logits, Tensor) else list(logits)
    if levels[0].device.type not in _DEVICES:
        return reference(logits, labels, alpha, gamma, quality, reduction, normalizer)
    dtype = sum_dtype(levels[0])
    if quality is not None:
        quality = quality.detach().to(dtype)
    if isinstance(logits, Tensor):  # locations one by one, in one column
        levels = [logits.reshape(labels.numel(), logits.shape[-1], 1, 1)]
        labels = labels.reshape(-1, 1)
        quality = None if quality is None else quality.reshape(-1, 1)

    if reduction == "none":
        each = torch.ops.fcos_ext.sigmoid_focal_loss_each(levels, labels, quality, alpha, gamma)
        return each[0].view(logits.shape) if isinstance(logits, Tensor) else list(each)
    if reduction == "mean":
        normalizer = num_participating(labels, levels[0].shape[1])
    if normalizer is not None:
        normalizer = normalizer.detach().to(dtype)
    arguments = (labels, quality, normalizer, alpha, gamma)
    if torch.compiler.is_compiling():
        return torch.ops.fcos_ext.sigmoid_focal_loss(levels, *arguments)
    if torch.is_grad_enabled() and any(level.requires_grad for level in levels):
        return _Loss.apply(fused_gradient, *arguments, *levels)
    with below_autograd():
        return torch.ops.fcos_ext.sigmoid_focal_loss(levels, *arguments)


@_typed_like(sigmoid_focal_loss)
def sigmoid_focal_loss_ref(
    logits: Tensor | Sequence[Tensor],
    labels: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    *,
    quality: Tensor | None = None,
    reduction: Reduction = "sum",
    normalizer: Tensor | None = None,
    fused_gradient: bool = False,
) -> Tensor | list[Tensor]:
    """Same contract as :func:`sigmoid_focal_loss`, in plain PyTorch, differentiable twice.

    ``fused_gradient`` has no effect.
    """
    check_arguments(logits, labels, alpha, gamma, quality, reduction, normalizer)
    return reference(logits, labels, alpha, gamma, quality, reduction, normalizer)


# ---- the operators: shapes and gradients --------------------------------------------------------


def _fake(logits: Sequence[Tensor], *others: Any) -> Tensor:
    return logits[0].new_empty((), dtype=sum_dtype(logits[0]))


def _fake_backward(grad: Tensor | Sequence[Tensor], logits: Sequence[Tensor], *others: Any) -> Any:
    return [new_like(level) for level in logits]


def _fake_with_gradient(logits: Sequence[Tensor], *others: Any) -> tuple[Tensor, list[Tensor]]:
    return _fake(logits), _fake_backward((), logits)


def _fake_rescale_(*arguments: Any) -> None:
    return None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    logits, *others, ctx.alpha, ctx.gamma = inputs
    ctx.save_for_backward(*others, *logits)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    labels, quality, normalizer, *logits = ctx.saved_tensors
    gradients = torch.ops.fcos_ext.sigmoid_focal_loss_backward(
        grad, logits, labels, quality, normalizer, ctx.alpha, ctx.gamma
    )
    return gradients, None, None, None, None, None


def _each_backward(ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
    labels, quality, *logits = ctx.saved_tensors
    gradients = torch.ops.fcos_ext.sigmoid_focal_loss_each_backward(
        grads, logits, labels, quality, ctx.alpha, ctx.gamma
    )
    return gradients, None, None, None, None


class _Loss(torch.autograd.Function):
    """The reduced loss, whose gradient is, if it is to be fused, made along with it.

    Its buffer is handed over at the first backward pass, and from then on belongs to whoever
    received it; later passes make their own. Without a buffer it does what the operator's own
    gradient does, in less time: that one is wrapped for lists of tensors.
    """

    @staticmethod
    def forward(
        ctx: Any,
        fused: bool,
        labels: Tensor,
        quality: Tensor | None,
        normalizer: Tensor | None,
        alpha: float,
        gamma: float,
        *logits: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(labels, quality, normalizer, *logits)
        ctx.alpha, ctx.gamma = alpha, gamma
        ctx.gradients = None
        arguments = (logits, labels, quality, normalizer, alpha, gamma)
        with below_autograd():
            if fused:
                loss, ctx.gradients = torch.ops.fcos_ext.sigmoid_focal_loss_with_gradient(
                    *arguments
                )
            else:
                loss = torch.ops.fcos_ext.sigmoid_focal_loss(*arguments)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if torch.is_grad_enabled():  # create_graph=True: the second derivative has to raise
            gradients, *_ = _backward(ctx, grad)
        else:
            with below_autograd():
                if gradients is None:
                    gradients, *_ = _backward(ctx, grad)
                else:
                    labels, quality, normalizer, *logits = ctx.saved_tensors
                    torch.ops.fcos_ext.sigmoid_focal_loss_rescale_(
                        gradients, grad, logits, labels, quality, normalizer, ctx.alpha, ctx.gamma
                    )
        return *[None] * 6, *gradients


register("sigmoid_focal_loss", fake=_fake, setup_context=_setup_context, backward=_backward)
register("sigmoid_focal_loss_backward", fake=_fake_backward)
register("sigmoid_focal_loss_with_gradient", fake=_fake_with_gradient)
register(
    "sigmoid_focal_loss_each",
    fake=lambda logits, *others: _fake_backward((), logits),
    setup_context=_setup_context,
    backward=_each_backward,
)
register("sigmoid_focal_loss_each_backward", fake=_fake_backward)
if _DEVICES:  # it writes into its argument, for which there is no gradient to register
    torch.library.register_fake("fcos_ext::sigmoid_focal_loss_rescale_", _fake_rescale_)
