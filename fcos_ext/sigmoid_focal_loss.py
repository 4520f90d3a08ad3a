"""Sigmoid focal loss with integer labels, from Lin et al., https://arxiv.org/abs/1708.02002."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ._library import kernels, register

_DEVICES = kernels("sigmoid_focal_loss")


def sigmoid_focal_loss(
    logits: Tensor,
    labels: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    *,
    reduction: Literal["none", "mean", "sum"] = "sum",
    normalizer: Tensor | None = None,
) -> Tensor:
    """Focal loss of C independent binary classifiers a row, ``-alpha_t (1 - p_t)^gamma log(p_t)``.

    A row's label names its one positive class, so that no one-hot tensor is ever made. The loss is
    computed in float32 (float64 for float64 logits) and rounded once, for any finite logit without
    overflow or loss of small values. The gradient is recomputed from the logits: nothing but them
    is kept for it. It flows to ``logits`` only, and is itself not differentiable.

    Under autocast the logits are taken in the dtype they come in.

    Args:
        logits (Tensor[..., C]): raw scores: float32, float64, float16 or bfloat16.
        labels (Tensor[...]): int64 or int32. 0..C-1 the positive class of the row, -1 background
            (every class negative); a row with any other label, by convention -2, is ignored: its
            loss and gradient are zero.
        alpha: weight of a positive, in 0..1; a negative has ``1 - alpha``.
        gamma: focusing exponent, >= 0; 0 gives the weighted binary cross-entropy.
        reduction: "sum"; "mean", over the logits of all rows that are not ignored (0 if there are
            none); or "none".
        normalizer (Tensor[], optional): with "sum": the sum is divided by ``max(normalizer, 1)``,
            on the device. Usually the number of positives.

    Returns:
        Tensor[]: the reduced loss, float32 (float64 for float64 logits); or, for "none",
        Tensor[..., C]: the loss of each logit, in the dtype of the logits.

    Raises:
        ValueError: an argument is out of its range or has the wrong shape.
        TypeError: logits are not floating point, or labels are not integers.
    """
    _check(logits, labels, alpha, gamma, reduction, normalizer)
    if logits.device.type not in _DEVICES:
        return sigmoid_focal_loss_ref(
            logits, labels, alpha, gamma, reduction=reduction, normalizer=normalizer
        )
    if reduction == "mean":
        normalizer = _num_participating(logits, labels)
    if normalizer is not None:
        normalizer = normalizer.detach().to(_sum_dtype(logits))
    reduce = reduction != "none"
    return torch.ops.fcos_ext.sigmoid_focal_loss(logits, labels, normalizer, alpha, gamma, reduce)


def sigmoid_focal_loss_ref(
    logits: Tensor,
    labels: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    *,
    reduction: Literal["none", "mean", "sum"] = "sum",
    normalizer: Tensor | None = None,
) -> Tensor:
    """Same contract as :func:`sigmoid_focal_loss`, in plain PyTorch, differentiable twice."""
    x = logits.to(_sum_dtype(logits))
    positive = labels.unsqueeze(-1) == torch.arange(x.shape[-1], device=x.device)
    # log(p_t) = -softplus(-z), with z the logit of the right answer
    z = torch.where(positive, x, -x)
    # tensors of this dtype: where() makes float32 of two numbers
    alpha_t = torch.where(positive, x.new_full((), alpha), x.new_full((), 1 - alpha))
    # logsigmoid keeps what 1 - p_t and log(p_t) would lose to cancellation
    log_p_t = torch.nn.functional.logsigmoid(z)
    loss = alpha_t * torch.exp(gamma * torch.nn.functional.logsigmoid(-z)) * -log_p_t
    counts = ((labels >= -1) & (labels < x.shape[-1])).unsqueeze(-1)
    loss = torch.where(counts, loss, torch.zeros_like(loss))
    if reduction == "none":
        return loss.to(logits.dtype)
    if reduction == "mean":
        normalizer = _num_participating(logits, labels)
    total = loss.sum()
    return total if normalizer is None else total / normalizer.detach().to(total).clamp(min=1)


def _sum_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _num_participating(logits: Tensor, labels: Tensor) -> Tensor:
    """Number of logits (0-d) in rows that are not ignored."""
    rows = ((labels >= -1) & (labels < logits.shape[-1])).sum()
    return rows.to(_sum_dtype(logits)) * logits.shape[-1]


def _check(
    logits: Tensor,
    labels: Tensor,
    alpha: float,
    gamma: float,
    reduction: str,
    normalizer: Tensor | None,
) -> None:
    op = "sigmoid_focal_loss"
    if not logits.is_floating_point():
        raise TypeError(f"{op}: logits must be floating point, got {logits.dtype}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: labels must be int64 or int32, got {labels.dtype}")
    if logits.dim() == 0 or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"{op}: labels must have the shape of logits without its last dimension, got labels "
            f"{tuple(labels.shape)} and logits {tuple(logits.shape)}"
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"{op}: alpha must lie in 0..1, got {alpha}")
    if not 0 <= gamma < float("inf"):
        raise ValueError(f"{op}: gamma must be finite and >= 0, got {gamma}")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{op}: reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    if normalizer is not None and reduction != "sum":
        raise ValueError(f"{op}: normalizer needs reduction='sum', got {reduction!r}")
    if normalizer is not None and normalizer.dim() != 0:
        raise ValueError(
            f"{op}: normalizer must be a 0-d tensor, got shape {tuple(normalizer.shape)}"
        )


def _fake(
    logits: Tensor,
    labels: Tensor,
    normalizer: Tensor | None,
    alpha: float,
    gamma: float,
    reduce: bool,
) -> Tensor:
    if reduce:
        return logits.new_empty((), dtype=_sum_dtype(logits))
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _fake_backward(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    normalizer: Tensor | None,
    alpha: float,
    gamma: float,
) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, labels, normalizer, ctx.alpha, ctx.gamma, _ = inputs
    ctx.save_for_backward(logits, labels, normalizer)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    logits, labels, normalizer = ctx.saved_tensors
    grad_logits = torch.ops.fcos_ext.sigmoid_focal_loss_backward(
        grad, logits, labels, normalizer, ctx.alpha, ctx.gamma
    )
    return grad_logits, None, None, None, None, None


register("sigmoid_focal_loss", fake=_fake, setup_context=_setup_context, backward=_backward)
register("sigmoid_focal_loss_backward", fake=_fake_backward)
