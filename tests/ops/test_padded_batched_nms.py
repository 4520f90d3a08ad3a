"""padded_batched_nms: the CPU and CUDA kernels, and the CUDA source in the simulator.

Kernels are called through ``torch.ops``, never through the public function, so that a fallback
cannot pass for a kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from fcos_ext import padded_batched_nms, padded_batched_nms_ref
from fcos_ext._library import kernels
from tests.ops.candidates import (
    BACKENDS,
    NO_GPU,
    SIMT_SEEDS,
    digests_by_instruction_set,
    kernel,
    make_candidates,
)

NAME = "padded_batched_nms"
OP = torch.ops.fcos_ext.padded_batched_nms.default
INF, NAN = math.inf, math.nan


def reference(*args: Any) -> tuple[Tensor, ...]:
    return padded_batched_nms_ref(*args[:5], class_agnostic=args[5])


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert len(actual) == len(expected) == 2
    for ours, truth in zip(actual, expected, strict=True):
        assert ours.dtype == torch.int64
        assert torch.equal(ours, truth)


def one_image(boxes: Any, scores: Any, labels: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.tensor([boxes]).float(), torch.tensor([scores]), torch.tensor([labels])


def test_compiled(device: str) -> None:
    assert device in kernels(NAME)


# ---- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("class_agnostic", [False, True])
@pytest.mark.parametrize("score_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("label_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_reference(
    backend: str, label_dtype: torch.dtype, score_dtype: torch.dtype, class_agnostic: bool
) -> None:
    op = kernel(NAME, backend)
    # (N, K, D): about a batch of 64, several chunks, and more kept than shared memory holds.
    sizes = [(1, 1, 1), (2, 63, 9), (5, 64, 64), (3, 65, 100), (2, 129, 70), (4, 700, 30)]
    for seed, (n, k, max_detections) in enumerate(sizes):
        for spread, iou_threshold in ((30.0, 0.6), (150.0, 0.3), (2000.0, 0.1)):
            boxes, scores, labels = make_candidates(n, k, 3, seed, ties=k > 64, spread=spread)
            candidates = boxes, scores.to(score_dtype), labels.to(label_dtype)
            rest = iou_threshold, max_detections, class_agnostic
            assert_same(op(*candidates, *rest), reference(*candidates, *rest))


@pytest.mark.parametrize("k, max_detections, classes", [(5000, 100, 80), (3000, 2500, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_candidates(backend: str, k: int, max_detections: int, classes: int) -> None:
    boxes, scores, labels = make_candidates(1, k, classes, spread=3000.0)
    args = boxes, scores, labels, 0.5, max_detections, False
    keep, counts = kernel(NAME, backend)(*args)
    assert_same((keep, counts), reference(*args))
    assert counts.item() > max_detections // 2


@pytest.mark.parametrize("score", [0.5, -2.0, INF])
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_scores_equal(backend: str, score: float) -> None:
    boxes, _, labels = make_candidates(2, 2000, 2, spread=500.0)
    args = boxes, torch.full((2, 2000), score), labels, 0.4, 60, False
    assert_same(kernel(NAME, backend)(*args), reference(*args))


@pytest.mark.parametrize("best", [255, 256, 257, 1023, 1024, 1025])
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_scores(backend: str, best: int) -> None:
    """About as many of the better one as the CUDA kernel sorts at a time, here or on a GPU."""
    k = best + 300
    boxes = torch.arange(k)[None, :, None] * 100 + torch.tensor([0, 0, 10, 10])
    scores = torch.where(torch.arange(k) < 300, 0.25, 0.5)[None]
    args = boxes.float(), scores, torch.zeros(1, k, dtype=torch.int64), 0.5, k, False
    keep, counts = kernel(NAME, backend)(*args)
    assert keep.tolist() == [[*range(300, k), *range(300)]] and counts.tolist() == [k]


@pytest.mark.parametrize("backend", BACKENDS)
def test_hand_computed(backend: str) -> None:
    boxes = [
        [0, 0, 10, 10],
        [0, 0, 10, 8],  # 0.8 with the first
        [0, 6, 10, 16],  # 40 / 160 with the first, 20 / 160 with the second
        [50, 50, 60, 60],
        [0, 0, 10, 9],  # 0.9 with the first
    ]
    candidates = one_image(boxes, [0.5, 0.9, 0.7, 0.1, 0.6], [0, 1, 0, 7, 0])
    op = kernel(NAME, backend)
    # Rank order 1, 2, 4, 0, 3
    assert op(*candidates, 0.5, 5, True)[0].tolist() == [[1, 2, 3, -1, -1]]
    assert op(*candidates, 0.1, 5, True)[0].tolist() == [[1, 3, -1, -1, -1]]
    assert op(*candidates, 0.2, 5, False)[0].tolist() == [[1, 2, 4, 3, -1]]
    assert op(*candidates, 0.2, 3, False)[0].tolist() == [[1, 2, 4]]
    # A suppressed box suppresses nothing: 4 is gone, so 0 may stay although they overlap by 0.9.
    assert op(*candidates, 0.8, 5, True)[0].tolist() == [[1, 2, 0, 3, -1]]
    absent = candidates[2].clone()
    absent[0, 1] = -1
    keep, counts = op(*candidates[:2], absent, 0.5, 5, True)
    assert keep.tolist() == [[2, 4, 3, -1, -1]] and counts.tolist() == [3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_threshold_is_a_float32(backend: str) -> None:
    """float32(0.6) is above 0.6, but an IoU of float32(0.6) is not above the threshold."""
    op = kernel(NAME, backend)
    for above, whole, iou_threshold in ((6, 10, 0.6), (7, 10, 0.7), (1, 3, 1 / 3), (1, 2, 0.5)):
        candidates = one_image([[0, 0, 10, whole], [0, 0, 10, above]], [0.9, 0.8], [0, 0])
        assert op(*candidates, iou_threshold, 2, False)[0].tolist() == [[0, 1]]
        assert op(*candidates, iou_threshold - 1e-6, 2, False)[0].tolist() == [[0, -1]]


@pytest.mark.parametrize("iou_threshold", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_boxes_neither_suppress_nor_are_suppressed(backend: str, iou_threshold: float) -> None:
    odds = [[5, 5, 5, 5], [0, 0, 0, 10], [10, 10, 0, 0], [10, 0, 0, 10], [NAN, 0, 10, 10]]
    odds += [[0, 0, 10, NAN], [0, 0, INF, 10], [0, 0, INF, INF], [-INF, -INF, INF, INF]]
    odds += [[INF, INF, INF, INF], [-1e30, -1e30, 1e30, 1e30]]
    box = [0, 0, 10, 10]
    expected = [0, 1, 2, 4] if iou_threshold < 1 else [0, 1, 2, 3, 4]
    for odd in odds:
        candidates = one_image([odd, box, odd, box, odd], [0.9, 0.8, 0.7, 0.6, 0.5], [0] * 5)
        keep, counts = kernel(NAME, backend)(*candidates, iou_threshold, 7, False)
        assert keep.tolist() == [expected + [-1] * (7 - len(expected))], odd
        assert counts.tolist() == [len(expected)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_scores(backend: str) -> None:
    boxes = [[100 * i, 0, 100 * i + 10, 10] for i in range(8)]
    candidates = one_image(boxes, [0.5, NAN, -INF, INF, 0.5, -2.0, -0.0, 0.0], [0] * 8)
    keep, counts = kernel(NAME, backend)(*candidates, 0.5, 8, False)
    assert keep.tolist() == [[3, 0, 4, 6, 7, 5, -1, -1]] and counts.tolist() == [6]
    # Compared in their own dtype, in which these differ.
    scores = torch.tensor([[0.5, 0.5 + 1e-12]], dtype=torch.float64)
    candidates = candidates[0][:, :2], scores, candidates[2][:, :2]
    assert kernel(NAME, backend)(*candidates, 0.5, 2, False)[0].tolist() == [[1, 0]]


@pytest.mark.parametrize("k", [1024, 1025, 5000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_absent(backend: str, k: int) -> None:
    """More of them than are sorted at a time, and yet nothing to sort."""
    boxes, scores, labels = make_candidates(2, k)
    scores[0], labels[1] = -INF, -1
    keep, counts = kernel(NAME, backend)(boxes, scores, labels, 0.5, 3, False)
    assert keep.tolist() == [[-1] * 3] * 2 and counts.tolist() == [0, 0]


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing(backend: str, shape: tuple[int, int]) -> None:
    scores = torch.zeros(shape)
    args = torch.zeros(*shape, 4), scores, scores.long(), 0.5, 2, False
    for keep, counts in (kernel(NAME, backend)(*args), reference(*args)):
        assert keep.tolist() == [[-1, -1]] * shape[0] and counts.tolist() == [0] * shape[0]
        assert keep.dtype == counts.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(device: str, dtype: torch.dtype) -> None:
    boxes, scores, labels = (x.to(device) for x in make_candidates(2, 300))
    boxes, scores = boxes.to(dtype).requires_grad_(), scores.to(dtype).requires_grad_()
    expected = padded_batched_nms_ref(boxes, scores, labels, 0.4, 50)
    for label_dtype in (torch.int8, torch.int16, torch.int32):
        actual = padded_batched_nms(boxes, scores, labels.to(label_dtype), 0.4, 50)
        assert_same(actual, expected)
        assert not actual.keep.requires_grad
    assert_same(
        padded_batched_nms(boxes, scores, labels.abs().to(torch.uint8), 0.4, 9),
        padded_batched_nms_ref(boxes, scores, labels.abs(), 0.4, 9),
    )


# ---- PyTorch's machinery ------------------------------------------------------------------------


def strided(boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same numbers, none contiguous."""
    boxes = boxes.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    return boxes, scores.t().contiguous().t(), labels.repeat_interleave(2, dim=1)[:, ::2]


