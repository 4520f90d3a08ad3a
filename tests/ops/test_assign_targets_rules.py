"""The rules of assign_targets: hand-computed tables, and a painter's algorithm in pure Python."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fcos_ext.assign_targets import AssignedTargets, assign_targets, assign_targets_ref

INF = math.inf
RULES = ["inclusive", "strict", "half_open"]
ONE_LEVEL: dict[str, Any] = {
    "feature_sizes": [(4, 4)],
    "strides": [8],
    "size_ranges": [(0, INF)],
    "center_sampling_radius": 0.0,
}


def pack(images: Sequence[Sequence[Sequence[float]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, labels (10, 11, ... in order) and offsets of a list of boxes for each image."""
    rows = [box for boxes in images for box in boxes]
    offsets = [0]
    for boxes in images:
        offsets.append(offsets[-1] + len(boxes))
    return (
        torch.tensor(rows, dtype=torch.float32).reshape(-1, 4),
        torch.arange(10, 10 + len(rows)),
        torch.tensor(offsets),
    )


def assign(images: Sequence[Sequence[Sequence[float]]], **options: Any) -> AssignedTargets:
    """By the kernel, which must agree with the reference and with itself on padded boxes."""
    packed = pack(images)
    targets = assign_targets(*packed, **options)
    assert_identical(assign_targets_ref(*packed, **options), targets)
    check_padded(*packed, targets, options)
    return targets


def check_padded(
    boxes: Tensor, labels: Tensor, offsets: Tensor, targets: AssignedTargets, options: Any
) -> None:
    """Padded boxes must give the same targets; those that do not count would always win."""
    counts = offsets.diff()
    capacity = max(counts.tolist(), default=0) + 1
    rows = torch.tensor([-999.0, -999, 1000, 1000]).expand(len(counts), capacity, 4).clone()
    classes = torch.full((len(counts), capacity), 7)
    for i, (first, count) in enumerate(zip(offsets.tolist(), counts.tolist(), strict=False)):
        rows[i, :count] = boxes[first : first + count]
        classes[i, :count] = labels[first : first + count]
    shift = torch.arange(len(counts)) * capacity - offsets[:-1]
    matched = torch.where(targets.matched >= 0, targets.matched + shift[:, None], -1)
    for function in (assign_targets, assign_targets_ref):
        padded = function(rows, classes, counts=counts, **options)
        assert_identical(padded, targets._replace(matched=matched))


def assert_identical(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e) and a.dtype == e.dtype and not a.requires_grad


def paint(
    images: Any,
    *,
    feature_sizes: Any,
    strides: Any,
    size_ranges: Any,
    center_sampling_radius: float,
    boundary: str,
    normalize: bool,
) -> list[Any]:
    """Oracle: paints the boxes from the largest to the smallest, later indices first.

    Returns for each image {location index: (row of the box, ltrb, centerness)}. Python floats are
    exact for the multiples of 1/4 that the tests use.
    """
    result, row = [], 0
    for boxes in images:
        painted: dict[int, Any] = {}
        areas = [((x1 - x0) * (y1 - y0), i) for i, (x0, y0, x1, y1) in enumerate(boxes)]
        for _, i in sorted(areas, reverse=True):
            x0, y0, x1, y1 = boxes[i]
            if x1 <= x0 or y1 <= y0:
                continue
            base = 0
            for (height, width), s, (low, high) in zip(
                feature_sizes, strides, size_ranges, strict=True
            ):
                reach = center_sampling_radius * s if center_sampling_radius else INF
                left, right = max(x0, (x0 + x1) / 2 - reach), min(x1, (x0 + x1) / 2 + reach)
                top, bottom = max(y0, (y0 + y1) / 2 - reach), min(y1, (y0 + y1) / 2 + reach)
                for k in range(height * width):
                    px, py = s // 2 + k % width * s, s // 2 + k // width * s
                    if not (left < px < right and top < py < bottom):
                        continue
                    sides = (px - x0, py - y0, x1 - px, y1 - py)
                    longest = max(sides)
                    if longest < low or longest > high:
                        continue
                    if longest == low and boundary == "strict":
                        continue
                    if longest == high and boundary != "inclusive":
                        continue
                    l_, t_, r_, b_ = sides
                    ratio = (min(l_, r_) * min(t_, b_)) / (max(l_, r_) * max(t_, b_))
                    unit = s if normalize else 1
                    painted[base + k] = (row + i, [d / unit for d in sides], ratio**0.5)
                base += height * width
        result.append(painted)
        row += len(boxes)
    return result


