"""Inputs for the tests of sigmoid_focal_loss, in every form that the operators take.

An operator takes levels [N, C, H, W] and labels [N, L]. Rows [R, C] are a level [R, C, 1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fcos_ext import sigmoid_focal_loss_ref

OPS = torch.ops.fcos_ext
FORMS = ("rows", "planes", "channels_last", "mixed")
HALVES = [torch.float16, torch.bfloat16]
FLOATS = [torch.float32, torch.float64, *HALVES]
#: (H, W): without a location, one, fewer than a vector, many, and whole vectors of 16 bytes.
LEVELS = ((7, 9), (3, 0), (4, 6), (1, 1), (3, 5))
#: None, one below 1 (the least that is divided by), an ordinary one.
NORMALIZERS = (0.0, 0.25, 37.5)


class Case(NamedTuple):
    """Arguments of the operators."""

    logits: list[Tensor]
    labels: Tensor
    quality: Tensor | None

    def to(self, dtype: torch.dtype) -> Case:
        """Leaves of another dtype."""
        logits = [level.detach().to(dtype).requires_grad_() for level in self.logits]
        return Case(logits, self.labels, None if self.quality is None else self.quality.to(dtype))


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def make_labels(shape: tuple[int, ...], C: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Mostly background, as in training, with every other kind of label between."""
    labels = torch.randint(-3, C + 2, shape)
    return torch.where(torch.rand(shape) < 0.6, -1, labels).to(dtype)


def make_case(
    form: str,
    C: int,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    *,
    images: int = 2,
    levels: Sequence[tuple[int, int]] = LEVELS,
    label_dtype: torch.dtype = torch.int64,
    mean: float = -1.0,
    std: float = 4.0,
    quality: bool = False,
) -> Case:
    """Levels of these sizes; as rows, as many locations."""
    locations = sum(height * width for height, width in levels)
    shape, levels = (images, locations), list(levels)
    if form == "rows":
        shape, levels = (images * locations, 1), [(1, 1)]
    logits = []
    for number, size in enumerate(levels):
        level = torch.randn(shape[0], C, *size, dtype=torch.float64) * std + mean
        level = level.to(device, dtype)
        if form == "channels_last" or (form == "mixed" and number % 2 == 0):
            level = level.contiguous(memory_format=torch.channels_last)
        logits.append(level.requires_grad_())
    labels = make_labels(shape, C, label_dtype).to(device)
    targets = torch.rand(shape, dtype=torch.float64).to(device, sum_dtype(dtype))
    return Case(logits, labels, targets if quality else None)


def make_normalizer(logits: Sequence[Tensor], value: float) -> Tensor | None:
    dtype = sum_dtype(logits[0].dtype)
    return torch.tensor(value, dtype=dtype, device=logits[0].device) if value else None


def like(results: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """Incoming gradients: random, and the same each time."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(result.shape, generator=generator, dtype=torch.float64).to(result)
        for result in results
    ]


def with_gradients(losses: Tensor | Sequence[Tensor], logits: Sequence[Tensor]) -> list[Tensor]:
    """The losses, and the gradients for the incoming gradients of :func:`like`."""
    losses = [losses] if isinstance(losses, Tensor) else list(losses)
    gradients = torch.autograd.grad(losses, logits, like(losses))
    return [*(loss.detach() for loss in losses), *gradients]


def sum_of(case: Case, alpha: float, gamma: float, normalizer: float = 0.0) -> list[Tensor]:
    """Sum and gradients by the operator."""
    divisor = make_normalizer(case.logits, normalizer)
    return with_gradients(OPS.sigmoid_focal_loss(*case, divisor, alpha, gamma), case.logits)


def each_of(case: Case, alpha: float, gamma: float) -> list[Tensor]:
    """Each loss and the gradients by the operator."""
    return with_gradients(OPS.sigmoid_focal_loss_each(*case, alpha, gamma), case.logits)


def true_sum_of(case: Case, alpha: float, gamma: float, normalizer: float = 0.0) -> list[Tensor]:
    """Sum and gradients by the reference, in the dtype of the case."""
    divisor = make_normalizer(case.logits, normalizer)
    loss = sigmoid_focal_loss_ref(
        case.logits, case.labels, alpha, gamma, quality=case.quality, normalizer=divisor
    )
    return with_gradients(loss, case.logits)


def true_each_of(case: Case, alpha: float, gamma: float) -> list[Tensor]:
    losses = sigmoid_focal_loss_ref(
        case.logits, case.labels, alpha, gamma, quality=case.quality, reduction="none"
    )
    return with_gradients(losses, case.logits)


def tolerances(dtype: torch.dtype, quality: bool = False) -> dict[str, float]:
    """Of one result of the kernels, against float64."""
    if dtype == torch.float64:
        return {"rtol": 1e-10, "atol": 1e-12}
    # where a soft target is met, the distance from it is known to a rounding of p
    atol = 1e-7 if dtype == torch.float16 or quality else 1e-9
    return {"rtol": max(torch.finfo(dtype).eps, 5e-6), "atol": atol}


def assert_true(results: Sequence[Tensor], truth: Sequence[Tensor], quality: bool = False) -> None:
    """Results of any dtype are what they are in float64."""
    for actual, exact in zip(results, truth, strict=True):
        torch.testing.assert_close(actual.double(), exact, **tolerances(actual.dtype, quality))


def assert_same_bits(some: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(some, others, strict=True))
