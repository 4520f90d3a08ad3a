"""fcos_normalizers: the CPU and CUDA kernels, and the CUDA source in the simulator."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from fcos_ext import fcos_normalizers, fcos_normalizers_ref
from fcos_ext._library import kernels
from tests.simt.build import load_simt_library

OP = torch.ops.fcos_ext.fcos_normalizers.default
OP_AND_LABELS = torch.ops.fcos_ext.fcos_normalizers_and_labels.default
SHAPES = [(), (0,), (1,), (7,), (3, 0), (2, 5000), (2, 3, 5)]


def make_inputs(
    *shape: int, device: str = "cpu", dtype: torch.dtype = torch.int64
) -> tuple[Tensor, Tensor]:
    """Labels of every kind, and values that are wrong where they must not count."""
    labels = torch.randint(-3, 12, shape)
    centerness = torch.rand(shape)
    wrong = torch.rand(shape) < 0.5
    centerness = torch.where((labels < 0) & wrong, math.nan, centerness)
    return labels.to(device, dtype), centerness.to(device)


def test_compiled(device: str) -> None:
    assert device in kernels("fcos_normalizers")
    assert device in kernels("fcos_normalizers_and_labels")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("num_classes", [0, 5, 80, 1 << 62])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(
    device: str, shape: tuple[int, ...], num_classes: int, dtype: torch.dtype
) -> None:
    labels, centerness = make_inputs(*shape, device=device, dtype=dtype)
    for scale in (1.0, 1e-20, 1e20):
        expected = fcos_normalizers_ref(labels, centerness * scale, num_classes)
        sums = OP(labels, centerness * scale, num_classes)
        assert sums.dtype == torch.float32
        torch.testing.assert_close(sums, expected, rtol=1e-7, atol=0)


def test_by_hand(device: str) -> None:
    labels = torch.tensor([[0, -1, 4, 5, -2, 2**32]], device=device)
    centerness = torch.tensor([[0.5, math.nan, 0.125, 9, math.inf, 7]], device=device)
    for function in (fcos_normalizers, fcos_normalizers_ref):
        assert function(labels, centerness, 5).tolist() == [2.0, 0.625]
        assert function(labels[:, :4], centerness[:, :4]).tolist() == [3.0, 9.625]
        assert function(labels[:, 1:2], centerness[:, 1:2], 5).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_labels_in_half_the_bytes(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    labels, centerness = make_inputs(*shape, device=device, dtype=dtype)
    for num_classes in (0, 5, 2**31 - 1):
        sums, narrow = OP_AND_LABELS(labels, centerness, num_classes)
        assert torch.equal(sums, OP(labels, centerness, num_classes))
        assert narrow.dtype == torch.int32 and narrow.is_contiguous()
        for label, result in zip(labels.flatten().tolist(), narrow.flatten().tolist(), strict=True):
            assert result == (label if -1 <= label < num_classes else -2)


def test_labels_too_large_for_int32(device: str) -> None:
    labels = torch.tensor([2**32, 2**31, 2**31 - 2, -(2**63), -(2**32) - 1, -1, 0], device=device)
    _, narrow = OP_AND_LABELS(labels, torch.zeros(7, device=device), 2**31 - 1)
    assert narrow.tolist() == [-2, -2, 2**31 - 2, -2, -2, -1, 0]
    with pytest.raises(RuntimeError, match=r"num_classes must be below 2\^31, got 2147483648"):
        OP_AND_LABELS(labels, torch.zeros(7, device=device), 2**31)


def test_the_sum_is_exact_to_float32(device: str) -> None:
    """Of many small numbers, where a float32 sum would lose a thousandth."""
    labels = torch.zeros(300_000, dtype=torch.int64, device=device)
    centerness = torch.full((300_000,), 0.1, device=device)
    count, total = OP(labels, centerness, 1).tolist()
    assert count == 300_000
    assert total == pytest.approx(300_000 * float(torch.tensor(0.1)), rel=1e-7)


def test_deterministic(device: str) -> None:
    labels, centerness = make_inputs(3, 30_000, device=device)
    before, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(OP(labels, centerness, 9))
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
def test_opcheck(device: str, strided: bool) -> None:
    labels, centerness = make_inputs(4, 6, device=device)
    if strided:
        labels, centerness = labels.t(), centerness.t()
    torch.testing.assert_close(OP(labels, centerness, 9), OP(labels.t(), centerness.t(), 9))
    opcheck(OP, (labels, centerness, 9))
    opcheck(OP_AND_LABELS, (labels, centerness, 9))


def test_compile_fullgraph(device: str) -> None:
    compiled = torch.compile(fcos_normalizers, fullgraph=True, backend="aot_eager")
    inputs = make_inputs(2, 50, device=device)
    assert torch.equal(compiled(*inputs, 9), fcos_normalizers(*inputs, 9))


def test_nothing_is_differentiable(device: str) -> None:
    labels, centerness = make_inputs(50, device=device)
    for function in (fcos_normalizers, fcos_normalizers_ref):
        assert not function(labels, centerness.requires_grad_(), 9).requires_grad


LABELS, VALUES = torch.zeros(3, dtype=torch.int64), torch.zeros(3)


@pytest.mark.parametrize("function", [fcos_normalizers, fcos_normalizers_ref])
@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((VALUES, VALUES, 3), TypeError, "labels must be int64 or int32, got torch.float32"),
        ((LABELS, VALUES.double(), 3), TypeError, "centerness must be float32, got"),
        ((LABELS, VALUES[:2], 3), ValueError, r"centerness must have .* \[3\], got \[2\]"),
        ((LABELS, VALUES.to("meta"), 3), ValueError, "centerness must be on the device of labels"),
        ((LABELS, VALUES, -1), ValueError, "num_classes must be >= 0, got -1"),
    ],
)
def test_errors(function: Any, arguments: tuple[Any, ...], error: Any, message: str) -> None:
    with pytest.raises(error, match=f"^fcos_normalizers: {message}"):
        function(*arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((VALUES, VALUES, 3), "labels must be int64 or int32, got Float"),
        ((LABELS, VALUES.double(), 3), "centerness must be Float, got Double"),
        ((LABELS, VALUES[:2], 3), "centerness must have the shape of labels"),
        ((LABELS, VALUES, -1), "num_classes must be >= 0, got -1"),
    ],
)
def test_kernel_errors(device: str, arguments: tuple[Any, ...], message: str) -> None:
    arguments = tuple(x.to(device) if isinstance(x, Tensor) else x for x in arguments)
    with pytest.raises(RuntimeError, match=f"fcos_normalizers: {message}"):
        OP(*arguments)


def test_reference_has_the_same_signature() -> None:
    functions = (fcos_normalizers, fcos_normalizers_ref)
    public, reference = (inspect.signature(function) for function in functions)
    assert public == reference


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_graph() -> None:
    """Captured with one input and replayed with others."""
    inputs = make_inputs(2, 5000, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        OP(*inputs, 9)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = OP(*inputs, 9)
    for _ in range(2):
        for held, new in zip(inputs, make_inputs(2, 5000, device="cuda"), strict=True):
            held.copy_(new)
        graph.replay()
        torch.testing.assert_close(captured, OP(*inputs, 9), rtol=0, atol=0)


@pytest.mark.parametrize("seed", [0, 1, 12345])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_simt(dtype: torch.dtype, seed: int) -> None:
    """One launch; more tiles than blocks."""
    simt = load_simt_library()
    for shape in SHAPES:
        inputs = make_inputs(*shape, dtype=dtype)
        simt.set_seed(seed)
        before = simt.launches
        with simt.guarded_memory():
            sums = torch.ops.fcos_ext_simt.fcos_normalizers(*inputs, 9)
            again, narrow = torch.ops.fcos_ext_simt.fcos_normalizers_and_labels(*inputs, 9)
        assert simt.launches - before == 2 * (inputs[0].numel() > 0)
        torch.testing.assert_close(sums, OP(*inputs, 9), rtol=1e-7, atol=0)
        assert torch.equal(again, sums) and torch.equal(narrow, OP_AND_LABELS(*inputs, 9)[1])
