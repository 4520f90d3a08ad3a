"""soft_nms: the CPU and CUDA kernels, and the CUDA source in the simulator.

Kernels are called through ``torch.ops``, never through the public functions, so that a fallback
cannot pass for a kernel.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from fcos_ext import padded_soft_nms, padded_soft_nms_ref, soft_nms, soft_nms_ref
from fcos_ext._library import kernels
from fcos_ext.soft_nms import _select as reference
from tests.ops.candidates import (
    BACKENDS,
    NO_GPU,
    SIMT_SEEDS,
    digests_by_instruction_set,
    kernel,
    make_candidates,
)

NAME = "soft_nms"
OP = torch.ops.fcos_ext.soft_nms.default
INF, NAN = math.inf, math.nan


def assert_equal(actual: Any, expected: Any) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def assert_close(actual: Any, expected: Any) -> None:
    """The same selection, with scores that differ in the last bits."""
    torch.testing.assert_close(tuple(actual), tuple(expected), rtol=5e-6, atol=0)


def test_compiled(device: str) -> None:
    assert device in kernels(NAME)


# ---- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_reference(backend: str, grouped: bool) -> None:
    """Linear to the bit. Every scalar varies."""
    op = kernel(NAME, backend)
    numbers = [(0.3, 0.5, 0.001), (0.0, 0.1, 0.0), (0.6, 2.0, 0.3)]
    sizes = [(1, 1, 1), (3, 47, 60), (2, 64, 5), (5, 65, 65), (2, 400, 100)]
    for seed, (n, k, limit) in enumerate(sizes):
        for iou_threshold, sigma, score_threshold in numbers:
            boxes, scores, labels = make_candidates(n, k, 3, seed, ties=k == 64)
            args = boxes, scores, labels if grouped else None, iou_threshold, sigma, score_threshold
            assert_equal(op(*args, False, limit), reference(*args, False, limit))
            # Without ties, that the last bits might undo.
            if k != 64:
                assert_close(op(*args, True, limit), reference(*args, True, limit))


def test_backends_agree_to_the_bit(device: str) -> None:
    """Gaussian too: it has an exp of its own."""
    op, simulated = kernel(NAME, device), kernel(NAME, "simt")
    for gaussian in (False, True):
        args = *make_candidates(4, 150, 2, ties=True), 0.3, 0.37, 1e-4, gaussian, 150
        assert_equal(op(*args), simulated(*args))


@pytest.mark.parametrize("backend", BACKENDS)
def test_hand_computed(backend: str) -> None:
    boxes = torch.tensor([[[0, 0, 10, 10], [0, 0, 10, 8], [0, 0, 10, 5], [20, 20, 30, 30]]]).float()
    scores = torch.tensor([[0.5, 1.0, 0.75, 0.25]])
    op = kernel(NAME, backend)
    # 1 has 0.8 with 0, and 0.625 with 2. Then 2 has 0.5 with 0.
    keep, kept, counts = op(boxes, scores, None, 0.5, 0.5, 0.001, False, 6)
    assert keep.tolist() == [[1, 2, 3, 0, -1, -1]] and counts.tolist() == [4]
    expected = torch.tensor([1.0, 0.75 * 0.375, 0.25, 0.5 * (1 - torch.tensor(0.8).item()), 0, 0])
    torch.testing.assert_close(kept[0], expected, rtol=1e-6, atol=0)
    keep, kept, counts = op(boxes, scores, None, 0.4, 0.5, 0.06, False, 6)
    assert keep.tolist() == [[1, 2, 3, -1, -1, -1]] and kept[0, 3:].eq(0).all()  # 0.1 (1 - 0.5)
    keep, kept, counts = op(boxes, scores, None, 0.9, 0.5, 0.001, False, 2)
    assert keep.tolist() == [[1, 2]] and kept.tolist() == [[1.0, 0.75]] and counts.tolist() == [2]
    keep, kept, _ = op(boxes, scores, None, 0.5, 0.5, 0.001, True, 4)
    assert keep.tolist() == [[1, 2, 3, 0]]
    decays = [1, 0.75 * math.exp(-(0.625**2) / 0.5), 0.25]
    decays += [0.5 * math.exp(-(0.8**2 + 0.5**2) / 0.5)]
    torch.testing.assert_close(kept[0], torch.tensor(decays), rtol=1e-6, atol=0)
    groups = torch.tensor([[-3, 1, 2**40 - 3, -3]])
    keep, kept, _ = op(boxes, scores, groups, 0.1, 0.5, 0.001, False, 4)
    assert keep.tolist() == [[1, 2, 0, 3]] and kept.tolist() == [[1.0, 0.75, 0.5, 0.25]]


@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_boxes_and_scores(backend: str, gaussian: bool) -> None:
    odds = [[5, 5, 5, 5], [0, 0, 0, 10], [10, 10, 0, 0], [10, 0, 0, 10], [NAN, 0, 10, 10]]
    odds += [[0, 0, 10, NAN], [0, 0, INF, 10], [-INF, -INF, INF, INF], [-1e30, -1e30, 1e30, 1e30]]
    op = kernel(NAME, backend)
    for odd in odds:
        boxes = torch.tensor([[odd, [0, 0, 10, 10], odd, [100, 0, 110, 10], odd]]).float()
        scores = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5]])
        keep, kept, _ = op(boxes, scores, None, 0.0, 0.5, 0.001, gaussian, 5)
        assert keep.tolist() == [[0, 1, 2, 3, 4]] and torch.equal(kept, scores), odd
    apart = torch.tensor([[[100 * i, 0, 100 * i + 10, 10] for i in range(8)]]).float()
    scores = torch.tensor([[0.5, NAN, -INF, INF, 0.5, -2.0, 0.25, 0.2]])
    keep, kept, counts = op(apart, scores, None, 0.5, 0.5, 0.2, gaussian, 9)
    assert keep.tolist() == [[3, 0, 4, 6, -1, -1, -1, -1, -1]] and counts.tolist() == [4]
    assert kept.tolist() == [[INF, 0.5, 0.5, 0.25, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing(backend: str, shape: tuple[int, int]) -> None:
    args = torch.zeros(*shape, 4), torch.zeros(shape), None, 0.5, 0.5, 0.001, False, 2
    for keep, kept, counts in (kernel(NAME, backend)(*args), reference(*args)):
        assert keep.tolist() == [[-1, -1]] * shape[0] and kept.tolist() == [[0, 0]] * shape[0]
        assert counts.tolist() == [0] * shape[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_public_functions(device: str, dtype: torch.dtype) -> None:
    boxes, scores, labels = (x.to(device) for x in make_candidates(3, 60))
    boxes, scores = boxes.to(dtype).requires_grad_(), scores.to(dtype).requires_grad_()
    for agnostic in (False, True):
        options: dict[str, Any] = {"score_threshold": 0.01, "class_agnostic": agnostic}
        padded = padded_soft_nms(boxes, scores, labels.int(), 0.3, 70, **options)
        expected = padded_soft_nms_ref(boxes, scores, labels, 0.3, 70, **options)
        assert_equal(padded, expected)
        assert padded.scores.dtype == dtype and not padded.scores.requires_grad
        for i in range(3):
            present = (labels[i] >= 0).nonzero().ravel()
            groups = None if agnostic else labels[i, present].short() - 1
            args = boxes[i, present], scores[i, present], groups, 0.3, 0.5, 0.01
            keep, kept = soft_nms(*args)
            count = int(padded.counts[i])
            assert_equal((present[keep], kept), (padded.keep[i, :count], padded.scores[i, :count]))
            assert_equal((keep, kept), soft_nms_ref(*args))
            assert_equal(soft_nms(*args, "linear", 3), (keep[:3], kept[:3]))
            assert_close(soft_nms(*args, "gaussian"), soft_nms_ref(*args, "gaussian"))
    assert [x.shape for x in soft_nms(boxes[0, :0], scores[0, :0], None, 0.5)] == [(0,), (0,)]


# ---- PyTorch's machinery ------------------------------------------------------------------------


def strided(boxes: Tensor, scores: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same numbers, none contiguous."""
    boxes = boxes.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    return boxes, scores.t().contiguous().t(), groups.repeat_interleave(2, dim=1)[:, ::2]


