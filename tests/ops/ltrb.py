"""Random boxes, labels and weights for the tests of the box losses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Predicted and true distances [..., 4], and a weight and a label [...] for each pair."""

    pred: Tensor
    target: Tensor
    weights: Tensor
    labels: Tensor


def make_rows(
    *shape: int,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    label_dtype: torch.dtype = torch.int64,
    positive: float = 0.4,
) -> Rows:
    """Boxes around their location, which overlap. A share of the labels is not negative."""
    pred, target = (torch.rand(*shape, 4, dtype=torch.float64) * 9 + 0.1 for _ in range(2))
    labels = torch.where(torch.rand(shape) < positive, torch.randint(80, shape), -1)
    labels = torch.where(torch.rand(shape) < 0.1, -2, labels)
    return Rows(
        pred.to(device, dtype).requires_grad_(),
        target.to(device, dtype),
        torch.rand(shape, dtype=torch.float64).to(device, dtype),
        labels.to(device, label_dtype),
    )


def edge_cases(rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Pairs [rows, 4] of what happens by chance in a long training, and of what must not.

    Equal sides, sides of 0, negative distances, boxes apart, inside out, tiny and huge.
    """
    pred, target = (torch.rand(rows, 4, dtype=torch.float64) * 8 + 0.1 for _ in range(2))
    # whole numbers meet often: ties of minima and maxima, and intersections of exactly 0
    whole = torch.rand(rows, 1) < 0.4
    pred, target = (torch.where(whole, x.round(), x) for x in (pred, target))
    pred = torch.where(torch.rand(rows, 4) < 0.2, target, pred)
    shift = torch.randint(-12, 13, (rows, 2)) * (torch.rand(rows, 1) < 0.3)
    pred = pred + torch.cat((-shift, shift), dim=1)
    pred = torch.where(torch.rand(rows, 4) < 0.1, 0, pred)
    pred = torch.where(torch.rand(rows, 1) < 0.05, 0, pred)
    pred = torch.where(torch.rand(rows, 1) < 0.05, -pred, pred)
    scale = torch.where(torch.rand(rows, 1) < 0.1, 1e-3, 1.0)
    scale = torch.where(torch.rand(rows, 1) < 0.1, 1e4, scale)
    # rounded here, so that all dtypes see the same ties
    return (pred * scale).to(dtype), (target * scale).to(dtype)


def value_and_gradient(loss: Tensor, pred: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and its gradient for a random ``grad_output`` that is the same each time."""
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(loss.shape, generator=generator, dtype=torch.float64).to(loss)
    return loss.detach(), torch.autograd.grad(loss, pred, grad)[0]


def as_views(*tensors: Tensor) -> list[Tensor]:
    """The same values [N, L, ...] as the network makes them, [N, ..., L], or a slice of more."""
    views = []
    for tensor in tensors:
        if tensor.dim() == 3:
            view = tensor.detach().transpose(1, 2).contiguous().transpose(1, 2)
        else:
            view = tensor.detach().repeat_interleave(2, dim=1)[:, ::2]
        assert not view.is_contiguous()
        views.append(view.requires_grad_(tensor.requires_grad))
    return views
