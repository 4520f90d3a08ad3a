"""sigmoid_focal_loss: the CPU and CUDA kernels, and the CUDA source in the simulator.

Kernels are called through ``torch.ops``, never through the public function, so that a fallback
cannot pass for a kernel.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.ops
from torch import Tensor
from torch.library import opcheck

from fcos_ext import _host, sigmoid_focal_loss, sigmoid_focal_loss_ref
from fcos_ext._library import kernels
from tests.simt.build import SimtLibrary, load_simt_library

OP = torch.ops.fcos_ext.sigmoid_focal_loss.default
OP_BACKWARD = torch.ops.fcos_ext.sigmoid_focal_loss_backward.default

HALVES = [torch.float16, torch.bfloat16]
# [..., C] of the logits. 513 x 80 is more than one tile of the CPU kernel, 2048 and less.
SHAPES = [(0, 80), (1, 1), (5, 0), (80,), (7, 5), (3, 4, 91), (513, 1), (2, 1000, 80)]
# None: each loss; else the normalizer of the sum, 0 for no normalizer.
REDUCTIONS = {"none": None, "sum": 0.0, "divided by 1": 0.25, "divided by 37.5": 37.5}


def make_labels(rows: tuple[int, ...], C: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Mostly background, as in training, with every other kind of label between."""
    labels = torch.randint(-3, C + 2, rows)
    return torch.where(torch.rand(rows) < 0.6, -1, labels).to(dtype)


def make_inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    label_dtype: torch.dtype = torch.int64,
    mean: float = -1.0,
    std: float = 4.0,
) -> tuple[Tensor, Tensor]:
    logits = (torch.randn(shape, dtype=torch.float64) * std + mean).to(dtype)
    labels = make_labels(shape[:-1], shape[-1], label_dtype)
    return logits.to(device).requires_grad_(), labels.to(device)


def make_normalizer(logits: Tensor, reduction: float | None) -> Tensor | None:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return torch.tensor(reduction, dtype=dtype, device=logits.device) if reduction else None