def check(images: Any, **options: Any) -> AssignedTargets:
    """Compare with the oracle; returns the targets."""
    targets = assign(images, **options)
    total = sum(height * width for height, width in options["feature_sizes"])
    n = len(images)
    assert [list(t.shape) for t in targets] == [
        [n, total],
        [n, total, 4],
        [n, total],
        [n, total],
        [n],
    ]
    assert [t.dtype for t in targets] == [
        torch.int64,
        torch.float32,
        torch.float32,
        torch.int64,
        torch.int64,
    ]
    for i, painted in enumerate(paint(images, **options)):
        matched = [painted[k][0] if k in painted else -1 for k in range(total)]
        assert targets.matched[i].tolist() == matched
        assert targets.labels[i].tolist() == [10 + m if m >= 0 else -1 for m in matched]
        assert targets.num_pos[i] == len(painted)
        ltrb = [painted[k][1] if k in painted else [0.0] * 4 for k in range(total)]
        assert targets.ltrb[i].tolist() == ltrb
        centerness = [painted[k][2] if k in painted else 0.0 for k in range(total)]
        assert targets.centerness[i].tolist() == pytest.approx(centerness, rel=1e-6, abs=0)
    return targets


def test_hand_computed() -> None:
    # Locations of the level at 4, 12, 20, 28. The box holds x 12, 20 and y 12 strictly; y 20 is
    # on its border.
    targets = assign([[], [[6, 8, 26, 20]], []], **ONE_LEVEL)
    expected = [-1] * 16
    expected[4 + 1] = expected[4 + 2] = 0
    assert targets.matched.tolist() == [[-1] * 16, expected, [-1] * 16]
    assert targets.labels[1, 4:8].tolist() == [-1, 10, 10, -1]
    assert targets.num_pos.tolist() == [0, 2, 0]
    assert targets.ltrb[1, 5].tolist() == [6, 4, 14, 8]
    assert targets.ltrb[1, 6].tolist() == [14, 4, 6, 8]
    assert targets.ltrb.sum() == 64
    centerness = math.sqrt(6 / 14 * 4 / 8)
    assert targets.centerness[1, 5].item() == pytest.approx(centerness)
    assert targets.centerness.sum().item() == pytest.approx(2 * centerness)


def test_rows_come_before_columns_and_odd_strides_round_down() -> None:
    # Stride 5: locations 2, 7, 12 across and 2, 7 down; only (12, 7) is inside.
    options = {**ONE_LEVEL, "feature_sizes": [(2, 3)], "strides": [5]}
    targets = assign([[[11, 6, 14, 9]]], **options)
    assert targets.matched.tolist() == [[-1, -1, -1, -1, -1, 0]]
    assert targets.ltrb[0, 5].tolist() == [1, 1, 2, 2]


def test_levels_follow_each_other() -> None:
    # The box is 40 wide: at its centre, max(l, t, r, b) is 20; at (4, 4) it is 36.
    targets = assign(
        [[[0, 0, 40, 40]]],
        feature_sizes=[(5, 5), (2, 2)],
        strides=[8, 16],
        size_ranges=[(0, 25), (25, INF)],
        center_sampling_radius=0.0,
        normalize=True,
    )
    assert targets.matched.shape == (1, 29)
    # Level 0 has (20, 20) alone within 25 of all sides; level 1, at 8 and 24, all but (24, 24).
    assert (targets.matched[0] == 0).nonzero().ravel().tolist() == [12, 25, 26, 27]
    assert targets.ltrb[0, 12].tolist() == [2.5] * 4
    assert targets.ltrb[0, 26].tolist() == [1.5, 0.5, 1.0, 2.0]