@pytest.mark.parametrize("view", [lambda *x: x, strided], ids=["contiguous", "strided"])
@pytest.mark.parametrize("class_agnostic", [False, True])
def test_opcheck(device: str, class_agnostic: bool, view: Any) -> None:
    candidates = view(*(x.to(device) for x in make_candidates(2, 20)))
    opcheck(OP, (*candidates, 0.4, 7, class_agnostic))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend: str) -> None:
    candidates = make_candidates(3, 90)
    views = strided(*candidates)
    assert not any(x.is_contiguous() for x in views)
    boxes = candidates[0]
    misaligned = torch.cat([boxes.new_zeros(1), boxes.flatten()])[1:].view_as(boxes)
    assert misaligned.data_ptr() % 16 != 0
    op = kernel(NAME, backend)
    for others in (views, (misaligned, *candidates[1:])):
        assert_same(op(*others, 0.4, 20, False), op(*candidates, 0.4, 20, False))


def test_compile_fullgraph(device: str) -> None:
    def call(boxes: Tensor, scores: Tensor, labels: Tensor) -> Any:
        keep, counts = padded_batched_nms(boxes * 2, scores, labels, 0.4, 5, class_agnostic=True)
        return keep + 1, counts

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for k in (16, 20, 24):
        candidates = tuple(x.to(device) for x in make_candidates(2, k))
        assert_same(compiled(*candidates), call(*candidates))


