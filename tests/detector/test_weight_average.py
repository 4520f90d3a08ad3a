"""The moving average of weights, against PyTorch's own."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fcos.weight_average import WeightAverage


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(2, 2, bias=False))


def change(module: nn.Module) -> None:
    for value in module.state_dict().values():
        if value.is_floating_point():
            value.add_(torch.randn_like(value))
        else:
            value.add_(1)


@pytest.mark.parametrize("decay", [0.5, 0.995])
def test_equals_that_of_pytorch(decay: float) -> None:
    trained = network()
    average = WeightAverage(trained, decay)
    expected = AveragedModel(trained, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    for step in range(5):
        change(trained)
        assert average.started == (step > 0)
        average.update(trained)
        expected.update_parameters(trained)
        for name, value in expected.module.state_dict().items():
            if value.is_floating_point():
                assert torch.equal(average.network.state_dict()[name], value), name
    assert average.network[1].num_batches_tracked == trained[1].num_batches_tracked == 5


def test_is_apart_from_the_network() -> None:
    trained = network()
    average = WeightAverage(trained, 0.5)
    before = trained[0].weight.detach().clone()
    average.update(trained)
    average.network[0].weight.zero_()
    assert torch.equal(trained[0].weight, before) and trained[0].weight.requires_grad
    assert not any(p.requires_grad for p in average.network.parameters())