def value_and_gradient(loss: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and its gradient for a random ``grad_output`` that is the same each time."""
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(loss.shape, generator=generator, dtype=torch.float64).to(loss)
    return loss.detach(), torch.autograd.grad(loss, logits, grad)[0]


def expected(
    logits: Tensor, labels: Tensor, reduction: float | None, alpha: float, gamma: float
) -> tuple[Tensor, Tensor]:
    loss = sigmoid_focal_loss_ref(
        logits,
        labels,
        alpha,
        gamma,
        reduction="none" if reduction is None else "sum",
        normalizer=make_normalizer(logits, reduction),
    )
    return value_and_gradient(loss, logits)


# ---- the kernels of this device -----------------------------------------------------------------


def test_compiled(device: str) -> None:
    assert device in kernels("sigmoid_focal_loss")
    assert device in kernels("sigmoid_focal_loss_backward")


@pytest.mark.parametrize("label_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("alpha, gamma", [(0.25, 2.0), (0.25, 1.5), (0.7, 2.0), (0.0, 0.0)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(
    device: str,
    shape: tuple[int, ...],
    reduction: str,
    alpha: float,
    gamma: float,
    label_dtype: torch.dtype,
) -> None:
    divisor = REDUCTIONS[reduction]
    logits, labels = make_inputs(shape, device=device, label_dtype=label_dtype)
    normalizer = make_normalizer(logits, divisor)
    loss = OP(logits, labels, normalizer, alpha, gamma, divisor is not None)
    torch.testing.assert_close(
        value_and_gradient(loss, logits),
        expected(logits, labels, divisor, alpha, gamma),
        rtol=1e-10,
        atol=1e-12,
    )


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 91)], ids=str)
def test_public_function_matches_reference(
    device: str, shape: tuple[int, ...], reduction: Any
) -> None:
    logits, labels = make_inputs(shape, device=device)
    results = [
        value_and_gradient(function(logits, labels, 0.3, 1.5, reduction=reduction), logits)
        for function in (sigmoid_focal_loss, sigmoid_focal_loss_ref)
    ]
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_mean_is_over_what_is_not_ignored(device: str) -> None:
    logits = torch.zeros(4, 3, device=device)
    labels = torch.tensor([0, -1, -2, 3], device=device)  # the last two do not count
    loss = sigmoid_focal_loss(logits, labels, 0.5, 0.0, reduction="mean")
    torch.testing.assert_close(loss.cpu(), 0.5 * torch.tensor(2.0).log())
    nothing = sigmoid_focal_loss(logits, labels.fill_(-2), reduction="mean")
    assert nothing.item() == 0


def test_normalizer_of_any_dtype_gets_no_gradient(device: str) -> None:
    logits, labels = make_inputs((7, 5), torch.float32, device)
    count = torch.tensor(3, device=device)
    scale = torch.tensor(3.0, device=device, requires_grad=True)
    by_count, by_scale = (
        sigmoid_focal_loss(logits, labels, normalizer=normalizer) for normalizer in (count, scale)
    )
    assert by_count.item() == by_scale.item()
    by_scale.backward()
    assert scale.grad is None


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("alpha, gamma", [(0.25, 2.0), (0.6, 0.5)])
def test_against_torchvision(device: str, alpha: float, gamma: float, reduction: Any) -> None:
    logits, _ = make_inputs((64, 9), device=device)
    labels = torch.randint(-1, 9, (64,), device=device)
    one_hot = torch.nn.functional.one_hot(labels + 1, 10)[:, 1:].to(logits)
    loss = sigmoid_focal_loss(logits, labels, alpha, gamma, reduction=reduction)
    theirs = torchvision.ops.sigmoid_focal_loss(logits, one_hot, alpha, gamma, reduction)
    torch.testing.assert_close(
        value_and_gradient(loss, logits), value_and_gradient(theirs, logits), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("gamma", [2.0, 1.5])
@pytest.mark.parametrize("mean, std", [(0, 4), (-4.6, 0.5), (-9, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_error_not_above_eager(
    device: str, dtype: torch.dtype, mean: float, std: float, gamma: float
) -> None:
    """Against float64, at most twice the error of the formula in float32, rounded once."""
    logits, labels = make_inputs((500, 80), dtype, device, mean=mean, std=std)
    for reduction in (None, 0.0):
        truth = expected(logits.detach().double().requires_grad_(), labels, reduction, 0.25, gamma)
        eager = expected(logits, labels, reduction, 0.25, gamma)
        loss = OP(logits, labels, None, 0.25, gamma, reduction is not None)
        actual = value_and_gradient(loss, logits)
        names = ("loss", "gradient")
        for name, ours, theirs, exact in zip(names, actual, eager, truth, strict=True):
            assert ours.dtype == theirs.dtype
            error, bound = ((x.double() - exact).abs().max() for x in (ours, theirs))
            # Eager may be right by luck: a last bit of float32 is always allowed.
            last_bit = torch.finfo(torch.float32).eps * exact.abs().max()
            assert error <= 2 * bound + last_bit, (name, reduction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize("gamma", [2.0, 1.5, 0.0])
def test_extreme_logits(device: str, dtype: torch.dtype, gamma: float) -> None:
    """Finite, and right, as far as float16 reaches."""
    sizes = torch.tensor([0, 1e-4, 1e-2, 0.5, 3, 7.7, 9.5, 16.7, 17.5, 40, 88, 100, 1e4, 6e4])
    x = torch.cat([sizes, -sizes]).to(dtype).to(device)
    # Column 0 of the row is the positive class, column 1 a negative.
    logits = x[:, None].repeat(1, 2).requires_grad_()
    labels = torch.zeros(len(x), dtype=torch.int64, device=device)
    truth = expected(logits.detach().double().requires_grad_(), labels, None, 0.25, gamma)
    actual = value_and_gradient(OP(logits, labels, None, 0.25, gamma, False), logits)
    # eps of the dtype, and a few of float32 where e^x comes from a rounded x
    rtol = max(torch.finfo(dtype).eps, 4e-6 if dtype != torch.float64 else 1e-12)
    for ours, exact in zip(actual, truth, strict=True):
        # Below the smallest float32, or subnormal in float16, there is nothing to compare.
        atol = 1e-7 if dtype == torch.float16 else 1e-37
        torch.testing.assert_close(ours.double(), exact, rtol=rtol, atol=atol)
    total = OP(logits, labels, None, 0.25, gamma, True)
    torch.testing.assert_close(total.double(), truth[0].sum(), rtol=4e-6, atol=0)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("C", [3, 80])
def test_ignored_rows_count_for_nothing(device: str, C: int, garbage: float) -> None:
    logits, labels = make_inputs((200, C), torch.float32, device)
    ignored = (labels < -1) | (labels >= C)
    clean = expected(logits.detach()[~ignored].requires_grad_(), labels[~ignored], 0.0, 0.25, 2.0)
    logits = logits.detach().masked_fill(ignored[:, None], garbage).requires_grad_()
    total, gradient = value_and_gradient(OP(logits, labels, None, 0.25, 2.0, True), logits)
    torch.testing.assert_close(total, clean[0])
    torch.testing.assert_close(gradient[~ignored], clean[1])
    assert gradient[ignored].eq(0).all()
    assert OP(logits, labels, None, 0.25, 2.0, False)[ignored].eq(0).all()


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("gamma", [2.0, 0.7])
def test_gradcheck(device: str, gamma: float, reduce: bool) -> None:
    logits, labels = make_inputs((6, 4), device=device, std=2)
    normalizer = torch.tensor(3.0, dtype=torch.float64, device=device) if reduce else None
    assert torch.autograd.gradcheck(
        lambda x: OP(x, labels, normalizer, 0.3, gamma, reduce), (logits,)
    )


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_opcheck(device: str, reduction: str, strided: bool) -> None:
    divisor = REDUCTIONS[reduction]
    logits, labels = make_inputs((6, 4), torch.float32, device)
    if strided:
        logits = logits.detach().t().contiguous().t().requires_grad_()
        labels = labels.repeat_interleave(2)[::2]
        assert not (logits.is_contiguous() or labels.is_contiguous())
    normalizer = make_normalizer(logits, divisor)
    reduce = divisor is not None
    opcheck(OP, (logits, labels, normalizer, 0.25, 2.0, reduce))
    grad = torch.randn_like(OP(logits, labels, normalizer, 0.25, 2.0, reduce))
    opcheck(OP_BACKWARD, (grad, logits.detach(), labels, normalizer, 0.25, 2.0))


def test_strides_do_not_matter(device: str) -> None:
    logits, labels = make_inputs((5, 80, 7), device=device)
    # As the network gives them: [N, C, H], seen as [N, H, C].
    seen = logits.transpose(1, 2)
    labels = make_labels((7, 5), 80).to(device).t()
    results = [
        value_and_gradient(OP(x, y, None, 0.25, 2.0, reduce), x)
        for x, y, reduce in [
            (seen, labels, False),
            (seen.contiguous(), labels.contiguous(), False),
            (seen, labels, True),
            (seen.contiguous(), labels.contiguous(), True),
        ]
    ]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    torch.testing.assert_close(results[2], results[3], rtol=0, atol=0)


@pytest.mark.parametrize("reduce", [False, True])
def test_double_backward_raises(device: str, reduce: bool) -> None:
    logits, labels = make_inputs((6, 4), device=device)
    loss = OP(logits, labels, None, 0.25, 2.0, reduce).sum()
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="_backward is not differentiable: .* _ref function"):
        gradient.sum().backward()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_compile_fullgraph(device: str, reduction: Any) -> None:
    check_compiled("aot_eager", device, reduction)


def test_compile_inductor(device: str) -> None:
    check_compiled("inductor", device, "sum")


def check_compiled(backend: str, device: str, reduction: Any) -> None:
    def step(logits: Tensor, labels: Tensor) -> Tensor:
        count = (labels >= 0).sum() if reduction == "sum" else None
        return sigmoid_focal_loss(logits * 2, labels, reduction=reduction, normalizer=count) * 3

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for rows in (50, 60, 70):
        logits, labels = make_inputs((rows, 8), torch.float32, device)
        torch.testing.assert_close(
            value_and_gradient(compiled(logits, labels), logits),
            value_and_gradient(step(logits, labels), logits),
        )


def test_autocast(device: str) -> None:
    features = torch.randn(20, 16, device=device)
    weight = torch.randn(80, 16, device=device, requires_grad=True)
    labels = make_labels((20,), 80).to(device)
    with torch.autocast(device, torch.bfloat16):
        logits = torch.nn.functional.linear(features, weight)
        logits.retain_grad()
        loss = sigmoid_focal_loss(logits, labels)
        each = sigmoid_focal_loss(logits, labels, reduction="none")
    assert (logits.dtype, loss.dtype, each.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    torch.testing.assert_close(loss, sigmoid_focal_loss_ref(logits.float(), labels))
    loss.backward()
    assert logits.grad is not None and logits.grad.dtype == torch.bfloat16
    assert weight.grad is not None and weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic(device: str, dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    logits, labels = make_inputs((5000, 80), dtype, device)
    results = []
    for count in (1, 2, 3, 2):
        threads(count)
        results.append(value_and_gradient(OP(logits, labels, None, 0.25, 2.0, True), logits))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ---- CPU instruction sets -----------------------------------------------------------------------

INSTRUCTION_SETS = ["baseline", "avx2", "avx512"]
ISA_PROGRAM = """
import sys, torch
from fcos_ext import _host
inputs = torch.load(sys.argv[1])
assert _host.cpu_isa() == sys.argv[3], _host.cpu_isa()
results = []
for logits, labels, gamma, reduce in inputs:
    loss = torch.ops.fcos_ext.sigmoid_focal_loss(logits, labels, None, 0.25, gamma, reduce)
    grad = torch.ones_like(loss)
    results += [loss, torch.ops.fcos_ext.sigmoid_focal_loss_backward(
        grad, logits, labels, None, 0.25, gamma)]
torch.save(results, sys.argv[2])
"""


def test_instruction_sets(tmp_path: Path) -> None:
    """All that this CPU has agree to the rounding; each runs in a process of its own."""
    available = INSTRUCTION_SETS[: INSTRUCTION_SETS.index(_host.cpu_isa()) + 1]
    inputs = []
    for dtype in (torch.float32, torch.float64, *HALVES):
        for gamma in (2.0, 1.5):
            logits, labels = make_inputs((301, 80), dtype)
            inputs += [(logits.detach(), labels, gamma, reduce) for reduce in (False, True)]
    torch.save(inputs, tmp_path / "inputs.pt")
    running = []
    for isa in available:
        command = [sys.executable, "-c", ISA_PROGRAM, "inputs.pt", f"{isa}.pt", isa]
        environment = os.environ | {"FCOS_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
        running.append(subprocess.Popen(command, cwd=tmp_path, env=environment))
    assert [process.wait() for process in running] == [0] * len(available)
    baseline, *others = (torch.load(tmp_path / f"{isa}.pt") for isa in available)
    for results in others:
        for (logits, *_), pair in zip(
            inputs, zip(batched(results), batched(baseline), strict=True), strict=True
        ):
            eps = torch.finfo(logits.dtype).eps
            torch.testing.assert_close(*pair, rtol=max(eps, 4e-6), atol=1e-7)


def batched(results: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(loss, gradient) pairs."""
    return list(zip(results[::2], results[1::2], strict=True))


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"logits": torch.zeros(5, 6).long()}, TypeError, "logits must be floating point, got"),
        ({"labels": torch.zeros(5)}, TypeError, "labels must be int64 or int32, got torch.float"),
        ({"labels": torch.zeros(4).long()}, ValueError, r"labels must have the shape .*\(4,\)"),
        ({"logits": torch.tensor(0.0)}, ValueError, r"labels must have the shape of logits"),
        ({"alpha": 1.5}, ValueError, r"alpha must lie in 0\.\.1, got 1.5"),
        ({"gamma": -1.0}, ValueError, "gamma must be finite and >= 0, got -1.0"),
        ({"gamma": float("nan")}, ValueError, "gamma must be finite and >= 0, got nan"),
        ({"reduction": "avg"}, ValueError, "reduction must be 'none', 'mean' or 'sum', got 'avg'"),
        (
            {"reduction": "mean", "normalizer": torch.tensor(2.0)},
            ValueError,
            "normalizer needs reduction='sum', got 'mean'",
        ),
        (
            {"normalizer": torch.ones(2)},
            ValueError,
            r"normalizer must be a 0-d tensor, got shape \(2,\)",
        ),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"logits": torch.zeros(5, 6), "labels": torch.zeros(5).long()} | changes
    with pytest.raises(error, match=f"sigmoid_focal_loss: {message}"):
        sigmoid_focal_loss(**arguments)


