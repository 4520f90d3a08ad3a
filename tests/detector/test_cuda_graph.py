"""Recording and replaying: the rules with a stand-in for graphs, the graphs on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fcos.cuda_graph import GraphedFunction
from tests.detector.stand_in_graph import StandInGraph


@pytest.fixture
def graphed(device: str) -> type[GraphedFunction]:
    return GraphedFunction if device == "cuda" else StandInGraph


def test_follows_its_arguments_and_the_weights(device: str, graphed: Any) -> None:
    weight = torch.full((3,), 2.0, device=device)
    function = graphed(lambda x, y: (x * weight + y, x.sum()), torch.device(device), warmup=2)
    for step in range(6):
        weight.fill_(step)
        x, y = torch.randn(4, 3), torch.randn(4, 3)
        product, total = function(x, y)
        torch.testing.assert_close(product.cpu(), x * step + y)
        torch.testing.assert_close(total.cpu(), x.sum())
        assert function.recorded == (step >= 2)


def test_results_are_the_callers(device: str, graphed: Any) -> None:
    function = graphed(lambda x: (x + 1,), torch.device(device), warmup=1)
    results = [function(torch.tensor([float(step)]))[0] for step in range(5)]
    assert [result.item() for result in results] == [1, 2, 3, 4, 5]


def test_one_graph_for_each_set_of_shapes(device: str, graphed: Any) -> None:
    calls = []

    def function(x: Tensor) -> tuple[Tensor]:
        calls.append(tuple(x.shape))
        return (2 * x,)

    graph = graphed(function, torch.device(device), warmup=2)
    for size in (3, 5, 3, 5, 3, 7, 3, 5, 5, 3):
        x = torch.randn(size)
        torch.testing.assert_close(graph(x)[0].cpu(), 2 * x)
    assert graph.recorded == 2
    if device == "cuda":  # in Python it ran to warm up and to be recorded, no more
        assert calls.count((3,)) == calls.count((5,)) == 3 and calls.count((7,)) == 1


def test_memory_format(device: str, graphed: Any) -> None:
    formats = []

    def function(x: Tensor) -> tuple[Tensor]:
        formats.append(x.is_contiguous(memory_format=torch.channels_last))
        return (x.sum(dim=1),)

    graph = graphed(function, torch.device(device), torch.channels_last, warmup=1)
    for _ in range(3):
        x = torch.randn(2, 3, 4, 5)
        torch.testing.assert_close(graph(x)[0].cpu(), x.sum(dim=1))
    assert all(formats) and len(formats) >= 2
