"""What the losses of FCOS are divided by: the sums of a batch, before any process adds its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._levels import ANY_CLASS
from ._library import kernels, register_constant

_OP = "fcos_normalizers"
_DEVICES = kernels(_OP)


def fcos_normalizers(labels: Tensor, centerness: Tensor, num_classes: int | None = None) -> Tensor:
    """Number of positive locations, and the sum of their centerness targets.

    One launch, and the same to the bit on any number of threads and any GPU. On CUDA the host
    waits for nothing: the tensor can be handed to ``torch.distributed.all_reduce``.

    Args:
        labels (Tensor[...]): int64 or int32; positive are those from 0 on.
        centerness (Tensor[...]): float32 target of each location. What it says where the label is
            not positive does not matter.
        num_classes: labels from here on are not positive either. None: there is no highest.

    Returns:
        Tensor[2]: float32, each the sum in float64, rounded once. Nothing is differentiable.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: shapes or devices do not agree, or ``num_classes`` is negative.
    """
    _check(labels, centerness, num_classes)
    if labels.device.type not in _DEVICES:
        return fcos_normalizers_ref(labels, centerness, num_classes)
    limit = ANY_CLASS if num_classes is None else num_classes
    sums: Tensor = torch.ops.fcos_ext.fcos_normalizers(labels, centerness, limit)
    return sums


def fcos_normalizers_and_labels(
    labels: Tensor, centerness: Tensor, num_classes: int
) -> tuple[Tensor, Tensor]:
    """What :func:`fcos_normalizers` returns, and from the same launch the labels in half the bytes.

    Those are int32, -2 for each that is neither -1 nor the number of a class: what is ignored stays
    so. ``num_classes`` is below 2^31.
    """
    _check(labels, centerness, num_classes)
    if labels.device.type not in _DEVICES:
        known = (labels >= -1) & (labels < num_classes)
        narrow = torch.where(known, labels, -2).to(torch.int32)
        return fcos_normalizers_ref(labels, centerness, num_classes), narrow
    results: tuple[Tensor, Tensor] = torch.ops.fcos_ext.fcos_normalizers_and_labels(
        labels, centerness, num_classes
    )
    return results


@torch.no_grad()
def fcos_normalizers_ref(
    labels: Tensor, centerness: Tensor, num_classes: int | None = None
) -> Tensor:
    """Same contract as :func:`fcos_normalizers`, in plain PyTorch."""
    _check(labels, centerness, num_classes)
    classes = labels.to(torch.int64)  # to be compared with any number of classes
    limit = ANY_CLASS if num_classes is None else num_classes
    positive = (classes >= 0) & (classes < limit)
    weights = torch.where(positive, centerness.double(), 0.0)
    return torch.stack([positive.sum(dtype=torch.float64), weights.sum()]).float()


def _check(labels: Tensor, centerness: Tensor, num_classes: int | None) -> None:
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{_OP}: labels must be int64 or int32, got {labels.dtype}")
    if centerness.dtype != torch.float32:
        raise TypeError(f"{_OP}: centerness must be float32, got {centerness.dtype}")
    if centerness.shape != labels.shape:
        raise ValueError(
            f"{_OP}: centerness must have the shape of labels, {list(labels.shape)}, got "
            f"{list(centerness.shape)}"
        )
    if centerness.device != labels.device:
        raise ValueError(
            f"{_OP}: centerness must be on the device of labels, {labels.device}, got "
            f"{centerness.device}"
        )
    if num_classes is not None and num_classes < 0:
        raise ValueError(f"{_OP}: num_classes must be >= 0, got {num_classes}")


def _fake(labels: Tensor, *others: Any) -> Tensor:
    return labels.new_empty((2,), dtype=torch.float32)


def _fake_and_labels(labels: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    narrow = torch.empty(labels.shape, dtype=torch.int32, device=labels.device)
    return _fake(labels), narrow


register_constant(_OP, fake=_fake)
register_constant(f"{_OP}_and_labels", fake=_fake_and_labels)
