"""nms and batched_nms against torchvision and a pure-Python greedy loop."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fcos_ext.nms import batched_nms, batched_nms_ref, nms, nms_ref

INF, NAN = math.inf, math.nan


def make_boxes(n: int, seed: int, spread: float = 300.0, integer: bool = False) -> Tensor:
    """Random boxes of sides 10 to 60; the smaller the spread of their corners, the more overlap."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=generator) * spread
    sides = torch.rand(n, 2, generator=generator) * 50 + 10
    boxes = torch.cat((corner, corner + sides), dim=1)
    return boxes.round() if integer else boxes


def make_scores(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed + 1000))


def greedy(boxes: Any, scores: Any, groups: Any, iou_threshold: float) -> list[int]:
    """Oracle for small whole-number coordinates, of which all sums and products are exact.

    The quotient of two such numbers rounds to the same float32 directly or through a float64.
    """
    kept: list[int] = []
    order = [i for i in range(len(scores)) if not math.isnan(scores[i])]
    order.sort(key=lambda i: (-scores[i], i))
    for i in order:
        x0, y0, x1, y1 = boxes[i]
        for j in kept:
            u0, v0, u1, v1 = boxes[j]
            w, h = min(x1, u1) - max(x0, u0), min(y1, v1) - max(y0, v0)
            if groups[i] != groups[j] or w <= 0 or h <= 0:
                continue
            union = (x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - w * h
            if np.float32(w * h / union) > np.float32(iou_threshold):
                break
        else:
            kept.append(i)
    return kept


def nms_by_group(boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float) -> list[int]:
    """torchvision's nms, one group after the other, on untouched coordinates."""
    kept = []
    for group in groups.unique():
        members = (groups == group).nonzero().ravel()
        kept.append(members[torchvision.ops.nms(boxes[members], scores[members], iou_threshold)])
    indices = torch.cat(kept) if kept else torch.empty(0, dtype=torch.int64)
    return sorted(indices.tolist(), key=lambda i: (-scores[i].item(), i))


def test_hand_computed() -> None:
    boxes = torch.tensor(
        [
            [0, 0, 10, 10],
            [0, 0, 10, 8],  # 0.8 with the first
            [0, 6, 10, 16],  # 40 / 160 with the first, 20 / 160 with the second
            [50, 50, 60, 60],
            [0, 0, 10, 9],  # 0.9 with the first
        ]
    ).float()
    scores = torch.tensor([0.5, 0.9, 0.7, 0.1, 0.6])
    # Rank order 1, 2, 4, 0, 3: box 1 removes 4 (8/9) and 0 (0.8), and at 0.1 also 2 (0.125).
    assert nms(boxes, scores, 0.5).tolist() == [1, 2, 3]
    assert nms(boxes, scores, 0.1).tolist() == [1, 3]
    assert nms(boxes, scores, 0.85).tolist() == [1, 2, 0, 3]
    groups = torch.tensor([0, 1, 0, 0, -7])
    assert batched_nms(boxes, scores, groups, 0.2).tolist() == [1, 2, 4, 3]
    # A suppressed box suppresses nothing: 4 is gone, so 0 may stay although they overlap by 0.9.
    assert nms(boxes, scores, 0.8).tolist() == [1, 2, 0, 3]


@pytest.mark.parametrize("iou_threshold", [0.0, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("spread", [20.0, 300.0, 3000.0], ids="spread{:.0f}".format)
@pytest.mark.parametrize("n", [1, 2, 37, 128, 129, 1500])
def test_nms_matches_torchvision(n: int, spread: float, iou_threshold: float) -> None:
    for seed in range(8 if n < 128 else 2):
        boxes, scores = make_boxes(n, seed, spread), make_scores(n, seed=seed)
        expected = torchvision.ops.nms(boxes, scores, iou_threshold)
        assert torch.equal(nms(boxes, scores, iou_threshold), expected)
        # Equal scores, and equal boxes.
        scores = (scores * 5).round()
        boxes[n // 2 :] = boxes[: n - n // 2].clone()
        expected = torchvision.ops.nms(boxes, scores, iou_threshold)
        assert torch.equal(nms(boxes, scores, iou_threshold), expected)


@pytest.mark.parametrize("spread", [20.0, 300.0], ids="spread{:.0f}".format)
@pytest.mark.parametrize("n, groups", [(1, 1), (50, 3), (400, 80), (1600, 7), (600, 1203)])
def test_batched_nms_matches_torchvision(n: int, groups: int, spread: float) -> None:
    for seed in range(3):
        boxes, scores = make_boxes(n, seed, spread), make_scores(n, seed=seed)
        idxs = torch.randint(groups, (n,), generator=torch.Generator().manual_seed(seed))
        for iou_threshold in (0.1, 0.6):
            actual = batched_nms(boxes, scores, idxs, iou_threshold)
            assert actual.tolist() == nms_by_group(boxes, scores, idxs, iou_threshold)
        # With whole numbers and few groups torchvision's offsets are exact too; so is 0.5.
        boxes = make_boxes(n, seed, spread, integer=True)
        actual = batched_nms(boxes, scores, idxs, 0.5)
        assert actual.tolist() == torchvision.ops.batched_nms(boxes, scores, idxs, 0.5).tolist()


def test_fuzz() -> None:
    """Coarse coordinates and scores: ties, equal boxes, IoUs at the threshold, empty boxes."""
    rng = random.Random(0)
    at_threshold = 0
    for _ in range(600):
        n = rng.choice([1, 2, 3, 8, 25])
        size = rng.choice([3, 5, 10])
        boxes = [[rng.randint(0, size) for _ in range(4)] for _ in range(n)]
        if rng.random() < 0.7:
            boxes = [[min(a, c), min(b, d), max(a, c), max(b, d)] for a, b, c, d in boxes]
        scores = [rng.choice([0.1, 0.2, 0.3, 0.9, -INF, INF, NAN, -1.0]) for _ in range(n)]
        groups = [rng.choice([-3, 0, 1]) for _ in range(n)]
        iou_threshold = rng.choice([0, 0.25, 1 / 3, 0.4, 0.5, 0.6, 2 / 3, 0.8, 1])
        tensors = torch.tensor(boxes).float(), torch.tensor(scores)
        expected = greedy(boxes, scores, [0] * n, iou_threshold)
        assert nms(*tensors, iou_threshold).tolist() == expected
        at_threshold += expected != greedy(boxes, scores, [0] * n, iou_threshold - 1e-6)
        expected = greedy(boxes, scores, groups, iou_threshold)
        assert batched_nms(*tensors, torch.tensor(groups), iou_threshold).tolist() == expected
    assert at_threshold > 10


def test_threshold_is_a_float32() -> None:
    """float32(0.6) is above 0.6, but an IoU of float32(0.6) is not above the threshold."""
    for above, whole, iou_threshold in ((6, 10, 0.6), (7, 10, 0.7), (1, 3, 1 / 3), (1, 2, 0.5)):
        boxes = torch.tensor([[0, 0, 10, whole], [0, 0, 10, above]]).float()
        scores = torch.tensor([0.9, 0.8])
        assert nms(boxes, scores, iou_threshold).tolist() == [0, 1]
        assert nms(boxes, scores, iou_threshold - 1e-6).tolist() == [0]


@pytest.mark.parametrize("iou_threshold", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    "odd",
    [
        [5, 5, 5, 5],
        [0, 0, 0, 10],
        [10, 10, 0, 0],
        [10, 0, 0, 10],
        [NAN, 0, 10, 10],
        [0, 0, 10, NAN],
        [0, 0, INF, 10],
        [0, 0, INF, INF],
        [-INF, -INF, INF, INF],
        [INF, INF, INF, INF],
        [-1e30, -1e30, 1e30, 1e30],
    ],
    ids=str,
)
def test_odd_boxes_neither_suppress_nor_are_suppressed(
    odd: list[float], iou_threshold: float
) -> None:
    boxes = torch.tensor([odd, [0, 0, 10, 10], odd, [0, 0, 10, 10], odd]).float()
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])
    groups = torch.zeros(5, dtype=torch.int64)
    expected = [0, 1, 2, 4] if iou_threshold < 1 else [0, 1, 2, 3, 4]
    assert nms(boxes, scores, iou_threshold).tolist() == expected
    assert batched_nms(boxes, scores, groups, iou_threshold).tolist() == expected


def test_odd_scores() -> None:
    boxes = make_boxes(6, 0, spread=1e6)  # disjoint
    scores = torch.tensor([0.5, NAN, -INF, INF, 0.5, -2.0])
    groups = torch.zeros(6, dtype=torch.int64)
    assert nms(boxes, scores, 0.5).tolist() == [3, 0, 4, 5, 2]
    assert batched_nms(boxes, scores, groups, 0.5).tolist() == [3, 0, 4, 5, 2]
    assert nms(boxes, torch.full((6,), NAN), 0.5).tolist() == []
    # A box with a NaN score suppresses nothing.
    same = boxes[:1].expand(2, 4)
    assert nms(same, torch.tensor([NAN, 0.1]), 0.5).tolist() == [1]


def test_groups_are_integers_not_offsets() -> None:
    # Boxes of 20 px in group 1202 far from the origin: IoU 0.6 is 0.60 +- 0.03 after an offset.
    boxes = torch.tensor([[1000, 1000, 1020, 1020], [1000, 1000, 1020, 1012.2]])
    scores, groups = torch.tensor([0.9, 0.8]), torch.tensor([1202, 1202])
    assert batched_nms(boxes, scores, groups, 0.605).tolist() == [0]
    assert batched_nms(boxes, scores, groups, 0.615).tolist() == [0, 1]
    assert batched_nms(boxes, scores, torch.tensor([2**40, 2**40 + 1]), 0.1).tolist() == [0, 1]
    negative = boxes - 5000
    assert batched_nms(negative, scores, torch.tensor([0, 1]), 0.1).tolist() == [0, 1]


def test_chain_across_blocks() -> None:
    """Every box overlaps the next alone: every second one stays, however long the chain."""
    left = torch.arange(700.0) * 6
    boxes = torch.stack((left, torch.zeros(700), left + 10, torch.full((700,), 10.0)), dim=1)
    scores = torch.linspace(1, 0, 700)
    assert nms(boxes, scores, 0.2).tolist() == list(range(0, 700, 2))
    shuffled = torch.randperm(700, generator=torch.Generator().manual_seed(0))
    kept = shuffled[nms(boxes[shuffled], scores[shuffled], 0.2)]
    assert kept.tolist() == list(range(0, 700, 2))


def test_empty() -> None:
    boxes, scores = torch.empty(0, 4), torch.empty(0)
    for kept in (nms(boxes, scores, 0.5), batched_nms(boxes, scores, scores.long(), 0.5)):
        assert kept.shape == (0,) and kept.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    boxes, scores = make_boxes(300, 0).to(dtype), make_scores(300, seed=0).to(dtype)
    groups = torch.arange(300) % 3
    expected = nms(boxes.float(), scores.float(), 0.4)
    assert len(scores.unique()) < 300 or dtype == torch.float64  # ties
    assert torch.equal(nms(boxes.requires_grad_(), scores.requires_grad_(), 0.4), expected)
    # Box and score dtypes need not agree, and groups may be any integers.
    assert torch.equal(nms(boxes, scores.float(), 0.4), expected)
    expected = batched_nms(boxes.float(), scores.float(), groups, 0.4)
    assert torch.equal(batched_nms(boxes, scores, groups.to(torch.uint8), 0.4), expected)


def test_scores_are_compared_in_their_own_dtype() -> None:
    scores = torch.tensor([0.5, 0.5 + 1e-12], dtype=torch.float64)
    boxes = torch.tensor([[0, 0, 1, 1], [5, 5, 6, 6]]).float()
    assert nms(boxes, scores, 0.5).tolist() == [1, 0]


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operator returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


def test_memory_grows_with_n_alone() -> None:
    boxes, scores = make_boxes(20_000, 0, 300.0), make_scores(20_000, seed=0)
    with Largest() as largest:
        kept = nms(boxes, scores, 0.3)
    assert largest.numel <= 1 << 19  # of 20,000 x 20,000
    assert torch.equal(kept, torchvision.ops.nms(boxes, scores, 0.3))


@pytest.mark.parametrize(
    "op, functions",
    [
        ("nms", (nms, nms_ref)),
        ("batched_nms", (batched_nms, batched_nms_ref)),
    ],
)
def test_errors(op: str, functions: Any) -> None:
    groups = {"nms": None, "batched_nms": "idxs"}[op]
    good: dict[str, Any] = {
        "boxes": torch.zeros(3, 4),
        "scores": torch.zeros(3),
        "iou_threshold": 0.5,
    }
    if groups:
        good[groups] = torch.zeros(3, dtype=torch.int64)
    cases: list[tuple[dict[str, Any], Any, str]] = [
        ({"boxes": good["boxes"].long()}, TypeError, "boxes must be floating point, got torch.int"),
        ({"scores": good["scores"].int()}, TypeError, "scores must be floating point, got torch"),
        ({"boxes": torch.zeros(3, 5)}, ValueError, r"boxes must have shape .*K, 4\], got"),
        ({"boxes": torch.zeros(1, 3, 4)}, ValueError, r"boxes must have shape .*K, 4\]"),
        ({"scores": torch.zeros(4)}, ValueError, r"scores must .*3\], got .*4\]"),
        ({"scores": torch.zeros(3, device="meta")}, ValueError, "scores .* cpu, got meta"),
        ({"iou_threshold": 1.5}, ValueError, r"iou_threshold must be in \[0, 1\], got 1.5"),
        ({"iou_threshold": -0.1}, ValueError, r"iou_threshold must be in \[0, 1\], got -0.1"),
        ({"iou_threshold": NAN}, ValueError, r"iou_threshold must be in \[0, 1\], got nan"),
    ]
    if groups:
        cases += [
            ({groups: good[groups].float()}, TypeError, f"{groups} must be integers, got torch.f"),
            ({groups: good[groups] > 0}, TypeError, f"{groups} must be integers, got torch.bool"),
            ({groups: good[groups][..., :2]}, ValueError, rf"{groups} must .*3\], got .*2\]"),
        ]
    for function in functions:
        function(**good)
        for changes, error, message in cases:
            with pytest.raises(error, match=f"^{op}: {message}"):
                function(**{**good, **changes})
