"""sigmoid_focal_loss(fused_gradient=True): the same results, whatever is done with the graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fcos_ext import sigmoid_focal_loss
from tests.ops.sigmoid_focal_loss_cases import (
    FLOATS,
    FORMS,
    OPS,
    Case,
    assert_same_bits,
    assert_true,
    make_case,
    true_sum_of,
    with_gradients,
)


def fused(case: Case, normalizer: Tensor | None = None) -> Tensor:
    return sigmoid_focal_loss(
        case.logits,
        case.labels,
        quality=case.quality,
        normalizer=normalizer,
        fused_gradient=True,
    )


def recomputed(case: Case, grad: float) -> list[Tensor]:
    loss = OPS.sigmoid_focal_loss(*case, None, 0.25, 2.0)
    return list(torch.autograd.grad(loss, case.logits, torch.full_like(loss, grad)))


@pytest.mark.parametrize("quality", [False, True], ids=["", "quality"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_matches_reference(device: str, form: str, dtype: torch.dtype, quality: bool) -> None:
    case = make_case(form, 20, dtype, device, quality=quality)
    truth = true_sum_of(case.to(torch.float64), 0.25, 2.0)
    assert_true(with_gradients(fused(case), case.logits), truth, quality)


@pytest.mark.parametrize("grad", [1.0, 0.0, 0.5, 65536.0, -3.0])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_any_incoming_gradient(device: str, form: str, dtype: torch.dtype, grad: float) -> None:
    """As accurate as the recomputed one: the buffer is not multiplied."""
    case = make_case(form, 9, dtype, device, std=2)
    loss = fused(case)
    gradients = torch.autograd.grad(loss, case.logits, torch.full_like(loss, grad))
    if grad == 1:  # another kernel, whose compiler may have fused other additions
        torch.testing.assert_close(
            gradients, tuple(recomputed(case, grad)), rtol=4 * torch.finfo(dtype).eps, atol=0
        )
    else:
        assert_same_bits(gradients, recomputed(case, grad))
    for gradient, level in zip(gradients, case.logits, strict=True):
        assert gradient.stride() == level.stride()


def test_first_backward_gets_the_buffer_and_later_ones_do_not(device: str) -> None:
    case = make_case("mixed", 9, torch.float32, device)
    loss = fused(case)
    results = []
    for grad in (1.0, 1.0, 3.0):
        incoming = torch.full_like(loss, grad)
        results.append(torch.autograd.grad(loss, case.logits, incoming, retain_graph=True))
        for gradient in results[0]:
            gradient.fill_(7)  # what a user does with it changes nothing
    assert all(gradient.eq(7).all() for gradient in results[0])
    torch.testing.assert_close(results[1], tuple(recomputed(case, 1.0)))
    assert_same_bits(results[2], recomputed(case, 3.0))
    pointers = {x.data_ptr() for result in results for x in result if x.numel() > 0}
    assert len(pointers) == sum(x.numel() > 0 for x in case.logits) * 3


def test_gradients_accumulate(device: str) -> None:
    case = make_case("mixed", 9, torch.float32, device)
    loss = fused(case)
    loss.backward(retain_graph=True)
    loss.backward()
    (fused(case) * 2).backward()
    for level, gradient in zip(case.logits, recomputed(case, 4.0), strict=True):
        assert level.grad is not None
        torch.testing.assert_close(level.grad, gradient)


def test_normalizer(device: str) -> None:
    case = make_case("rows", 9, torch.float64, device)
    normalizer = torch.tensor(5.0, dtype=torch.float64, device=device)
    (gradient,) = torch.autograd.grad(fused(case, normalizer), case.logits)
    (expected,) = recomputed(case, 0.2)
    torch.testing.assert_close(gradient, expected)


def test_changed_logits_are_noticed(device: str) -> None:
    (leaf,), labels, _ = make_case("planes", 5, device=device, levels=((4, 5),))
    logits = leaf * 1
    loss = sigmoid_focal_loss([logits], labels, fused_gradient=True)
    logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_without_gradients_it_is_the_plain_loss(device: str) -> None:
    case = make_case("planes", 5, device=device)
    with torch.no_grad():
        assert not fused(case).requires_grad
    frozen = Case([x.detach() for x in case.logits], *case[1:])
    assert not fused(frozen).requires_grad
    assert fused(frozen).item() == fused(case).item()


def test_one_level_that_is_frozen(device: str) -> None:
    case = make_case("mixed", 5, device=device, levels=((4, 5), (2, 2)))
    first, second = case.logits
    half = Case([first, second.detach()], *case[1:])
    torch.testing.assert_close(
        torch.autograd.grad(fused(half), first)[0], torch.autograd.grad(fused(case), first)[0]
    )
