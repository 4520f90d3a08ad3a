"""Learning rates worked out by hand, and which weights decay."""

from dataclasses import replace

import pytest
import torch

from fcos.config import TrainConfig
from fcos.model import FCOS
from fcos.optim import build_optimizer, learning_rate, set_learning_rate
from fcos.presets import tiny


@pytest.mark.parametrize(
    ("iteration", "expected"),
    [
        (0, 0.01 / 3),
        (499, 0.01 / 3),
        (500, 0.01),
        (59_999, 0.01),
        (60_000, 0.001),
        (79_999, 0.001),
        (80_000, 0.0001),
        (89_999, 0.0001),
    ],
)
def test_step_schedule_of_the_paper(iteration: int, expected: float) -> None:
    assert learning_rate(iteration, TrainConfig()) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("iteration", "expected"),
    # (1 + cos(pi i / 100)) / 2, times 0.1 + 0.9 i / 10 for the first ten
    [(0, 0.1), (5, 0.99384417 * 0.55), (10, 0.97552826), (50, 0.5), (99, 0.00024672)],
)
def test_linear_warmup_and_cosine(iteration: int, expected: float) -> None:
    config = TrainConfig(
        iterations=100,
        learning_rate=1.0,
        schedule="cosine",
        warmup="linear",
        warmup_iterations=10,
        warmup_factor=0.1,
    )
    assert learning_rate(iteration, config) == pytest.approx(expected, rel=1e-4)


def test_no_warmup() -> None:
    assert learning_rate(0, TrainConfig(warmup_iterations=0)) == pytest.approx(0.01)


@pytest.mark.parametrize(("kind", "cls"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_decay_of_convolution_weights_alone(kind: str, cls: type) -> None:
    model = replace(tiny().model, num_classes=2, frozen_stages=2)
    network = FCOS(model)
    config = TrainConfig(optimizer=kind, weight_decay=0.05)  # type: ignore[arg-type]
    optimizer = build_optimizer(network, config)
    assert isinstance(optimizer, cls)
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    seen = {0.05: 0, 0.0: 0}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in decay, name
            continue
        is_conv = name.endswith("weight") and parameter.dim() == 4
        assert decay[id(parameter)] == (0.05 if is_conv else 0.0), name
        seen[decay[id(parameter)]] += 1
    assert min(seen.values()) > 10
    assert decay[id(network.head.scales)] == 0

    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]
