"""The same cases for pytest-benchmark, with its statistics and comparisons between runs.

pytest benchmarks --benchmark-autosave
pytest benchmarks --benchmark-compare
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from . import (
    bench_assign_targets,
    bench_fcos_loss,
    bench_iou_loss,
    bench_nms,
    bench_padded_batched_nms,
    bench_postprocess,
    bench_sigmoid_focal_loss,
    bench_soft_nms,
)
from .harness import Case, verify

BENCHMARKS = [
    bench_assign_targets,
    bench_fcos_loss,
    bench_iou_loss,
    bench_nms,
    bench_padded_batched_nms,
    bench_postprocess,
    bench_sigmoid_focal_loss,
    bench_soft_nms,
]
CASES: list[Case] = [
    case for benchmark in BENCHMARKS for case in benchmark.cases(torch.device("cpu"))
]


@pytest.fixture
def _threads(case: Case) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(case.settings["threads"])
    torch._dynamo.reset()  # what was compiled for another number of threads
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize(
    "case, provider",
    [
        pytest.param(case, provider, id=f"{case.name}, {provider}")
        for case in CASES
        for provider in case.providers
    ],
)
def test_speed(benchmark: Callable[..., Any], case: Case, provider: str) -> None:
    inputs = case.make_inputs(0)
    row = verify(case, provider, inputs)
    assert "refused" not in row, row["refused"]
    benchmark.group = case.name  # type: ignore[attr-defined]
    benchmark(case.providers[provider], *inputs)
