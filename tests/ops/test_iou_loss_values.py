"""iou_loss and its reference: values by hand, torchvision's losses, and the rules at edges."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torchvision.ops import complete_box_iou_loss, distance_box_iou_loss, generalized_box_iou_loss

import fcos_ext
from fcos_ext.iou_loss import IoUKind

Loss = Callable[..., Tensor]

KINDS = get_args(IoUKind)
TORCHVISION = {
    "giou": generalized_box_iou_loss,
    "diou": distance_box_iou_loss,
    "ciou": complete_box_iou_loss,
}


@pytest.fixture(params=["iou_loss", "iou_loss_ref"])
def iou_loss(request: pytest.FixtureRequest) -> Loss:
    """The public function, which is the CPU kernel here, and the specification."""
    return getattr(fcos_ext, request.param)


def make_distances(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(*shape, 4, generator=generator, dtype=torch.float64) * 9 + 0.1).to(dtype)


def decode(ltrb: Tensor) -> Tensor:
    """Boxes x0, y0, x1, y1 around the location (0, 0)."""
    return ltrb * ltrb.new_tensor([-1, -1, 1, 1])


# Sides 2x2 in 4x4 of one centre: I = 4, U = 16, C = 16. Then 4x6 and 4x4, centres (1, 1) and
# (-1, 0): A = 24, B = 16, I = 2 * 4 = 8, U = 32, C = 6 * 6 = 36, squared distance 5.
NESTED = ((1, 1, 1, 1), (2, 2, 2, 2))
CROSSING = ((1, 2, 3, 4), (3, 2, 1, 2))
V = 4 / math.pi**2 * (math.pi / 4 - math.atan(4 / 6)) ** 2


@pytest.mark.parametrize(
    "kind, boxes, smooth, expected",
    [
        ("iou", NESTED, 0, math.log(4)),
        ("iou", NESTED, 1, math.log(17 / 5)),
        ("linear_iou", NESTED, 0, 3 / 4),
        ("linear_iou", NESTED, 1, 12 / 17),
        ("giou", NESTED, 0, 3 / 4),
        ("giou", CROSSING, 0, 3 / 4 + 4 / 36),
        ("giou", CROSSING, 1, 24 / 33 + 4 / 36),
        ("diou", NESTED, 0, 3 / 4),
        ("diou", CROSSING, 0, 3 / 4 + 5 / 72),
        ("diou", CROSSING, 1, 24 / 33 + 5 / 72),
        ("ciou", NESTED, 0, 3 / 4),
        ("ciou", CROSSING, 0, 3 / 4 + 5 / 72 + V * V / (3 / 4 + V)),
        ("ciou", CROSSING, 1, 24 / 33 + 5 / 72 + V * V / (24 / 33 + V)),
    ],
)
def test_hand_computed(
    iou_loss: Loss, kind: Any, boxes: Any, smooth: float, expected: float
) -> None:
    pred, target = torch.tensor(boxes, dtype=torch.float64)
    loss = iou_loss(pred, target, kind=kind, smooth=smooth)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_eps_enters_where_documented(iou_loss: Loss) -> None:
    pred, target = torch.tensor(CROSSING, dtype=torch.float64)
    loss = {kind: iou_loss(pred, target, kind=kind, eps=8.0).item() for kind in KINDS}
    iou = 8 / (32 + 8)
    assert loss["iou"] == pytest.approx(-math.log(iou))
    assert loss["linear_iou"] == pytest.approx(1 - iou)
    assert loss["giou"] == pytest.approx(1 - iou + 4 / (36 + 8))
    assert loss["diou"] == pytest.approx(1 - iou + 5 / (72 + 8))
    # Here the sides, 4 and 6, are not longer than eps: no aspect term.
    assert loss["ciou"] == pytest.approx(loss["diou"])
    loss_1 = iou_loss(pred, target, kind="ciou", eps=1.0).item()
    assert loss_1 == pytest.approx(25 / 33 + 5 / 73 + V * V / (25 / 33 + V + 1))


@pytest.mark.parametrize("shift", [0.0, 3.0, 15.0], ids=["around", "beside", "disjoint"])
@pytest.mark.parametrize("kind", TORCHVISION)
def test_matches_torchvision(iou_loss: Loss, kind: Any, shift: float) -> None:
    target = make_distances(200, seed=1)
    pred = make_distances(200, seed=2)
    # Moving the predicted boxes makes distances negative, and finally the overlap empty.
    pred = (pred + pred.new_tensor([-shift, 0, shift, 0])).requires_grad_()
    loss = iou_loss(pred, target, kind=kind, reduction="none")
    expected = TORCHVISION[kind](decode(pred), decode(target))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)

    grad = torch.rand(200, dtype=torch.float64)
    (actual_grad,) = torch.autograd.grad(loss, pred, grad)
    (expected_grad,) = torch.autograd.grad(expected, pred, grad)
    torch.testing.assert_close(actual_grad, expected_grad, rtol=1e-10, atol=1e-12)
    if shift == 15:
        assert (actual_grad != 0).any(dim=1).all(), "disjoint boxes must still be pulled together"


@pytest.mark.parametrize("kind", KINDS)
def test_unit_cancels(iou_loss: Loss, kind: Any) -> None:
    pred, target = make_distances(50, seed=3), make_distances(50, seed=4)
    pixels = iou_loss(pred * 128, target * 128, kind=kind, reduction="none")
    strides = iou_loss(pred, target, kind=kind, reduction="none")
    torch.testing.assert_close(pixels, strides, rtol=1e-4, atol=1e-6)


def test_alpha_of_ciou_is_constant_in_backward(iou_loss: Loss) -> None:
    pred = torch.tensor(CROSSING[0], dtype=torch.float64, requires_grad=True)
    target = torch.tensor(CROSSING[1], dtype=torch.float64)
    alpha = V / (3 / 4 + V)
    v = 4 / math.pi**2 * (math.pi / 4 - torch.atan((pred[0] + pred[2]) / (pred[1] + pred[3]))) ** 2
    expected = iou_loss(pred, target, kind="diou") + alpha * v
    (expected_grad,) = torch.autograd.grad(expected, pred)
    (grad,) = torch.autograd.grad(iou_loss(pred, target, kind="ciou"), pred)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_ignored_rows_are_absent(iou_loss: Loss, kind: Any) -> None:
    pred, target = make_distances(2, 3, seed=7), make_distances(2, 3, seed=8)
    weights = torch.rand(2, 3, dtype=torch.float64)
    labels = torch.tensor([[0, -1, 5], [-2, 79, -1]])
    clean = pred.clone().requires_grad_()
    expected = iou_loss(clean, target, weights, labels=labels, kind=kind, reduction="none")
    expected.sum().backward()

    ignored = labels < 0
    pred[ignored] = torch.tensor([math.nan, math.inf, -math.inf, 0.0], dtype=torch.float64)
    target[ignored] = math.nan
    weights[ignored] = math.nan
    pred.requires_grad_()
    loss = iou_loss(pred, target, weights, labels=labels, kind=kind, reduction="none")
    loss.sum().backward()
    assert torch.equal(loss, expected)
    assert torch.equal(loss[ignored], torch.zeros(3, dtype=torch.float64))
    assert pred.grad is not None and clean.grad is not None
    assert torch.equal(pred.grad, clean.grad)
    assert torch.equal(pred.grad[ignored], torch.zeros(3, 4, dtype=torch.float64))
    assert (pred.grad[~ignored] != 0).all()

    total = iou_loss(pred, target, weights, labels=labels, kind=kind)
    mean = iou_loss(pred, target, weights, labels=labels, kind=kind, reduction="mean")
    torch.testing.assert_close(total, expected.sum())
    torch.testing.assert_close(mean, expected.sum() / 3)


def test_nan_of_a_row_that_counts_is_not_hidden(iou_loss: Loss) -> None:
    pred = torch.tensor([[1.0, 1, 1, 1], [math.nan, 1, 1, 1]])
    for kind in KINDS:
        loss = iou_loss(
            pred, torch.ones(2, 4), labels=torch.tensor([0, 0]), kind=kind, reduction="none"
        )
        assert loss.isnan().tolist() == [False, True], kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_degenerate_predictions_stay_finite(iou_loss: Loss, kind: Any, dtype: torch.dtype) -> None:
    rows = [
        (0, 0, 0, 0),
        (0, 2, 0, 3),
        (2, 0, 3, 0),
        (1e-30, 1e-30, 0, 0),
        (-2, -2, -2, -2),
        (-5, 1, 2, 1),
        (-9, -9, 12, 12),
        (3, 3, 3, 3),
    ]
    pred = torch.tensor(rows, dtype=dtype, requires_grad=True)
    target = torch.tensor([3, 3, 3, 3], dtype=dtype).expand(len(rows), 4)
    loss = iou_loss(pred, target, kind=kind, reduction="none")
    loss.sum().backward()
    assert loss.isfinite().all()
    assert pred.grad is not None and pred.grad.isfinite().all()
    assert loss[-1].item() == pytest.approx(0, abs=1e-6)
    assert (loss >= 0).all()


def test_boxes_of_no_area_by_kind(iou_loss: Loss) -> None:
    pred = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[1.0, 2, 3, 2]], dtype=torch.float64)  # 4x4, centre (1, 0)

    def value_and_grad(kind: Any) -> tuple[float, Tensor]:
        loss = iou_loss(pred, target, kind=kind)
        return loss.item(), torch.autograd.grad(loss, pred)[0]

    value, grad = value_and_grad("iou")
    assert value == pytest.approx(-math.log(1e-6)) and (grad == 0).all()
    assert value_and_grad("linear_iou")[0] == pytest.approx(1)
    value, grad = value_and_grad("giou")  # C = U = 16
    assert value == pytest.approx(1)
    for kind in ("diou", "ciou"):
        value, grad = value_and_grad(kind)
        assert value == pytest.approx(1 + 1 / 32)
        # Growing to the right takes the centre towards that of the target.
        assert grad[0, 2] < 0 < grad[0, 0]


def test_inside_out_box_is_empty(iou_loss: Loss) -> None:
    target = torch.tensor([2.0, 2, 2, 2])
    outside_in = torch.tensor([-3.0, 1, -3, 1])  # width -6
    empty = torch.tensor([0.0, 1, 0, 1])
    for kind in ("iou", "linear_iou", "giou"):
        assert iou_loss(outside_in, target, kind=kind) == iou_loss(empty, target, kind=kind)


def test_only_pred_gets_a_gradient(iou_loss: Loss) -> None:
    pred, target = make_distances(4, seed=9).requires_grad_(), make_distances(4).requires_grad_()
    weights = torch.ones(4, dtype=torch.float64, requires_grad=True)
    normalizer = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    iou_loss(pred, target, weights, normalizer=normalizer).backward()
    assert pred.grad is not None and (pred.grad != 0).all()
    assert target.grad is None and weights.grad is None and normalizer.grad is None


def test_weights_and_normalizer(iou_loss: Loss) -> None:
    pred, target = make_distances(6, seed=10), make_distances(6, seed=11)
    rows = iou_loss(pred, target, reduction="none")
    weights = torch.tensor([0, 0.5, 1, 2, -1, 0.25], dtype=torch.float64)
    expected = sum(w * row for w, row in zip(weights.tolist(), rows.tolist(), strict=True))
    total = iou_loss(pred, target, weights)
    assert total.item() == pytest.approx(expected)
    for normalizer, divisor in ((4.0, 4.0), (0.25, 0.25), (0.0, 1e-6), (-3.0, 1e-6), (7, 7)):
        loss = iou_loss(pred, target, weights, normalizer=torch.tensor(normalizer))
        assert loss.item() == pytest.approx(expected / divisor)


@pytest.mark.parametrize("shape", [(0,), (2, 0), ()], ids=str)
def test_unusual_shapes(iou_loss: Loss, shape: tuple[int, ...]) -> None:
    pred = torch.ones(*shape, 4, requires_grad=True)
    target = torch.ones(*shape, 4) * 2
    assert iou_loss(pred, target, reduction="none").shape == shape
    for reduction in ("sum", "mean"):
        loss = iou_loss(pred, target, reduction=reduction)
        loss.backward()
        assert loss.shape == ()
        assert loss.item() == pytest.approx(0.75 if shape == () else 0)
    assert pred.grad is not None and pred.grad.shape == pred.shape


def test_no_row_takes_part(iou_loss: Loss) -> None:
    pred = torch.full((3, 4), math.nan, requires_grad=True)
    labels = torch.tensor([-1, -2, -1])
    for reduction in ("sum", "mean"):
        loss = iou_loss(pred, torch.ones(3, 4), labels=labels, reduction=reduction)
        assert loss.item() == 0
        assert torch.equal(torch.autograd.grad(loss, pred)[0], torch.zeros(3, 4))
