"""nms on 10,000 small inputs of every odd kind, on each backend, against an obvious greedy loop."""

from __future__ import annotations

import functools
import itertools
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from fcos_ext import _host, batched_nms_ref, nms_ref
from tests.simt.build import load_simt_library

OP = torch.ops.fcos_ext.nms.default
NUM_CASES = 10_000
THRESHOLDS = [0.0, 0.25, 1 / 3, 0.4, 0.5, 0.6, 0.7, 2 / 3, 0.8, 1.0]
ODD = [np.nan, np.inf, -np.inf, 3e38, -3e38, 1e19, -1e19, 1e-30, 0.0, -0.0]


@dataclass(frozen=True)
class Case:
    """Arguments of the operator, and what it has to return."""

    boxes: Tensor
    scores: Tensor
    groups: Tensor | None
    iou_threshold: float
    max_detections: int
    expected: list[int]
    at_threshold: bool
    """Whether a slightly lower threshold would change the result."""


def pairwise_iou(boxes: np.ndarray) -> np.ndarray:
    """[n, n] of float32 boxes, as the definition says it, each operation rounded to float32."""
    x0, y0, x1, y1 = boxes.T
    width = np.minimum(x1[:, None], x1) - np.maximum(x0[:, None], x0)
    height = np.minimum(y1[:, None], y1) - np.maximum(y0[:, None], y0)
    zero = np.float32(0)
    intersection = np.maximum(width, zero) * np.maximum(height, zero)
    area = (x1 - x0) * (y1 - y0)
    iou = intersection / (area[:, None] + area - intersection)
    assert iou.dtype == np.float32
    return iou


def greedy(
    iou: np.ndarray, scores: np.ndarray, groups: np.ndarray | None, iou_threshold: float
) -> list[int]:
    left = [i for i in range(len(scores)) if not np.isnan(scores[i])]
    left.sort(key=lambda i: (-scores[i], i))
    suppresses = iou > np.float32(iou_threshold)
    if groups is not None:
        suppresses &= groups[:, None] == groups
    kept = []
    while left:
        best = left[0]
        kept.append(best)
        left = [i for i in left[1:] if not suppresses[best, i]]
    return kept


def make_boxes(rng: np.random.Generator, n: int) -> np.ndarray:
    kind = rng.integers(8)
    if kind < 3:  # whole numbers: equal boxes, IoUs at the threshold, boxes without area
        corners = rng.integers(-6, 7, (n, 4)) if kind else rng.integers(0, 4, (n, 4))
    elif kind == 3:  # few different boxes, of all sizes
        corners = rng.normal(0, 10.0 ** rng.integers(-20, 19), (4, 4))[rng.integers(4, size=n)]
    elif kind == 4:  # nested
        half = rng.integers(1, 9, n)
        corners = np.stack((-half, -half, half, half), axis=1) + 3
    elif kind == 5:  # around a few objects, far from the origin or near to it
        center = rng.normal(0, 100, (2, 4))[rng.integers(2, size=n)] + rng.choice([0, -1e4])
        corners = center + [0, 0, 120, 120] + rng.normal(0, 6, (n, 4))
    else:
        start = rng.uniform(-30, 30, (n, 2))
        corners = np.concatenate((start, start + rng.uniform(0, 40, (n, 2))), axis=1)
    boxes = corners.astype(np.float32)
    if rng.random() < 0.8:  # else some are inside out
        boxes = np.concatenate(
            (np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])), axis=1
        )
    if rng.random() < 0.2:
        odd = rng.random((n, 4)) < 0.1
        boxes[odd] = rng.choice(ODD, odd.sum())
    return boxes


def make_scores(rng: np.random.Generator, n: int) -> np.ndarray:
    kind = rng.integers(4)
    if kind == 0:
        values = rng.choice([0.25, 0.5, 0.75], n)
    elif kind == 1:
        values = rng.choice([0.1, 0.9, -np.inf, np.inf, np.nan, -1.0, 0.0, -0.0], n)
    elif kind == 2:
        values = np.full(n, 0.5)
    else:
        values = rng.normal(size=n)
    return values.astype(np.float32)


