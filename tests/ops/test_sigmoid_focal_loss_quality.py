"""sigmoid_focal_loss(quality=...): soft targets of the positives, against the formula and eager."""

from __future__ import annotations

import math

import pytest
import torch

from fcos_ext import sigmoid_focal_loss
from tests.ops.sigmoid_focal_loss_cases import (
    FLOATS,
    FORMS,
    Case,
    assert_true,
    each_of,
    make_case,
    sum_of,
    true_each_of,
    true_sum_of,
    with_gradients,
)


def test_by_hand(device: str) -> None:
    logits = torch.tensor([[0.0, math.log(3)]], device=device)  # p: 1/2 and 3/4
    labels = torch.tensor([1], device=device)
    quality = torch.tensor([0.25], device=device)
    loss = sigmoid_focal_loss(logits, labels, 0.3, 2.0, quality=quality, reduction="none")
    entropy = -(0.25 * math.log(0.75) + 0.75 * math.log(0.25))
    expected = [0.7 * 0.25 * math.log(2), 0.3 * 0.25 * entropy]
    torch.testing.assert_close(loss.cpu(), torch.tensor([expected]))


@pytest.mark.parametrize("alpha, gamma", [(0.25, 2.0), (0.3, 1.5), (-1.0, 1.0), (0.5, 0.0)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_matches_reference(
    device: str, form: str, dtype: torch.dtype, alpha: float, gamma: float
) -> None:
    case = make_case(form, 11, dtype, device, quality=True)
    exact = case.to(torch.float64)
    assert_true(sum_of(case, alpha, gamma, 5), true_sum_of(exact, alpha, gamma, 5), True)
    assert_true(each_of(case, alpha, gamma), true_each_of(exact, alpha, gamma), True)


@pytest.mark.parametrize("gamma", [2.0, 1.5, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_one_is_the_ordinary_loss(device: str, form: str, dtype: torch.dtype, gamma: float) -> None:
    case = make_case(form, 11, dtype, device, quality=True)
    assert case.quality is not None
    ones = Case(case.logits, case.labels, torch.ones_like(case.quality))
    plain = Case(case.logits, case.labels, None)
    torch.testing.assert_close(each_of(ones, 0.3, gamma), each_of(plain, 0.3, gamma))


def test_quality_of_the_others_does_not_matter(device: str) -> None:
    case = make_case("mixed", 11, torch.float32, device, quality=True)
    assert case.quality is not None
    positive = (case.labels >= 0) & (case.labels < 11)
    other = Case(case.logits, case.labels, case.quality.where(positive, float("nan")))
    torch.testing.assert_close(sum_of(other, 0.3, 2.0), sum_of(case, 0.3, 2.0), rtol=0, atol=0)


@pytest.mark.parametrize("gamma", [2.0, 1.5, 1.0, 0.5, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_where_the_target_is_met(device: str, dtype: torch.dtype, gamma: float) -> None:
    """At p = y there is no loss, and no gradient, unless gamma is 0."""
    logits = torch.zeros(3, 1, dtype=dtype, device=device, requires_grad=True)
    labels = torch.zeros(3, dtype=torch.int64, device=device)
    quality = torch.full((3,), 0.5, device=device)
    loss, gradient = with_gradients(
        sigmoid_focal_loss(logits, labels, -1, gamma, quality=quality, reduction="none"), [logits]
    )
    assert gradient.eq(0).all()
    assert loss.abs().max() < 1e-15 if gamma else loss.sub(math.log(2)).abs().max() < 1e-6


def test_no_gradient_to_quality(device: str) -> None:
    case = make_case("planes", 4, torch.float32, device, quality=True)
    assert case.quality is not None
    quality = case.quality.requires_grad_()
    sigmoid_focal_loss(case.logits, case.labels, quality=quality.bfloat16()).backward()
    assert quality.grad is None
