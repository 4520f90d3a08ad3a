"""iou_loss at ties, zeros, negative sides and NaN, and the CUDA source in the simulator."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fcos_ext import iou_loss_ref
from fcos_ext.iou_loss import KIND_NUMBERS
from tests.ops.ltrb import as_views, edge_cases, make_rows, value_and_gradient
from tests.simt.build import SimtLibrary, load_simt_library

OPS = torch.ops.fcos_ext
KINDS = list(KIND_NUMBERS)
REDUCTIONS = ["none", "sum", "mean"]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def call(
    pred: Tensor,
    target: Tensor,
    weights: Tensor | None,
    labels: Tensor | None,
    kind: str,
    reduction: str,
    smooth: float = 0.0,
) -> Tensor:
    number = REDUCTIONS.index(reduction)
    return OPS.iou_loss(
        pred, target, weights, labels, None, KIND_NUMBERS[kind], number, smooth, 1e-7
    )[0]


def assert_follows_reference(actual: Tensor, expected: Tensor, size: Tensor) -> None:
    """Equal where the reference is finite, to some bits of the terms that make it up.

    Those of a gradient may cancel; each is at most about 1 / ``size``, a side [rows] of a box.
    """
    finite = expected.isfinite()
    assert finite.double().mean() > 0.98
    largest = 1 / size if expected.dim() == 1 else 1 / size[:, None]
    bound = 100 * torch.finfo(actual.dtype).eps * (expected.abs() + largest + 1)
    close = (actual - expected).abs() <= bound
    assert close[finite].all(), (actual[finite & ~close], expected[finite & ~close])


@pytest.mark.parametrize("smooth", [0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_edge_cases(device: str, dtype: torch.dtype, kind: str, smooth: float) -> None:
    """In the reference's own precision, so that both take the same side of every comparison."""
    for _ in range(3):
        pred, target = (x.to(device) for x in edge_cases(4000, dtype))
        pred.requires_grad_()
        actual = value_and_gradient(call(pred, target, None, None, kind, "none", smooth), pred)
        loss = iou_loss_ref(pred, target, kind=kind, reduction="none", smooth=smooth)  # type: ignore[arg-type]
        sides = torch.cat((pred[:, :2] + pred[:, 2:], target[:, :2] + target[:, 2:]), dim=1)
        size = torch.where(sides > 0, sides, math.inf).amin(dim=1)
        for ours, theirs in zip(actual, value_and_gradient(loss, pred), strict=True):
            assert_follows_reference(ours, theirs, size)


@pytest.mark.parametrize("kind", KINDS)
def test_half_of_a_tie(device: str, kind: str) -> None:
    """Equal boxes: half of the gradient of a minimum, half of that of a maximum, as autograd."""
    box = torch.tensor([[1.0, 2, 3, 4]], dtype=torch.float64, device=device).requires_grad_()
    loss = call(box, box.detach(), None, None, kind, "sum")
    expected = iou_loss_ref(box, box.detach(), kind=kind)  # type: ignore[arg-type]
    assert loss.item() == expected.item()
    gradients = [torch.autograd.grad(x, box)[0] for x in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf], ids=str)
def test_masked_rows_count_for_nothing(device: str, garbage: float, dtype: torch.dtype) -> None:
    rows = make_rows(9000, dtype=dtype, device=device)
    masked = rows.labels < 0
    dirty = [x.detach().clone() for x in rows[:3]]
    for tensor in dirty:
        tensor[masked] = garbage
    dirty[0].requires_grad_()
    for kind in KINDS:
        for reduction in REDUCTIONS:
            clean = value_and_gradient(call(*rows, kind, reduction), rows.pred)
            loss = call(*dirty, rows.labels, kind, reduction)
            value, gradient = value_and_gradient(loss, dirty[0])
            assert torch.equal(value, clean[0]) and torch.equal(gradient, clean[1])
            assert gradient[masked].eq(0).all()
            assert reduction != "none" or value[masked].eq(0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["pred", "target", "weights"])
def test_nan_of_a_row_that_counts_is_not_hidden(device: str, name: str, kind: str) -> None:
    for side in range(4 if name != "weights" else 1):
        rows = make_rows(500, dtype=torch.float32, device=device)
        rows.labels[123] = 5
        with torch.no_grad():
            getattr(rows, name).view(500, -1)[123, side] = math.nan
        each = call(*rows, kind, "none")
        assert each.isnan().nonzero().tolist() == [[123]]
        assert call(*rows, kind, "sum").isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_is_rounded_once(device: str, kind: Any, dtype: torch.dtype) -> None:
    rows = make_rows(500, dtype=dtype, device=device)
    pred, target = (x.detach() * 20 for x in rows[:2])
    low, high = pred.requires_grad_(), pred.detach().double().requires_grad_()
    actual = value_and_gradient(call(low, target, None, None, kind, "none"), low)
    loss = iou_loss_ref(high, target.double(), kind=kind, reduction="none")
    grad = torch.randn(500, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = loss, torch.autograd.grad(loss, high, grad.to(low).double())[0]
    ulp = torch.finfo(dtype).eps
    # float32 is so much finer that the result may differ from the rounded truth in rare ties only
    for ours, truth in zip(actual, exact, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), truth, rtol=0.51 * ulp, atol=1e-6)


