"""assign_targets against an oracle that tests all pairs: thousands of batches, bit for bit."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from fcos_ext import assign_targets_ref
from tests.ops.assign_targets_oracle import (
    INF,
    Case,
    assert_identical,
    expected,
    random_case,
)
from tests.simt.build import SimtLibrary, load_simt_library

OP = torch.ops.fcos_ext.assign_targets.default

CASES, PARTS = 2000, 8


def cases(part: int) -> list[Case]:
    rng = random.Random(part)
    return [random_case(rng) for _ in range(CASES // PARTS)]


@pytest.fixture(scope="module")
def simt() -> SimtLibrary:
    return load_simt_library()


@pytest.mark.parametrize("part", range(PARTS))
def test_fuzz(device: str, simt: SimtLibrary, part: int) -> None:
    """The kernel of the device; beside the CPU's, the CUDA source in the simulator."""
    positives = 0
    for number, case in enumerate(cases(part)):
        truth = expected(case)
        tensors = [t.to(device) for t in case.tensors()]
        assert_identical(OP(*tensors, *case.arguments()[3:]), case, truth)
        positives += int(truth.num_pos.sum())
        if device == "cpu":
            simt.set_seed(number)
            with simt.guarded_memory():
                results = torch.ops.fcos_ext_simt.assign_targets(*case.arguments())
            assert_identical(results, case, truth)
    assert positives > 2000


def test_fuzz_of_the_reference() -> None:
    for case in cases(PARTS)[:200]:
        boxes, labels, extents = case.tensors()
        form = "counts" if case.padded else "offsets"
        results = assign_targets_ref(boxes, labels, **{form: extents}, **case.options())
        assert_identical(results, case)


def wide_case(rng: random.Random, stride: int, size: tuple[int, int], high: float) -> Case:
    """A level far larger than a tile, or so far out that float32 skips locations."""
    height, width = size
    columns = [rng.randrange(width) for _ in range(60)]
    rows = [rng.randrange(height) for _ in range(6)]
    boxes = []
    for _ in range(60):
        x, y = (stride // 2 + stride * rng.choice(indices) for indices in (columns, rows))
        w, h = (rng.choice([2, 3, 7, 40]) * stride * rng.random() * 2 for _ in range(2))
        nudge = np.nextafter(np.float32(x), np.float32(rng.choice([-INF, INF])))
        boxes.append((rng.choice([x, float(nudge), x - w]), y - h, x + w, y + h))
    return Case(
        images=[np.array(boxes, np.float32)],
        feature_sizes=[size],
        strides=[stride],
        size_ranges=[(0, high * stride)],
        radius=rng.choice([0.0, 0.5, 1.0, 1.5, 3.0]),
        boundary=rng.choice(["inclusive", "strict"]),
    )


@pytest.mark.parametrize("size", [(3, 5000), (5000, 3), (70, 90), (1, 4097)], ids=str)
@pytest.mark.parametrize("stride", [1, 8, 12_345, 4_194_305, 2**31 - 1])
def test_windows_lose_nothing(device: str, simt: SimtLibrary, stride: int, size: Any) -> None:
    """Only the locations near a box are tested, which must not be seen in the result."""
    rng = random.Random(f"{stride} {size}")
    positives = 0
    for high in (INF, 2.5, 7.0):
        case = wide_case(rng, stride, size, high)
        truth = expected(case)
        positives += int(truth.num_pos.sum())
        tensors = [t.to(device) for t in case.tensors()]
        assert_identical(OP(*tensors, *case.arguments()[3:]), case, truth)
        if device == "cpu" and size != (5000, 3):  # 625 tiles, of which the simulator is slow
            results = torch.ops.fcos_ext_simt.assign_targets(*case.arguments())
            assert_identical(results, case, truth)
    assert positives > 30


@pytest.mark.parametrize("radius", [0.0, 1.5])
def test_many_boxes(device: str, simt: SimtLibrary, radius: float) -> None:
    """5,000 in one image: many rounds of the CUDA kernel."""
    generator = np.random.default_rng(0)
    corner = generator.integers(-40, 300, (5000, 2)) / 2
    boxes = np.concatenate([corner, corner + generator.integers(1, 200, (5000, 2)) / 2], axis=1)
    case = Case(
        images=[boxes.astype(np.float32), boxes[:1].astype(np.float32)],
        feature_sizes=[(12, 40)],
        strides=[4],
        size_ranges=[(5, 40)],
        radius=radius,
    )
    truth = expected(case)
    tensors = [t.to(device) for t in case.tensors()]
    assert_identical(OP(*tensors, *case.arguments()[3:]), case, truth)
    if device == "cpu":
        results = torch.ops.fcos_ext_simt.assign_targets(*case.arguments())
        assert_identical(results, case, truth)