@pytest.mark.parametrize("view", [lambda *x: x, strided], ids=["contiguous", "strided"])
@pytest.mark.parametrize("grouped", [False, True])
def test_opcheck(device: str, grouped: bool, view: Any) -> None:
    boxes, scores, labels = view(*(x.to(device) for x in make_candidates(2, 20)))
    opcheck(OP, (boxes, scores, labels if grouped else None, 0.3, 0.5, 0.001, not grouped, 7))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend: str) -> None:
    candidates = make_candidates(3, 90)
    boxes = candidates[0]
    misaligned = torch.cat([boxes.new_zeros(1), boxes.flatten()])[1:].view_as(boxes)
    assert misaligned.data_ptr() % 16 != 0
    op, rest = kernel(NAME, backend), (0.3, 0.5, 0.001, False, 20)
    for others in (strided(*candidates), (misaligned, *candidates[1:])):
        assert_equal(op(*others, *rest), op(*candidates, *rest))


def test_compile_fullgraph(device: str) -> None:
    def call(boxes: Tensor, scores: Tensor, labels: Tensor) -> Any:
        return padded_soft_nms(boxes * 2, scores, labels, 0.4, 5, method="gaussian")

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for k in (16, 20, 24):
        candidates = tuple(x.to(device) for x in make_candidates(2, k))
        assert_equal(compiled(*candidates), call(*candidates))


def test_not_differentiable() -> None:
    boxes, scores, _ = make_candidates(2, 9)
    _, kept, _ = OP(boxes.requires_grad_(), scores, None, 0.3, 0.5, 0.001, False, 5)
    with pytest.raises(RuntimeError, match="soft_nms is not differentiable"):
        kept.sum().backward()