def test_not_differentiable() -> None:
    boxes, scores, labels = make_candidates(2, 9)
    for result in OP(boxes.requires_grad_(), scores.requires_grad_(), labels, 0.4, 5, False):
        assert not result.requires_grad


def test_deterministic(device: str, threads: Callable[[int], None]) -> None:
    candidates = tuple(x.to(device) for x in make_candidates(7, 3000, ties=True))
    results = []
    for count in (1, 2, 3, 2):
        threads(count)
        results.append(OP(*candidates, 0.4, 100, False))
    for other in results[1:]:
        assert_same(other, results[0])


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("k", [500, 5000])
@NO_GPU
def test_cuda_graph(k: int) -> None:
    """Captured once and replayed with other inputs, and nothing waits for the device."""
    inputs = [x.cuda() for x in make_candidates(3, k)]
    run = lambda: padded_batched_nms(*inputs, 0.4, 50)  # noqa: E731
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
        assert_same(captured, padded_batched_nms_ref(*inputs, 0.4, 50))


def test_instruction_sets() -> None:
    """All that this CPU has agree to the bit."""
    digests = digests_by_instruction_set(
        "lambda *c: torch.ops.fcos_ext.padded_batched_nms(*c, 0.4, 100, False)"
    )
    assert len(set(digests)) == 1


# ---- the CUDA source on the CPU -----------------------------------------------------------------


@pytest.mark.parametrize("k, max_detections", [(1, 2), (70, 30), (300, 200), (2000, 40)])
def test_simt(k: int, max_detections: int) -> None:
    """The same bits whatever the order of the threads; more images than blocks."""
    args = *make_candidates(5, k, 2, ties=True), 0.4, max_detections, False
    for seed in SIMT_SEEDS:
        assert_same(kernel(NAME, "simt", seed)(*args), reference(*args))