@pytest.mark.parametrize(
    "longest, expected",
    [
        (63.75, {"inclusive": [0], "strict": [0], "half_open": [0]}),
        (64, {"inclusive": [0, 1], "strict": [], "half_open": [1]}),
        (64.25, {"inclusive": [1], "strict": [1], "half_open": [1]}),
        (128, {"inclusive": [1, 2], "strict": [], "half_open": [2]}),
        (512, {"inclusive": [2], "strict": [2], "half_open": [2]}),
    ],
)
@pytest.mark.parametrize("boundary", RULES)
def test_ends_of_size_ranges(boundary: Any, longest: float, expected: Any) -> None:
    # One location a level, all at (8, 8), with r = longest.
    targets = assign(
        [[[4, 4, 8 + longest, 12]]],
        feature_sizes=[(1, 1)] * 3,
        strides=[16, 16, 17],
        size_ranges=[(0, 64), (64, 128), (128, INF)],
        center_sampling_radius=0.0,
        boundary=boundary,
    )
    assert targets.matched[0].ge(0).nonzero().ravel().tolist() == expected[boundary]


def test_center_window_is_strict() -> None:
    # Centre (16, 16), radius 1.5 * 8 = 12: of 4, 12, 20, 28 only the middle two are nearer.
    box = [[[-100.0, -100, 132, 132]]]
    targets = assign(box, **{**ONE_LEVEL, "center_sampling_radius": 1.5})
    assert targets.matched[0].ge(0).nonzero().ravel().tolist() == [5, 6, 9, 10]
    targets = assign(box, **{**ONE_LEVEL, "center_sampling_radius": 1.5 + 2**-20})
    assert targets.num_pos.item() == 16
    # The window never reaches outside the box.
    targets = assign([[[10, 10, 22, 14]]], **{**ONE_LEVEL, "center_sampling_radius": 1.5})
    assert targets.matched[0].ge(0).nonzero().ravel().tolist() == [5, 6]


def test_ambiguity() -> None:
    large, small, tall = [0, 0, 32, 32], [8, 8, 24, 24], [10, 2, 18, 34]
    assert assign([[large, small]], **ONE_LEVEL).matched[0, 5] == 1
    assert assign([[small, large]], **ONE_LEVEL).matched[0, 5] == 0
    # small and tall have the same area, 256, and both hold the location (12, 12).
    assert assign([[tall, small]], **ONE_LEVEL).matched[0, 5] == 0
    assert assign([[small, tall]], **ONE_LEVEL).matched[0, 5] == 0
    assert assign([[large, small, small, tall]], **ONE_LEVEL).matched[0, 5] == 1


def test_ties_are_of_float32_areas() -> None:
    # 4097 * 4097 = 4096 * 4098 + 1, and in float32 they are equal.
    square, oblong, smaller = [-8, -8, 4089, 4089], [-8, -8, 4088, 4090], [-8, -8, 4088, 4089]
    options = {**ONE_LEVEL, "feature_sizes": [(1, 1)]}
    assert assign([[square, oblong]], **options).matched.item() == 0
    assert assign([[oblong, square]], **options).matched.item() == 0
    assert assign([[square, smaller]], **options).matched.item() == 1


def test_ends_of_boxes() -> None:
    # 34 * 34 > 112 * 10, but 35 * 35 < 113 * 11
    boxes, options = [[0, 0, 34, 34], [-40, 9, 72, 19]], {**ONE_LEVEL, "feature_sizes": [(2, 2)]}
    exclusive, inclusive = (
        assign([boxes], **options, corners=ends) for ends in ("edges", "pixels")
    )
    assert exclusive.matched[0].tolist() == [0, 0, 1, 1]
    assert inclusive.matched[0].tolist() == [0] * 4
    assert inclusive.ltrb[0, 3].tolist() == [12, 12, 22, 22]


def test_images_do_not_mix() -> None:
    box = [0, 0, 32.0, 32]
    targets = assign([[box], [], [[8, 8, 24, 24.0], box], []], **ONE_LEVEL)
    assert targets.matched[0].tolist() == [0] * 16
    assert targets.matched[2].tolist() == [2] * 5 + [1] * 2 + [2] * 2 + [1] * 2 + [2] * 5
    assert targets.num_pos.tolist() == [16, 0, 16, 0]


def test_no_boxes_and_no_images() -> None:
    targets = assign([[], []], **ONE_LEVEL)
    assert targets.labels.tolist() == targets.matched.tolist() == [[-1] * 16] * 2
    assert targets.num_pos.tolist() == [0, 0]
    assert not targets.ltrb.any() and not targets.centerness.any()
    targets = assign([], **ONE_LEVEL)
    assert targets.labels.shape == (0, 16) and targets.num_pos.shape == (0,)


