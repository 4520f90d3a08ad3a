"""box_and_centerness_loss: the CPU and CUDA kernels, and the CUDA source in the simulator.

Kernels are called through ``torch.ops``, never through the public function, so that a fallback
cannot pass for a kernel. Levels as a head makes them are in
test_box_and_centerness_loss_levels.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

from fcos_ext import box_and_centerness_loss, box_and_centerness_loss_ref, iou_loss_ref
from fcos_ext._library import kernels
from fcos_ext.box_and_centerness_loss import operands
from fcos_ext.iou_loss import KIND_NUMBERS
from tests.ops.ltrb import as_views, make_rows
from tests.simt.build import SimtLibrary, load_simt_library

OP = torch.ops.fcos_ext.box_and_centerness_loss.default
OP_BACKWARD = torch.ops.fcos_ext.box_and_centerness_loss_backward.default

KINDS = list(KIND_NUMBERS)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
Results = Sequence[Tensor]


def make_inputs(*shape: int, given: bool = False, **options: Any) -> list[Any]:
    """pred, centerness, target, labels, centerness_target."""
    rows = make_rows(*shape, **options)
    scores = (torch.randn(shape, dtype=torch.float64) * 4).to(rows.pred.detach()).requires_grad_()
    return [rows.pred, scores, rows.target, rows.labels, rows.weights if given else None]


def call(
    inputs: Sequence[Any],
    kind: str = "giou",
    weighted: bool = True,
    smooth: float = 0.0,
    eps: float = 1e-7,
) -> Results:
    return OP(*arguments(inputs, kind, weighted, smooth, eps))


def arguments(
    inputs: Sequence[Any],
    kind: str = "giou",
    weighted: bool = True,
    smooth: float = 0.0,
    eps: float = 1e-7,
) -> tuple[Any, ...]:
    """Of the operator: no normalizers, any class, the centerness as quality."""
    pred, centerness, others = operands(*inputs)
    number = KIND_NUMBERS[kind]
    return pred, centerness, *others, None, 1 << 62, number, weighted, False, smooth, eps


def call_ref(inputs: Sequence[Any], **options: Any) -> Results:
    return box_and_centerness_loss_ref(*inputs[:4], centerness_target=inputs[4], **options)


def values_and_gradients(results: Results, inputs: Sequence[Any]) -> list[Tensor]:
    """The sums and counts, and the gradients of two of them, in different shares."""
    total = 1.5 * results[0] - 0.25 * results[1]
    return [*(x.detach() for x in results), *torch.autograd.grad(total, inputs[:2])]


def test_compiled(device: str) -> None:
    for suffix in ("", "_backward", "_with_gradient", "_rescale_"):
        assert device in kernels(f"box_and_centerness_loss{suffix}")


@pytest.mark.parametrize("function", [box_and_centerness_loss, box_and_centerness_loss_ref])
def test_hand_computed(device: str, function: Callable[..., Any]) -> None:
    # c = sqrt(1/3 * 2/2), 1, sqrt(0 * 1) and 0 beyond a side; giou of equal boxes is 0
    target = torch.tensor([[1.0, 2, 3, 2], [2, 2, 2, 2], [0, 1, 5, 1], [-1, 1, 5, 1], [9, 9, 9, 9]])
    c = [math.sqrt(1 / 3), 1, 0, 0]
    pred = torch.tensor([[1.0, 2, 3, 2], [1, 1, 1, 1], [0, 1, 5, 1], [-1, 1, 5, 1], [7, 7, 7, 7]])
    scores = torch.tensor([0.0, 2.0, -1.0, 3.0, math.nan])
    inputs = [x.to(device) for x in (pred, scores, target, torch.tensor([3, 0, 1, 79, -1]))]
    loss = function(*inputs)
    entropies = [math.log(1 + math.exp(x)) - x * y for x, y in zip((0, 2, -1, 3), c, strict=True)]
    assert loss.num_pos.item() == 4 and loss.num_pos.dtype == torch.int64
    assert loss.weight.item() == pytest.approx(sum(c))
    assert loss.box.item() == pytest.approx(0.75, abs=1e-6)  # 2 x 2 inside of 4 x 4
    assert loss.centerness.item() == pytest.approx(sum(entropies))
    assert function(*inputs, weighted=False).weight.item() == 4


@pytest.mark.parametrize("given", [False, True], ids=["computed", "given"])
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "unweighted"])
@pytest.mark.parametrize("smooth, eps", [(0.0, 1e-7), (1.0, 0.5)])
@pytest.mark.parametrize("kind", KINDS)
def test_matches_reference(
    device: str, kind: str, smooth: float, eps: float, weighted: bool, given: bool
) -> None:
    options: Any = {"kind": kind, "weighted": weighted, "smooth": smooth, "eps": eps}
    for shape in [(), (0,), (1,), (7,), (3, 0), (9000,), (2, 3, 5)]:
        dtype = torch.int32 if smooth else torch.int64
        inputs = make_inputs(*shape, given=given, device=device, label_dtype=dtype)
        results = [values_and_gradients(f(inputs, **options), inputs) for f in (call, call_ref)]
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_is_the_separate_losses(device: str) -> None:
    inputs = make_inputs(500, device=device)
    pred, scores, target, labels, _ = inputs
    loss = box_and_centerness_loss(*inputs[:4], kind="diou")
    pairs = torch.minimum(target[:, :2], target[:, 2:]) / torch.maximum(
        target[:, :2], target[:, 2:]
    )
    c = pairs.prod(dim=1).sqrt()
    assert loss.box.item() == pytest.approx(
        iou_loss_ref(pred, target, c, labels=labels, kind="diou").item()
    )
    positive = labels >= 0
    entropy = F.binary_cross_entropy_with_logits(scores[positive], c[positive], reduction="sum")
    assert loss.centerness.item() == pytest.approx(entropy.item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_error_not_above_eager(device: str, kind: str, dtype: torch.dtype) -> None:
    """Against float64, at most twice the error of the formula in float32, rounded once."""
    inputs = make_inputs(4000, dtype=dtype, device=device)
    exact = [x.detach().double() for x in inputs[:3]]
    exact = [exact[0].requires_grad_(), exact[1].requires_grad_(), *exact[2:], *inputs[3:]]
    results = [
        values_and_gradients(f(x, kind=kind), x)
        for f, x in ((call, inputs), (call_ref, inputs), (call_ref, exact))
    ]
    for ours, theirs, truth in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        error, bound = ((x.double() - truth).abs().max() for x in (ours, theirs))
        assert error <= 2 * bound + torch.finfo(torch.float32).eps * truth.abs().max()


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "ciou"])  # alpha is held constant
def test_gradcheck(device: str, kind: str, weighted: bool) -> None:
    inputs = make_inputs(6, device=device, positive=0.7)
    assert torch.autograd.gradcheck(
        lambda p, c: tuple(call([p, c, *inputs[2:]], kind, weighted)[:2]), inputs[:2]
    )


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("given", [False, True], ids=["computed", "given"])
def test_opcheck(device: str, given: bool, strided: bool) -> None:
    inputs = make_inputs(2, 5, given=given, dtype=torch.float32, device=device)
    if strided:
        inputs = [None if x is None else as_views(x)[0] for x in inputs]
    opcheck(OP, arguments(inputs, "giou"))
    grads = [torch.tensor(x, device=device) for x in (0.5, 2.0)]
    detached = [x if x is None else x.detach() for x in inputs]
    opcheck(OP_BACKWARD, (*grads, *arguments(detached)))


def test_strides_do_not_matter(device: str) -> None:
    inputs = make_inputs(3, 700, given=True, device=device)
    views = as_views(*inputs)
    expected, actual = (values_and_gradients(call(x), x) for x in (inputs, views))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert [x.stride() for x in actual[5:6]] == [views[0].stride()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf], ids=str)
def test_background_counts_for_nothing(device: str, garbage: float, dtype: torch.dtype) -> None:
    inputs = make_inputs(9000, given=True, dtype=dtype, device=device)
    masked = inputs[3] < 0
    dirty = [x.detach().clone() for x in inputs]
    for tensor in (*dirty[:3], dirty[4]):
        tensor[masked] = garbage
    dirty = [x.requires_grad_() if k < 2 else x for k, x in enumerate(dirty)]
    for case in (5, 4):  # the centerness target given and computed
        clean, results = (
            values_and_gradients(call(x), x)
            for x in ([*inputs[:case], *[None] * (5 - case)], [*dirty[:case], *[None] * (5 - case)])
        )
        assert all(torch.equal(a, b) for a, b in zip(results, clean, strict=True))
        assert all(gradient[masked].eq(0).all() for gradient in results[5:])


def test_nan_of_a_positive_is_not_hidden(device: str) -> None:
    for number in (0, 1, 2, 4):
        inputs = make_inputs(500, given=True, dtype=torch.float32, device=device)
        inputs[3][123] = 5
        with torch.no_grad():
            inputs[number].view(500, -1)[123, 0] = math.nan
        if number == 2:
            inputs[4] = None
        box, centerness, weight, num_pos, _ = call(inputs)
        assert box.isnan() == (number != 1)
        assert centerness.isnan() == (number != 0)
        assert weight.isnan() == (number in (2, 4))
        assert num_pos.item() == (inputs[3] >= 0).sum().item()


@pytest.mark.parametrize("part", [0, 1])
def test_one_sum_alone(device: str, part: int) -> None:
    inputs = make_inputs(50, device=device)
    gradients = torch.autograd.grad(call(inputs)[part], inputs[:2])
    assert gradients[1 - part].eq(0).all() and not gradients[part].eq(0).all()
    assert not any(x.requires_grad for x in call(inputs)[2:])


def test_double_backward_raises(device: str) -> None:
    inputs = make_inputs(6, device=device)
    gradient, _ = torch.autograd.grad(sum(call(inputs)[:2]), inputs[:2], create_graph=True)
    with pytest.raises(RuntimeError, match="_backward is not differentiable: .* _ref function"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(device: str, backend: str) -> None:
    def step(*inputs: Tensor) -> Results:
        loss = box_and_centerness_loss(inputs[0] * 2, *inputs[1:4])
        box = loss.box / loss.weight.clamp(min=1e-6)
        return box, loss.centerness / loss.num_pos.clamp(min=1)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for count in (50, 60):
        inputs = make_inputs(count, dtype=torch.float32, device=device)
        torch.testing.assert_close(
            values_and_gradients(compiled(*inputs[:4]), inputs),
            values_and_gradients(step(*inputs[:4]), inputs),
        )


def test_autocast(device: str) -> None:
    inputs = make_inputs(40, dtype=torch.bfloat16, device=device)
    with torch.autocast(device, torch.bfloat16):
        loss = box_and_centerness_loss(*inputs[:4])
    expected = box_and_centerness_loss_ref(*(x.float() for x in inputs[:3]), inputs[3])
    torch.testing.assert_close(tuple(loss), tuple(expected))
    gradients = torch.autograd.grad(loss.box + loss.centerness, inputs[:2])
    assert [x.dtype for x in gradients] == [torch.bfloat16] * 2


def test_deterministic(device: str, threads: Callable[[int], None]) -> None:
    inputs = make_inputs(30_000, dtype=torch.float32, device=device)
    results = []
    for count in (1, 2, 3, 2):
        threads(count)
        results.append(values_and_gradients(call(inputs), inputs))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_graph() -> None:
    """Captured with one input and replayed with others."""
    inputs = make_inputs(3000, dtype=torch.float32, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        values_and_gradients(call(inputs), inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = values_and_gradients(call(inputs), inputs)
    for _ in range(2):
        for held, new in zip(inputs[:4], make_inputs(3000, device="cuda"), strict=False):
            held.detach().copy_(new.detach())
        graph.replay()
        torch.testing.assert_close(captured, values_and_gradients(call(inputs), inputs))


# ---- the CUDA source on the CPU -----------------------------------------------------------------


@pytest.fixture(scope="module")
def simt() -> SimtLibrary:
    return load_simt_library()


@pytest.mark.parametrize("seed", [0, 1, 12345])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_simt(simt: SimtLibrary, dtype: torch.dtype, kind: str, seed: int) -> None:
    """One launch each way; contiguous and as views; more tiles than blocks."""
    ops, weighted = torch.ops.fcos_ext_simt, seed != 1
    label_dtype = torch.int32 if seed else torch.int64
    inputs = make_inputs(2, 1900, given=seed == 0, dtype=dtype, label_dtype=label_dtype)
    views = [x if x is None else as_views(x)[0] for x in inputs]
    for case in (inputs, views, make_inputs(0, dtype=dtype)):
        expected = values_and_gradients(call(case, kind, weighted), case)
        plain = [x if x is None else x.detach() for x in case]
        simt.set_seed(seed)
        before = simt.launches
        with simt.guarded_memory():
            options = arguments(plain, kind, weighted)
            sums = ops.box_and_centerness_loss(*options)
            grads = [torch.tensor(x).to(sums[0]) for x in (1.5, -0.25)]
            (by_pred,), (by_centerness,) = ops.box_and_centerness_loss_backward(*grads, *options)
        assert simt.launches - before == (2 if plain[0].numel() else 0)
        for ours, theirs in zip((*sums, by_pred, by_centerness), expected, strict=True):
            assert ours.dtype == theirs.dtype and ours.stride() == theirs.stride()
            rtol = 1e-5 if dtype != torch.float64 else 1e-12
            if ours.dtype in (torch.float16, torch.bfloat16):
                rtol = torch.finfo(dtype).eps
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol * 0.1)
