"""assign_targets against an oracle that tests all pairs: thousands of batches, bit for bit."""

from __future__ import annotations

import random

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