@pytest.mark.parametrize(
    "bad",
    [
        [math.nan, 0, 32, 32],
        [0, 0, 32, math.nan],
        [0, 0, INF, 32],
        [-INF, -INF, INF, INF],
        [INF, INF, INF, INF],
        [-3e38, 0, 3e38, 32],
        [-1e30, -1e30, 1e30, 1e30],
        [12, 0, 12, 32],
        [32, 0, 0, 32],
        [32, 32, 0, 0],
    ],
    ids=str,
)
def test_improper_boxes_never_match(bad: list[float]) -> None:
    targets = assign([[bad]], **ONE_LEVEL)
    assert targets.num_pos.tolist() == [0]
    assert not targets.ltrb.any() and not targets.centerness.any()
    targets = assign([[bad, [0, 0, 32, 32], bad]], **ONE_LEVEL)
    assert targets.matched.tolist() == [[1] * 16]


@pytest.mark.parametrize("boundary", RULES)
@pytest.mark.parametrize("radius", [0.0, 1.0, 1.5, 2.25])
def test_random_batches(radius: float, boundary: Any) -> None:
    """Fuzz, on coordinates so coarse that ties, borders and range ends are frequent."""
    rng = random.Random(f"{radius} {boundary}")
    edges = [0, 12, 20, 28, 36, INF]
    positives = 0
    for case in range(40):
        levels = 1 + case % 5
        step = rng.choice([0.25, 1, 4])

        def coordinate(limit: float, step: float = step) -> float:
            return rng.randrange(int(limit / step)) * step

        images = []
        for _ in range(rng.randint(1, 3)):
            boxes = []
            for _ in range(rng.choice([0, 1, 4, 12])):
                x0, y0 = coordinate(40) - 8, coordinate(40) - 8
                limit = rng.choice([8, 24, 48])
                boxes.append((x0, y0, x0 + coordinate(limit), y0 + coordinate(limit)))
                if rng.random() < 0.2:
                    boxes.append(boxes[-1])
            images.append(boxes)
        targets = check(
            images,
            feature_sizes=[(max(1, 9 >> level), max(1, 11 >> level)) for level in range(levels)],
            strides=[rng.choice([4, 5]) << level for level in range(levels)],
            size_ranges=[(edges[i], edges[i + 1]) for i in range(levels)],
            center_sampling_radius=radius,
            boundary=boundary,
            normalize=False,
        )
        positives += int(targets.num_pos.sum())
    assert positives > 200


def test_normalized() -> None:
    check(
        [[(3, 3, 61, 50), (10, 12, 40, 30)], [], [(0, 0, 64, 64), (20, 20, 36, 36)]],
        feature_sizes=[(8, 8), (4, 4), (2, 2)],
        strides=[8, 16, 32],
        size_ranges=[(0, 16), (16, 32), (32, INF)],
        center_sampling_radius=1.5,
        boundary="half_open",
        normalize=True,
    )


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operator returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


def test_memory_does_not_grow_with_locations_times_boxes() -> None:
    rng = random.Random(0)
    boxes = []
    for _ in range(1000):
        x, y = rng.random() * 700, rng.random() * 700
        boxes.append([x, y, x + 10 + rng.random() * 90, y + 10 + rng.random() * 90])
    with Largest() as largest:
        targets = assign_targets_ref(*pack([boxes]), **{**ONE_LEVEL, "feature_sizes": [(100, 100)]})
    assert largest.numel <= 1 << 22  # of 10,000 x 1,000 x 4
    assert targets.num_pos.item() > 5000
    # In chunks or not, the assignment is the same: 100 single rows, moved up to the first.
    for row in (0, 49, 99):
        moved = [[x0, y0 - row * 8, x1, y1 - row * 8] for x0, y0, x1, y1 in boxes[:200]]
        alone = assign([moved], **{**ONE_LEVEL, "feature_sizes": [(1, 100)]})
        whole = assign([boxes[:200]], **{**ONE_LEVEL, "feature_sizes": [(100, 100)]})
        assert torch.equal(alone.matched[0], whole.matched[0, row * 100 : row * 100 + 100])
