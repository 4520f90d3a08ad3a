"""iou_loss: the CPU and CUDA kernels, and the CUDA source in the simulator.

Kernels are called through ``torch.ops``, never through the public function, so that a fallback
cannot pass for a kernel. Values by hand are in test_iou_loss_values.py, edge cases in
test_iou_loss_fuzz.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torchvision.ops import complete_box_iou_loss, distance_box_iou_loss, generalized_box_iou_loss

from fcos_ext import iou_loss, iou_loss_ref
from fcos_ext._library import kernels
from fcos_ext.iou_loss import KIND_NUMBERS
from tests.ops.ltrb import as_views, make_rows, value_and_gradient

OP = torch.ops.fcos_ext.iou_loss.default
OP_BACKWARD = torch.ops.fcos_ext.iou_loss_backward.default

KINDS = list(KIND_NUMBERS)
REDUCTIONS = ["none", "sum", "mean"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (5000,) is more than a tile of the CPU kernel, 1025 and more are several of the CUDA kernel
SHAPES = [(), (0,), (1,), (7,), (3, 0), (5000,), (2, 3, 5)]


def call(
    pred: Tensor,
    target: Tensor,
    weights: Tensor | None = None,
    labels: Tensor | None = None,
    normalizer: Tensor | None = None,
    kind: str = "giou",
    reduction: str = "sum",
    smooth: float = 0.0,
    eps: float = 1e-7,
) -> Tensor:
    """The operator, with the public function's options."""
    number = REDUCTIONS.index(reduction)
    return OP(pred, target, weights, labels, normalizer, KIND_NUMBERS[kind], number, smooth, eps)[0]


def call_ref(
    pred: Tensor,
    target: Tensor,
    weights: Tensor | None = None,
    labels: Tensor | None = None,
    normalizer: Tensor | None = None,
    **options: Any,
) -> Tensor:
    return iou_loss_ref(pred, target, weights, labels=labels, normalizer=normalizer, **options)


def test_compiled(device: str) -> None:
    assert device in kernels("iou_loss")
    assert device in kernels("iou_loss_backward")


