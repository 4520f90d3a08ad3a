"""The same cases for pytest-benchmark, with its statistics and comparisons between runs.

pytest benchmarks --benchmark-autosave
pytest benchmarks --benchmark-compare
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from . import bench_nms, bench_sigmoid_focal_loss
from .harness import Case, verify

CASES: list[Case] = [
    *bench_sigmoid_focal_loss.cases(torch.device("cpu")),
    *bench_nms.cases(torch.device("cpu")),
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