def test_deterministic(device: str, threads: Callable[[int], None]) -> None:
    args = *(x.to(device) for x in make_candidates(7, 900, ties=True)), 0.3, 0.5, 0.001, True, 99
    results = []
    for count in (1, 2, 3, 2):
        threads(count)
        results.append(OP(*args))
    for other in results[1:]:
        assert_equal(other, results[0])


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("k", [500, 9000])
@NO_GPU
def test_cuda_graph(k: int) -> None:
    """Captured once and replayed with other inputs, and nothing waits for the device."""
    inputs = [x.cuda() for x in make_candidates(3, k)]
    run = lambda: padded_soft_nms(*inputs, 0.4, 50)  # noqa: E731
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in (1, 2):
        for static, fresh in zip(inputs, make_candidates(3, k, seed=seed, ties=True), strict=True):
            static.copy_(fresh)
        graph.replay()
        assert_equal(captured, padded_soft_nms_ref(*inputs, 0.4, 50))


def test_instruction_sets() -> None:
    """All that this CPU has agree to the bit."""
    call = "torch.ops.fcos_ext.soft_nms(b, s.float(), g, 0.3, 0.5, 0.001, {}, 50)"
    program = f"lambda b, s, g: (*{call.format(False)}, *{call.format(True)})"
    assert len(set(digests_by_instruction_set(program))) == 1


@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize("k", [1, 48, 49, 200])
def test_simt(k: int, gaussian: bool) -> None:
    """The same bits whatever the order of the threads; more images than blocks."""
    args = *make_candidates(5, k, 2, ties=True), 0.3, 0.5, 0.001, gaussian, k
    for seed in SIMT_SEEDS:
        assert_equal(kernel(NAME, "simt", seed)(*args), kernel(NAME, "cpu")(*args))


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "functions", [(padded_soft_nms, padded_soft_nms_ref), (soft_nms, soft_nms_ref)]
)
def test_errors(functions: Any) -> None:
    op = functions[0].__name__
    boxes, scores, labels = (x if op.startswith("padded") else x[0] for x in make_candidates(2, 3))
    groups = "labels" if op.startswith("padded") else "idxs"
    good: dict[str, Any] = {"boxes": boxes, "scores": scores, groups: labels}
    good |= {"iou_threshold": 0.5, "max_detections": 5}
    cases: list[tuple[dict[str, Any], Any, str]] = [
        ({"boxes": boxes.long()}, TypeError, "boxes must be floating point, got torch.int"),
        ({groups: scores}, TypeError, f"{groups} must be integers, got torch.f"),
        ({"boxes": boxes[..., :3]}, ValueError, r"boxes must have shape .*K, 4\], got"),
        ({"scores": scores[..., :2]}, ValueError, r"scores must .*3\], got .*2\]"),
        ({"iou_threshold": 1.5}, ValueError, r"iou_threshold must be in \[0, 1\], got 1.5"),
        ({"max_detections": 0}, ValueError, "max_detections must be at least 1, got 0"),
        ({"sigma": 0.0}, ValueError, "sigma must be finite and above 0, got 0.0"),
        ({"sigma": NAN}, ValueError, "sigma must be finite and above 0, got nan"),
        ({"score_threshold": -0.1}, ValueError, "score_threshold must be .* least 0, got -0.1"),
        ({"method": "hard"}, ValueError, "method must be 'linear' or 'gaussian', got 'hard'"),
    ]
    for function in functions:
        function(**good)
        for changes, error, message in cases:
            with pytest.raises(error, match=f"^{op}: {message}"):
                function(**{**good, **changes})
    assert inspect.signature(functions[0]) == inspect.signature(functions[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernel_errors(backend: str) -> None:
    boxes, scores, groups = torch.zeros(2, 3, 4), torch.zeros(2, 3), torch.zeros(2, 3).long()
    op = kernel(NAME, backend)
    for args, threshold, limit, message in [
        ((boxes[0], scores, groups), 0.0, 5, r"boxes must be \[N, K, 4\]"),
        ((boxes.double(), scores, groups), 0.0, 5, "boxes must be Float, got Double"),
        ((boxes, scores.double(), None), 0.0, 5, "scores must be Float, got Double"),
        ((boxes, scores[:1], groups), 0.0, 5, "scores must have the shape of boxes"),
        ((boxes, scores, groups[:, :2]), 0.0, 5, "groups must have the shape of boxes"),
        ((boxes, scores, groups.int()), 0.0, 5, "groups must be Long, got Int"),
        ((boxes, scores, groups), -0.5, 5, "score_threshold must be at least 0, got -0.5"),
        ((boxes, scores, groups), 0.0, 0, "max_detections must be at least 1, got 0"),
    ]:
        with pytest.raises(RuntimeError, match=f"soft_nms: {message}"):
            op(*args, 0.5, 0.5, threshold, False, limit)