@pytest.mark.parametrize("given", ["all", "labels", "weights", "neither"])
@pytest.mark.parametrize("smooth, eps", [(0.0, 1e-7), (1.0, 0.5)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_matches_reference(
    device: str, kind: str, reduction: str, smooth: float, eps: float, given: str
) -> None:
    for shape in SHAPES:
        label_dtype = torch.int32 if smooth else torch.int64
        rows = make_rows(*shape, device=device, label_dtype=label_dtype)
        weights = rows.weights if given in ("all", "weights") else None
        labels = rows.labels if given in ("all", "labels") else None
        divide = reduction == "sum" and weights is not None
        normalizer = torch.tensor(2.5).to(rows.pred) if divide else None
        options = {"kind": kind, "reduction": reduction, "smooth": smooth, "eps": eps}
        results = [
            value_and_gradient(
                function(rows.pred, rows.target, weights, labels, normalizer, **options), rows.pred
            )
            for function in (call, call_ref)
        ]
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "kind, theirs",
    [
        ("giou", generalized_box_iou_loss),
        ("diou", distance_box_iou_loss),
        ("ciou", complete_box_iou_loss),
    ],
)
@pytest.mark.parametrize("shift", [0.0, 3.0, 15.0], ids=["around", "beside", "disjoint"])
def test_against_torchvision(
    device: str, kind: str, theirs: Callable[..., Tensor], shift: float
) -> None:
    pred, target, _, _ = make_rows(300, device=device)
    corner = pred.new_tensor([-1, -1, 1, 1])
    pred = (pred.detach() + shift * pred.new_tensor([-1, 0, 1, 0])).requires_grad_()
    for reduction in REDUCTIONS:
        torch.testing.assert_close(
            value_and_gradient(call(pred, target, kind=kind, reduction=reduction), pred),
            value_and_gradient(theirs(pred * corner, target * corner, reduction), pred),
            rtol=1e-9,
            atol=1e-12,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_error_not_above_eager(device: str, kind: str, dtype: torch.dtype) -> None:
    """Against float64, at most twice the error of the formula in float32, rounded once."""
    rows = make_rows(4000, dtype=dtype, device=device)
    exact_rows = [x.detach().double() if x.is_floating_point() else x for x in rows]
    exact_rows[0].requires_grad_()
    for reduction in REDUCTIONS:
        results = [
            value_and_gradient(function(*r, kind=kind, reduction=reduction), r[0])
            for function, r in ((call, rows), (call_ref, rows), (call_ref, exact_rows))
        ]
        for name, ours, theirs, exact in zip(("loss", "gradient"), *results, strict=True):
            assert ours.dtype == theirs.dtype
            error, bound = ((x.double() - exact).abs().max() for x in (ours, theirs))
            last_bit = torch.finfo(torch.float32).eps * exact.abs().max()
            assert error <= 2 * bound + last_bit, (name, reduction)


# alpha of ciou is a constant of the backward only: the reference has the same gradient
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "ciou"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(device: str, kind: str, reduction: str) -> None:
    pred, *others = make_rows(6, device=device, positive=0.7)
    assert torch.autograd.gradcheck(
        lambda p: call(p, *others, kind=kind, reduction=reduction, smooth=0.3), (pred,)
    )


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_opcheck(device: str, reduction: str, strided: bool) -> None:
    rows: Any = make_rows(2, 5, dtype=torch.float32, device=device)
    if strided:
        rows = as_views(*rows)
    number = REDUCTIONS.index(reduction)
    normalizer = torch.tensor(3.0, device=device) if reduction == "sum" else None
    opcheck(OP, (*rows, normalizer, 4, number, 0.0, 1e-7))
    loss, divisor = OP(*rows, normalizer, 4, number, 0.0, 1e-7)
    rows = [x.detach() for x in rows]
    divisor = None if reduction == "none" else divisor
    opcheck(OP_BACKWARD, (torch.randn_like(loss), *rows, divisor, 4, 0.0, 1e-7))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_strides_do_not_matter(device: str, reduction: str) -> None:
    rows = make_rows(3, 700, device=device)
    views = as_views(*rows)
    expected, actual = (
        value_and_gradient(call(*r, reduction=reduction), r[0]) for r in (rows, views)
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    # as the convolution behind it has them
    assert actual[1].stride() == views[0].stride()


@pytest.mark.parametrize("order", [(3, 2, 1, 0, 4), (4, 0, 2, 1, 3), (1, 3, 0, 2, 4)], ids=str)
def test_any_number_of_dimensions(device: str, order: tuple[int, ...]) -> None:
    """More than three strides of rows: the kernels work on a copy."""
    rows = make_rows(2, 3, 4, 5, device=device)
    back = sorted(range(5), key=lambda d: order[d])
    pred = rows.pred.detach().permute(order).contiguous().permute(back).requires_grad_()
    assert pred.stride() != rows.pred.stride()
    for reduction in ("none", "sum"):
        expected = value_and_gradient(call(*rows, reduction=reduction), rows.pred)
        actual = value_and_gradient(call(pred, *rows[1:], reduction=reduction), pred)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_unaligned(device: str) -> None:
    """Rows that start between 16-byte boundaries, and rows of a wider tensor."""
    rows = make_rows(300, dtype=torch.float32, device=device)
    expected = value_and_gradient(call(*rows), rows.pred)
    shifted = rows.pred.new_empty(4 * 300 + 1)[1:].view(300, 4).copy_(rows.pred.detach())
    wide = rows.pred.new_empty(300, 7)[:, 2:6].copy_(rows.pred.detach())
    for pred in (shifted.requires_grad_(), wide.requires_grad_()):
        actual = value_and_gradient(call(pred, *rows[1:]), pred)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("other", [*DTYPES, torch.float64], ids=str)
def test_dtypes_may_differ(device: str, dtype: torch.dtype, other: torch.dtype) -> None:
    rows = make_rows(50, dtype=dtype, device=device)
    target, weights = rows.target.to(other), rows.weights.to(other)
    high = torch.promote_types(dtype, torch.float32)
    loss = call(rows.pred, target, weights, rows.labels)
    expected = call(rows.pred.to(high), target.to(high), weights.to(high), rows.labels)
    assert loss.dtype == high
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.uint8, torch.int32], ids=str)
def test_labels_and_normalizers_of_any_integer_dtype(device: str, dtype: torch.dtype) -> None:
    rows = make_rows(50, dtype=torch.float32, device=device)
    labels = rows.labels.to(dtype)  # -1 is 255 in uint8: a class like any other
    normalizer = torch.tensor(3, device=device)
    options: Any = {"labels": labels, "normalizer": normalizer}
    actual, expected = (f(*rows[:3], **options) for f in (iou_loss, iou_loss_ref))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_double_backward_raises(device: str, reduction: str) -> None:
    rows = make_rows(6, device=device)
    loss = call(*rows, reduction=reduction).sum()
    (gradient,) = torch.autograd.grad(loss, rows.pred, create_graph=True)
    with pytest.raises(RuntimeError, match="_backward is not differentiable: .* _ref function"):
        gradient.sum().backward()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_compile_fullgraph(device: str, kind: Any, reduction: Any) -> None:
    check_compiled("aot_eager", device, kind, reduction)


def test_compile_inductor(device: str) -> None:
    check_compiled("inductor", device, "giou", "sum")


def check_compiled(backend: str, device: str, kind: Any, reduction: Any) -> None:
    def step(pred: Tensor, target: Tensor, weights: Tensor, labels: Tensor) -> Tensor:
        total = weights.sum() if reduction == "sum" else None
        options: Any = {"kind": kind, "reduction": reduction, "normalizer": total}
        return iou_loss(pred * 2, target, weights, labels=labels, **options) * 3

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for count in (50, 60, 70):
        rows = make_rows(count, dtype=torch.float32, device=device)
        torch.testing.assert_close(
            value_and_gradient(compiled(*rows), rows.pred),
            value_and_gradient(step(*rows), rows.pred),
        )


def test_autocast(device: str) -> None:
    rows = make_rows(40, dtype=torch.bfloat16, device=device)
    target = rows.target.float()
    with torch.autocast(device, torch.bfloat16):
        loss = iou_loss(rows.pred, target, rows.weights, labels=rows.labels)
        each = iou_loss(rows.pred, target, rows.weights, labels=rows.labels, reduction="none")
    assert (loss.dtype, each.dtype) == (torch.float32, torch.bfloat16)
    expected = iou_loss_ref(rows.pred.float(), target, rows.weights, labels=rows.labels)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, rows.pred)
    assert gradient.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_deterministic(
    device: str, kind: str, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    rows = make_rows(30_000, dtype=dtype, device=device)
    results = []
    for count in (1, 2, 3, 2):
        threads(count)
        results.append(value_and_gradient(call(*rows, kind=kind, reduction="mean"), rows.pred))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cuda_graph(reduction: str) -> None:
    """Captured with one input and replayed with another, more than once."""
    rows = make_rows(3000, dtype=torch.float32, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        value_and_gradient_of_ones(rows, reduction)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = value_and_gradient_of_ones(rows, reduction)
    for _ in range(2):
        for held, new in zip(rows, make_rows(3000, device="cuda"), strict=True):
            held.detach().copy_(new.detach())
        graph.replay()
        torch.testing.assert_close(captured, value_and_gradient_of_ones(rows, reduction))


def value_and_gradient_of_ones(rows: Any, reduction: str) -> tuple[Tensor, Tensor]:
    loss = call(*rows, reduction=reduction)
    return loss.detach(), torch.autograd.grad(loss.sum(), rows.pred)[0]