# ---- the CUDA source on the CPU -----------------------------------------------------------------


@pytest.fixture(scope="module")
def simt() -> SimtLibrary:
    return load_simt_library()


def simt_value_and_gradient(
    lib: SimtLibrary, rows: Any, kind: str, reduction: str, seed: int
) -> tuple[Tensor, Tensor]:
    """By the CUDA kernels, one launch each way, for the gradient of ``value_and_gradient``."""
    ops, number = torch.ops.fcos_ext_simt, KIND_NUMBERS[kind]
    rows = [None if x is None else x.detach() for x in rows]
    lib.set_seed(seed)
    before = lib.launches
    with lib.guarded_memory():
        loss, divisor = ops.iou_loss(*rows, None, number, REDUCTIONS.index(reduction), 0.0, 1e-7)
        generator = torch.Generator().manual_seed(1)
        grad = torch.randn(loss.shape, generator=generator, dtype=torch.float64).to(loss)
        gradient = ops.iou_loss_backward(
            grad, *rows, None if reduction == "none" else divisor, number, 0.0, 1e-7
        )
    assert lib.launches - before == (2 if rows[0].numel() else 0)
    return loss, gradient


def assert_same(actual: Any, expected: Any, dtype: torch.dtype) -> None:
    """As the CPU kernel, but for the order of a sum and the approximations of a GPU."""
    eps = 1e-12 if dtype == torch.float64 else max(torch.finfo(dtype).eps, 1e-5)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.stride() == theirs.stride()
        rtol = eps if ours.dtype == dtype else 1e-5
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol * 0.1)


@pytest.mark.parametrize("seed", [0, 1, 12345])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_simt(simt: SimtLibrary, dtype: torch.dtype, kind: str, seed: int) -> None:
    """Contiguous and as views, with and without labels; more tiles than blocks."""
    label_dtype = torch.int32 if seed else torch.int64
    rows = make_rows(2, 1900, dtype=dtype, label_dtype=label_dtype)
    reduction = REDUCTIONS[seed % 3]
    cases = [rows, as_views(*rows), (*rows[:2], None, None)]
    for case in cases[seed % 2 :]:
        expected = value_and_gradient(call(*case, kind, reduction), case[0])
        actual = simt_value_and_gradient(simt, case, kind, reduction, seed)
        assert_same(actual, expected, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_simt_edge_cases(simt: SimtLibrary, kind: str) -> None:
    pred, target = edge_cases(1200, torch.float64)
    pred.requires_grad_()
    expected = value_and_gradient(call(pred, target, None, None, kind, "none"), pred)
    actual = simt_value_and_gradient(simt, (pred, target, None, None), kind, "none", 7)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12, equal_nan=True)


def test_simt_shapes_and_dtypes(simt: SimtLibrary) -> None:
    for shape in [(), (0,), (1,), (1024,), (1025,), (3, 0), (2, 3, 5)]:
        for reduction in REDUCTIONS:
            rows = make_rows(*shape, dtype=torch.float32)
            expected = value_and_gradient(call(*rows, "giou", reduction), rows.pred)
            actual = simt_value_and_gradient(simt, rows, "giou", reduction, 1)
            assert_same(actual, expected, torch.float32)
    for dtype in DTYPES:
        rows = make_rows(70, dtype=torch.float32)
        mixed = (rows.pred, rows.target.to(dtype), rows.weights.to(dtype), rows.labels)
        expected = value_and_gradient(call(*mixed, "diou", "mean"), rows.pred)
        assert_same(
            simt_value_and_gradient(simt, mixed, "diou", "mean", 2), expected, torch.float32
        )


def test_simt_unaligned(simt: SimtLibrary) -> None:
    for dtype in DTYPES:
        rows = make_rows(300, dtype=dtype)
        shifted = rows.pred.new_empty(4 * 300 + 1)[1:].view(300, 4).copy_(rows.pred.detach())
        wide = rows.pred.new_empty(300, 7)[:, 2:6].copy_(rows.pred.detach())
        for pred in (shifted, wide):
            case = (pred.detach().requires_grad_(), *rows[1:])
            expected = value_and_gradient(call(*case, "giou", "sum"), case[0])
            assert_same(simt_value_and_gradient(simt, case, "giou", "sum", 3), expected, dtype)


def test_simt_normalizer(simt: SimtLibrary) -> None:
    rows = [x.detach() for x in make_rows(50, dtype=torch.float32)]
    for value, divisor in ((2.5, 2.5), (0.0, 1e-6), (-1.0, 1e-6)):
        normalizer = torch.tensor(value)
        options = (*rows, normalizer, KIND_NUMBERS["giou"], REDUCTIONS.index("sum"), 0.0, 1e-7)
        actual, expected = (ops.iou_loss(*options) for ops in (torch.ops.fcos_ext_simt, OPS))
        torch.testing.assert_close(actual, expected)
        assert actual[1].item() == torch.tensor(divisor).item()