def make_groups(rng: np.random.Generator, n: int) -> np.ndarray | None:
    kind = rng.integers(4)
    if kind == 0:
        return None
    few = [-3, 0, 1]
    return rng.choice([few, range(max(n // 2, 1)), [-(2**63), 2**63 - 1, 2**32, 0]][kind - 1], n)


def make_case(rng: np.random.Generator) -> Case:
    big = rng.random() < 0.02  # more than a tile of 64, more than a band in the simulator
    n = int(rng.integers(65, 300) if big else rng.integers(1, 22))
    boxes, scores, groups = make_boxes(rng, n), make_scores(rng, n), make_groups(rng, n)
    iou_threshold = rng.choice(THRESHOLDS).item()
    max_detections = int(rng.integers(1, n + 1)) if rng.random() < 0.1 else -1
    iou = pairwise_iou(boxes)
    expected = greedy(iou, scores, groups, iou_threshold)
    lower = greedy(iou, scores, groups, iou_threshold - 1e-6) if iou_threshold else expected
    return Case(
        torch.from_numpy(boxes),
        torch.from_numpy(scores),
        None if groups is None else torch.from_numpy(groups).to(torch.int64),
        iou_threshold,
        max_detections,
        expected[:max_detections] if max_detections > 0 else expected,
        lower != expected,
    )


@functools.cache
def make_cases() -> list[Case]:
    rng = np.random.default_rng(0)
    with np.errstate(all="ignore"):
        return [make_case(rng) for _ in range(NUM_CASES)]


def describe(case: Case, actual: list[int]) -> str:
    return f"got {actual} for\n{case}\n{case.boxes.tolist()}"


def test_cases_are_what_they_should_be() -> None:
    cases = make_cases()
    assert sum(case.at_threshold for case in cases) > NUM_CASES / 50
    assert sum(len(case.expected) < len(case.scores) for case in cases) > NUM_CASES / 2
    assert sum(len(case.scores) > 192 for case in cases) > 50


def test_fuzz(device: str) -> None:
    for case in make_cases():
        groups = None if case.groups is None else case.groups.to(device)
        actual = OP(
            case.boxes.to(device),
            case.scores.to(device),
            groups,
            case.iou_threshold,
            case.max_detections,
        ).tolist()
        assert actual == case.expected, describe(case, actual)


def test_fuzz_of_reference(device: str) -> None:
    for case in make_cases()[::10]:
        boxes, scores = case.boxes.to(device), case.scores.to(device)
        limit = None if case.max_detections < 0 else case.max_detections
        if case.groups is None:
            kept = nms_ref(boxes, scores, case.iou_threshold, max_detections=limit)
        else:
            groups = case.groups.to(device)
            kept = batched_nms_ref(boxes, scores, groups, case.iou_threshold, max_detections=limit)
        assert kept.tolist() == case.expected, describe(case, kept.tolist())


ISA_PROGRAM = """
import pickle, sys, torch
from fcos_ext import _host
assert _host.cpu_isa() == sys.argv[1], _host.cpu_isa()
results = []
for *arrays, iou_threshold, limit in pickle.load(sys.stdin.buffer):
    tensors = [None if array is None else torch.from_numpy(array) for array in arrays]
    results.append(torch.ops.fcos_ext.nms(*tensors, iou_threshold, limit).tolist())
pickle.dump(results, sys.stdout.buffer)
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_fuzz_of_instruction_sets(isa: str) -> None:
    """Those that are not in use here; a process for each, as the choice is made once."""
    if _host.cpu_isa() in ("baseline", isa):
        pytest.skip(f"this process runs {_host.cpu_isa()}: test_fuzz has it, or it is not there")
    cases = make_cases()
    inputs = []
    for case in cases:
        groups = None if case.groups is None else case.groups.numpy()
        arrays = case.boxes.numpy(), case.scores.numpy(), groups
        inputs.append((*arrays, case.iou_threshold, case.max_detections))
    command = [sys.executable, "-c", ISA_PROGRAM, isa]
    environment = os.environ | {"FCOS_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, input=pickle.dumps(inputs), stdout=subprocess.PIPE, env=environment, check=True
    )
    for case, actual in zip(cases, pickle.loads(done.stdout), strict=True):
        assert actual == case.expected, describe(case, actual)


def test_fuzz_simt() -> None:
    """Large cases, and those with a limit, one by one; others as groups of one call.

    Cases of one call have different groups, so that none may influence another, and their ranks
    lie between each other's, across tiles and bands.
    """
    lib = load_simt_library()
    op = torch.ops.fcos_ext_simt.nms.default
    shared: list[Case] = []
    for number, case in enumerate(make_cases()):
        if len(case.scores) < 65 and case.max_detections < 0 and number % 20:
            shared.append(case)
            continue
        lib.set_seed(number)
        with lib.guarded_memory():
            actual = op(
                case.boxes, case.scores, case.groups, case.iou_threshold, case.max_detections
            ).tolist()
        assert actual == case.expected, describe(case, actual)
    shared.sort(key=lambda case: case.iou_threshold)
    for iou_threshold, of_threshold in itertools.groupby(shared, lambda c: c.iou_threshold):
        for number, batch in enumerate(batches(list(of_threshold), 25)):
            lib.set_seed(number)
            groups = groups_of(batch)
            boxes = torch.cat([case.boxes for case in batch])
            scores = torch.cat([case.scores for case in batch])
            with lib.guarded_memory():
                kept = op(boxes, scores, groups, iou_threshold, -1).tolist()
            start = 0
            for case in batch:
                end = start + len(case.scores)
                actual = [i - start for i in kept if start <= i < end]
                assert actual == case.expected, describe(case, actual)
                start = end


def batches(cases: list[Case], size: int) -> list[list[Case]]:
    return [cases[i : i + size] for i in range(0, len(cases), size)]


def groups_of(batch: list[Case]) -> Tensor:
    """A number for each group of each case."""
    numbers: dict[tuple[int, int], int] = {}
    result = []
    for i, case in enumerate(batch):
        groups = [0] * len(case.scores) if case.groups is None else case.groups.tolist()
        result += [numbers.setdefault((i, group), len(numbers) - 9) for group in groups]
    return torch.tensor(result)
