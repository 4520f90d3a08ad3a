"""The specification of sigmoid_focal_loss: argument rules, and the formula in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ._levels import check_levels, flatten, sum_dtype

Reduction = Literal["none", "mean", "sum"]


def reference(
    logits: Tensor | Sequence[Tensor],
    labels: Tensor,
    alpha: float,
    gamma: float,
    quality: Tensor | None,
    reduction: Reduction,
    normalizer: Tensor | None,
) -> Tensor | list[Tensor]:
    if isinstance(logits, Tensor):
        each = _each_ref(logits, labels, alpha, gamma, quality)
    else:  # [N, L, C], as the labels
        each = _each_ref(flatten(logits), labels, alpha, gamma, quality)
    if reduction == "none" and isinstance(logits, Tensor):
        return each.to(logits.dtype)
    if reduction == "none":
        parts = each.split([level.shape[2] * level.shape[3] for level in logits], dim=1)
        pairs = zip(parts, logits, strict=True)
        return [part.transpose(1, 2).reshape(level.shape).to(level.dtype) for part, level in pairs]
    if reduction == "mean":
        normalizer = num_participating(labels, each.shape[-1])
    total = each.sum()
    return total if normalizer is None else total / normalizer.detach().to(total).clamp(min=1)


def _each_ref(
    logits: Tensor, labels: Tensor, alpha: float, gamma: float, quality: Tensor | None
) -> Tensor:
    """Loss of each logit [..., C], in the dtype of sums."""
    x = logits.to(sum_dtype(logits))
    positive = labels.unsqueeze(-1) == torch.arange(x.shape[-1], device=x.device)
    # log(p_t) = -softplus(-z), with z the logit of the right answer
    z = torch.where(positive, x, -x)
    # tensors of this dtype: where() makes float32 of two numbers
    of_positive, of_negative = (1.0, 1.0) if alpha < 0 else (alpha, 1 - alpha)
    alpha_t = torch.where(positive, x.new_full((), of_positive), x.new_full((), of_negative))
    # logsigmoid keeps what 1 - p_t and log(p_t) would lose to cancellation
    log_p_t = torch.nn.functional.logsigmoid(z)
    loss = alpha_t * torch.exp(gamma * torch.nn.functional.logsigmoid(-z)) * -log_p_t
    if quality is not None:
        y = quality.detach().to(x).unsqueeze(-1)
        # |y - p|, with a floor, below which the gradient is 0 and not 0 times infinity
        difference = y * torch.sigmoid(-x) - (1 - y) * torch.sigmoid(x)
        distance = difference.abs().clamp(min=torch.finfo(x.dtype).tiny)
        log_p, log_q = (torch.nn.functional.logsigmoid(z) for z in (x, -x))
        entropy = -(y * log_p + (1 - y) * log_q)
        loss = torch.where(positive, alpha_t * distance**gamma * entropy, loss)
    counts = ((labels >= -1) & (labels < x.shape[-1])).unsqueeze(-1)
    return torch.where(counts, loss, torch.zeros_like(loss))


def num_participating(labels: Tensor, num_classes: int) -> Tensor:
    """Number of logits (0-d) at locations that are not ignored."""
    return ((labels >= -1) & (labels < num_classes)).sum() * num_classes


def check_arguments(
    logits: Tensor | Sequence[Tensor],
    labels: Tensor,
    alpha: float,
    gamma: float,
    quality: Tensor | None,
    reduction: str,
    normalizer: Tensor | None,
) -> None:
    op = "sigmoid_focal_loss"
    if isinstance(logits, Tensor):
        dtype = logits.dtype
        if logits.dim() == 0 or labels.shape != logits.shape[:-1]:
            raise ValueError(
                f"{op}: labels must have the shape of logits without its last dimension, got "
                f"labels {tuple(labels.shape)} and logits {tuple(logits.shape)}"
            )
    else:
        expected = check_levels(op, "logits", logits)
        dtype = logits[0].dtype
        if tuple(labels.shape) != expected:
            raise ValueError(
                f"{op}: labels must be [N, L] = {expected}, a label for each location of all "
                f"levels, got {tuple(labels.shape)}"
            )
    if not dtype.is_floating_point:
        raise TypeError(f"{op}: logits must be floating point, got {dtype}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: labels must be int64 or int32, got {labels.dtype}")
    if alpha != -1 and not 0 <= alpha <= 1:
        raise ValueError(f"{op}: alpha must lie in 0..1, or be -1 for no weights, got {alpha}")
    if not 0 <= gamma < float("inf"):
        raise ValueError(f"{op}: gamma must be finite and >= 0, got {gamma}")
    if quality is not None and not quality.is_floating_point():
        raise TypeError(f"{op}: quality must be floating point, got {quality.dtype}")
    if quality is not None and quality.shape != labels.shape:
        raise ValueError(
            f"{op}: quality must have the shape of labels, got quality {tuple(quality.shape)} and "
            f"labels {tuple(labels.shape)}"
        )
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{op}: reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    if normalizer is not None and reduction != "sum":
        raise ValueError(f"{op}: normalizer needs reduction='sum', got {reduction!r}")
    if normalizer is not None and normalizer.dim() != 0:
        raise ValueError(
            f"{op}: normalizer must be a 0-d tensor, got shape {tuple(normalizer.shape)}"
        )