X, Y, ONE = torch.zeros(5, 6), torch.zeros(5).long(), torch.tensor(1.0)


@pytest.mark.parametrize(
    "logits, labels, normalizer, message",
    [
        (ONE, Y, None, r"logits must be \[..., C\], got a 0-d tensor"),
        (X, Y[:4], None, "labels must have the shape of logits without its last dimension"),
        (X, Y[:, None], None, "labels must have the shape of logits without its last dimension"),
        (X, Y.short(), None, "labels must be int64 or int32, got Short"),
        (X.long(), Y, None, "logits must be floating point, got Long"),
        (X, Y, torch.ones(1), "normalizer must be a 0-d tensor, got 1 dimensions"),
        (X, Y, ONE.double(), "normalizer must be Float, got Double"),
        (X.double(), Y, ONE, "normalizer must be Double, got Float"),
    ],
)
def test_kernel_errors(
    device: str, logits: Tensor, labels: Tensor, normalizer: Tensor | None, message: str
) -> None:
    logits, labels = logits.to(device), labels.to(device)
    normalizer = None if normalizer is None else normalizer.to(device)
    with pytest.raises(RuntimeError, match=f"sigmoid_focal_loss: {message}"):
        OP(logits, labels, normalizer, 0.25, 2.0, True)
    grad = torch.ones((), device=device)
    with pytest.raises(RuntimeError, match=message):
        OP_BACKWARD(grad, logits, labels, normalizer, 0.25, 2.0)


