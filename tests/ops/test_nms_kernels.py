"""The nms operator: its CPU and CUDA kernels.

They are called through ``torch.ops``, never through the public functions, so that a fallback cannot
pass for a kernel. ``test_nms.py`` has what the public functions promise, ``test_nms_simt.py`` the
CUDA source on the CPU, and ``test_nms_fuzz.py`` runs all of them on inputs of every odd kind.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor
from torch.library import opcheck

from fcos_ext import batched_nms, batched_nms_ref, nms, nms_ref
from fcos_ext._library import kernels
from tests.ops.nms_inputs import DTYPES, expected, make_inputs

OP = torch.ops.fcos_ext.nms.default
# None: one group for all
NUM_GROUPS = [None, 1, 3, 80]


def test_compiled(device: str) -> None:
    assert device in kernels("nms")


@pytest.mark.parametrize("limit", [-1, 1, 40])
@pytest.mark.parametrize("num_groups", NUM_GROUPS)
@pytest.mark.parametrize("spread", [20.0, 300.0, 3000.0], ids="spread{:.0f}".format)
@pytest.mark.parametrize("n", [0, 1, 2, 31, 64, 65, 257, 1000])
def test_matches_reference(
    device: str, n: int, spread: float, num_groups: int | None, limit: int
) -> None:
    inputs = make_inputs(n, num_groups, spread, device)
    for iou_threshold in (0.0, 0.3, 0.6):
        actual = OP(*inputs, iou_threshold, limit)
        assert actual.dtype == torch.int64 and actual.device == inputs[0].device
        assert torch.equal(actual, expected(*inputs, iou_threshold, limit))


@pytest.mark.parametrize("n, num_groups", [(12_000, None), (17_500, 50), (17_500, 9000)])
def test_many_boxes(device: str, n: int, num_groups: int | None) -> None:
    """Enough for threads, by blocks and by groups, and for many bands."""
    boxes, scores, groups = make_inputs(n, num_groups, 1500.0)
    on_device = [None if t is None else t.to(device) for t in (boxes, scores, groups)]
    actual = OP(*on_device, 0.3, -1).tolist()
    if groups is None:
        groups = torch.zeros(n)
    kept = []
    for group in groups.unique():
        members = ((groups == group) & ~scores.isnan()).nonzero().ravel()
        kept.append(members[torchvision.ops.nms(boxes[members], scores[members], 0.3)])
    ranked = torch.cat(kept).sort().values
    ranked = ranked[scores[ranked].argsort(descending=True, stable=True)]
    assert actual == ranked.tolist()


@pytest.mark.parametrize("boxes_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scores_dtype", DTYPES, ids=str)
def test_dtypes(device: str, boxes_dtype: torch.dtype, scores_dtype: torch.dtype) -> None:
    boxes, scores, groups = make_inputs(600, 4, 100.0, device)
    boxes, scores = boxes.to(boxes_dtype), (scores - 0.5).to(scores_dtype)
    boxes = boxes + 1e-9  # nothing but rounding noise, in float64
    assert torch.equal(OP(boxes, scores, groups, 0.4, -1), expected(boxes, scores, groups, 0.4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_order_of_scores(device: str, dtype: torch.dtype) -> None:
    """Falling, equal ones by index, also the two zeros; no NaN of either sign."""
    inf, nan, tiny = torch.inf, torch.nan, torch.finfo(dtype).smallest_normal
    values = [0.0, -0.0, nan, 1.0, -1.0, inf, -inf, 0.0, 1.0, -nan, tiny, -tiny, -inf, 2.0]
    scores = torch.tensor(values, dtype=dtype, device=device)
    boxes = torch.arange(len(values), device=device)[:, None] * 10.0 + torch.tensor(
        [0.0, 0.0, 1.0, 1.0], device=device
    )
    assert OP(boxes, scores, None, 0.5, -1).tolist() == [5, 13, 3, 8, 10, 0, 1, 7, 11, 4, 6, 12]


def test_misaligned_and_strided(device: str) -> None:
    boxes, scores, groups = make_inputs(200, 3, 60.0, device)
    assert groups is not None
    plain = OP(boxes, scores, groups, 0.4, -1)
    misaligned = torch.cat([boxes.new_zeros(1), boxes.flatten()])[1:].view(200, 4)
    assert misaligned.is_contiguous() and misaligned.data_ptr() % 16 != 0
    strided = (boxes.t().contiguous().t(), scores.repeat_interleave(2)[::2])
    assert torch.equal(OP(misaligned, scores, groups, 0.4, -1), plain)
    assert torch.equal(OP(*strided, groups.repeat_interleave(3)[::3], 0.4, -1), plain)
    one = boxes[:1].expand(200, 4), scores[:1].expand(200), groups[:1].expand(200)
    assert OP(*one, 0.4, -1).tolist() == [0]


def test_against_torchvision(device: str) -> None:
    for seed in range(20):
        boxes, scores, groups = make_inputs(700, 30, 200.0, device, seed)
        scores = scores.nan_to_num(0.01)
        theirs = torchvision.ops.nms(boxes, scores, 0.45)
        assert torch.equal(OP(boxes, scores, None, 0.45, -1), theirs)
        assert groups is not None
        theirs = torchvision.ops.batched_nms(boxes.round(), scores, groups + 1, 0.5)
        assert torch.equal(OP(boxes.round(), scores, groups, 0.5, -1), theirs)


def test_deterministic(device: str, threads: Callable[[int], None]) -> None:
    inputs = make_inputs(20_000, 20, 600.0, device)
    results = []
    for count in (1, 2, 3, 2):
        threads(count)
        results.append(OP(*inputs, 0.5, -1))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("num_groups", [None, 3])
@pytest.mark.parametrize("n", [0, 100])
def test_opcheck(device: str, n: int, num_groups: int | None, layout: str) -> None:
    boxes, scores, groups = make_inputs(n, num_groups, 100.0, device)
    if layout == "strided":
        boxes = boxes.t().contiguous().t()
    opcheck(OP, (boxes, scores, groups, 0.4, -1))
    opcheck(OP, (boxes, scores.half(), groups, 0.4, 7))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(device: str, backend: str) -> None:
    def best(boxes: Tensor, scores: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        alone = nms(boxes, scores, 0.4, max_detections=20)
        kept = batched_nms(boxes, scores * 2, groups, 0.4)
        return boxes[kept] + 1, alone

    torch._dynamo.reset()
    compiled = torch.compile(best, fullgraph=True, backend=backend)
    for n in (90, 130, 170):
        boxes, scores, groups = make_inputs(n, 3, 100.0, device)
        assert groups is not None
        actual, wanted = compiled(boxes, scores, groups), best(boxes, scores, groups)
        assert torch.equal(actual[0], wanted[0]) and torch.equal(actual[1], wanted[1])


def test_needs_no_gradient(device: str) -> None:
    """Indices have none; what is selected by them has."""
    boxes, scores, groups = make_inputs(50, 3, 30.0, device)
    boxes.requires_grad_(), scores.requires_grad_()
    kept = OP(boxes, scores, groups, 0.4, -1)
    assert not kept.requires_grad
    boxes[kept].sum().backward()
    assert boxes.grad is not None and boxes.grad.sum() == 4 * len(kept)


@pytest.mark.parametrize("limit", [1, 5, 1000])
def test_max_detections_of_the_public_functions(device: str, limit: int) -> None:
    boxes, scores, groups = make_inputs(300, 5, 80.0, device)
    assert groups is not None
    assert torch.equal(
        nms(boxes, scores, 0.5, max_detections=limit), nms(boxes, scores, 0.5)[:limit]
    )
    for function in (batched_nms, batched_nms_ref):
        whole = function(boxes, scores, groups.int(), 0.5)
        part = function(boxes, scores, groups.int(), 0.5, max_detections=limit)
        assert torch.equal(part, whole[:limit])


def test_reference_has_the_same_signature() -> None:
    assert inspect.signature(nms) == inspect.signature(nms_ref)
    assert inspect.signature(batched_nms) == inspect.signature(batched_nms_ref)


# ---- errors -------------------------------------------------------------------------------------


def test_errors() -> None:
    boxes, scores = torch.zeros(3, 4), torch.zeros(3)
    for limit in (0, -1):
        for function in (nms, nms_ref):
            with pytest.raises(ValueError, match=f"^nms: max_detections must .* 1, got {limit}"):
                function(boxes, scores, 0.5, max_detections=limit)
        for function in (batched_nms, batched_nms_ref):
            with pytest.raises(ValueError, match="^batched_nms: max_detections must .* 1, got"):
                function(boxes, scores, scores.long(), 0.5, max_detections=limit)


B, S, G = torch.zeros(5, 4), torch.zeros(5), torch.zeros(5).long()


@pytest.mark.parametrize(
    "boxes, scores, groups, message",
    [
        (B[0], S, None, r"boxes must be \[K, 4\], got 1 dimensions, the last of size 4"),
        (B[:, :3], S, None, r"boxes must be \[K, 4\], got 2 dimensions, the last of size 3"),
        (torch.tensor(1.0), S, None, r"boxes must be \[K, 4\], got 0 dimensions"),
        (B.long(), S, None, "boxes must be floating point, got Long"),
        (B, S[:4], None, r"scores must be \[K\], one for each box"),
        (B, S[:, None], None, r"scores must be \[K\], one for each box"),
        (B, S.int(), None, "scores must be floating point, got Int"),
        (B, S, G[:4], r"groups must be \[K\], one for each box"),
        (B, S, G.int(), "groups must be int64, got Int"),
    ],
)
def test_kernel_errors(
    device: str, boxes: Tensor, scores: Tensor, groups: Tensor | None, message: str
) -> None:
    arguments: list[Any] = [t if t is None else t.to(device) for t in (boxes, scores, groups)]
    with pytest.raises(RuntimeError, match=f"nms: {message}"):
        OP(*arguments, 0.5, -1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kernel_errors_of_devices() -> None:
    with pytest.raises(RuntimeError, match="boxes and scores must be on the same device"):
        OP(B.cuda(), S, None, 0.5, -1)
    with pytest.raises(RuntimeError, match="boxes and groups must be on the same device"):
        OP(B.cuda(), S.cuda(), G, 0.5, -1)