@pytest.mark.parametrize(
    "grad, message",
    [
        (ONE.double(), "the gradient of the sum must be Float, got Double"),
        (X.double(), "grad must be 0-d, or have the shape and dtype of logits"),
        (X[:4], "grad must be 0-d, or have the shape and dtype of logits"),
    ],
)
def test_kernel_errors_of_the_gradient(device: str, grad: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"sigmoid_focal_loss_backward: {message}"):
        OP_BACKWARD(grad.to(device), X.to(device), Y.to(device), None, 0.25, 2.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kernel_errors_of_devices() -> None:
    with pytest.raises(RuntimeError, match="logits and labels must be on the same device"):
        OP(X.cuda(), Y, None, 0.25, 2.0, True)


def test_reference_has_the_same_signature() -> None:
    assert inspect.signature(sigmoid_focal_loss) == inspect.signature(sigmoid_focal_loss_ref)


# ---- the CUDA source on the CPU -----------------------------------------------------------------

SIMT_SEEDS = (0, 1, 12345)


@pytest.fixture(scope="module")
def simt() -> SimtLibrary:
    return load_simt_library()


def simt_results(
    lib: SimtLibrary,
    logits: Tensor,
    labels: Tensor,
    reduction: float | None,
    gamma: float,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Loss and gradient by the CUDA kernels, for the gradient of ``value_and_gradient``."""
    op, op_backward = (
        torch.ops.fcos_ext_simt.sigmoid_focal_loss,
        torch.ops.fcos_ext_simt.sigmoid_focal_loss_backward,
    )
    lib.set_seed(seed)
    before = lib.launches
    with lib.guarded_memory():
        normalizer = make_normalizer(logits, reduction)
        loss = op(logits.detach(), labels, normalizer, 0.3, gamma, reduction is not None)
        generator = torch.Generator().manual_seed(1)
        grad = torch.randn(loss.shape, generator=generator, dtype=torch.float64).to(loss)
        gradient = op_backward(grad, logits.detach(), labels, normalizer, 0.3, gamma)
    if logits.numel() > 0:
        assert lib.launches - before == (2 if reduction is None else 3)
    return loss, gradient


def assert_close_to_truth(
    results: tuple[Tensor, Tensor],
    logits: Tensor,
    labels: Tensor,
    reduction: float | None,
    gamma: float,
) -> None:
    truth = expected(logits.detach().double().requires_grad_(), labels, reduction, 0.3, gamma)
    for actual, exact in zip(results, truth, strict=True):
        eps = torch.finfo(actual.dtype).eps
        rtol = 1e-12 if actual.dtype == torch.float64 else max(eps, 4e-6)
        atol = 1e-7 if actual.dtype == torch.float16 else 1e-9 if rtol > 1e-9 else 1e-14
        torch.testing.assert_close(actual.double(), exact, rtol=rtol, atol=atol)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("gamma", [2.0, 1.5])
@pytest.mark.parametrize("C", [1, 3, 8, 80, 91])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
def test_simt(simt: SimtLibrary, dtype: torch.dtype, C: int, gamma: float, reduction: str) -> None:
    label_dtype = torch.int32 if C in (3, 80) else torch.int64
    # A tile and a half of the float kernels, and then one logit short of whole vectors of rows.
    logits, labels = make_inputs((6000 // C + 1, C), dtype, label_dtype=label_dtype)
    divisor = REDUCTIONS[reduction]
    results = simt_results(simt, logits, labels, divisor, gamma, seed=C)
    assert_close_to_truth(results, logits, labels, divisor, gamma)


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
def test_simt_shapes(simt: SimtLibrary, shape: tuple[int, ...], reduction: str) -> None:
    logits, labels = make_inputs(shape, torch.float32)
    divisor = REDUCTIONS[reduction]
    results = simt_results(simt, logits, labels, divisor, 2.0)
    assert_close_to_truth(results, logits, labels, divisor, 2.0)


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("C", [80, 91])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_simt_seeds(simt: SimtLibrary, dtype: torch.dtype, C: int, reduction: str) -> None:
    """More tiles than blocks, and the same bits whatever the order of the threads."""
    logits, labels = make_inputs((60_000 // C, C), dtype)
    divisor = REDUCTIONS[reduction]
    first, *others = (simt_results(simt, logits, labels, divisor, 2.0, seed) for seed in SIMT_SEEDS)
    assert_close_to_truth(first, logits, labels, divisor, 2.0)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_simt_misaligned_and_strided(simt: SimtLibrary, dtype: torch.dtype, reduction: str) -> None:
    logits, labels = make_inputs((41, 80), dtype)
    divisor = REDUCTIONS[reduction]
    logits = logits.detach()
    misaligned = torch.cat([logits.new_zeros(1), logits.flatten()])[1:].view(41, 80)
    assert misaligned.is_contiguous() and misaligned.data_ptr() % 16 != 0
    strided = logits.t().contiguous().t()
    plain = simt_results(simt, logits, labels, divisor, 2.0)
    for view in (misaligned, strided):
        results = simt_results(simt, view, labels.repeat_interleave(2)[::2], divisor, 2.0)
        assert all(torch.equal(a, b) for a, b in zip(plain, results, strict=True))


@pytest.mark.parametrize("C", [3, 80])
@pytest.mark.parametrize("gamma", [2.0, 1.5])
def test_simt_ignored_rows_and_extremes(simt: SimtLibrary, C: int, gamma: float) -> None:
    logits, labels = make_inputs((300, C), torch.float32, std=60)
    ignored = (labels < -1) | (labels >= C)
    zeroed = logits.detach().masked_fill(ignored[:, None], 0)
    garbage = zeroed.masked_fill(ignored[:, None], float("nan"))
    for divisor in (None, 0.0):
        results = simt_results(simt, garbage, labels, divisor, gamma)
        assert_close_to_truth(results, zeroed, labels, divisor, gamma)
        assert results[1][ignored].eq(0).all()
