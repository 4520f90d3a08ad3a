"""A moving average of a network's weights, often better than the weights themselves."""

from __future__ import annotations

import copy
from itertools import compress

import torch
from torch import Tensor, nn


class WeightAverage:
    """Exponential moving average of parameters and buffers, w = decay * w + (1 - decay) * new.

    ``torch.optim.swa_utils.AveragedModel`` computes the same, but asks the device at each step
    whether it is the first, for which the host waits.

    Args:
        network: whose weights are averaged; a copy of it holds the average.
        decay: in 0..1.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.decay = decay
        self.started = False
        """Whether there was an update; the first one starts the average with its weights."""

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Take in the weights of ``network``, of the same architecture and on the same device."""
        averages, weights = _state(self.network), _state(network)
        # Counters, such as that of the batches that a norm has seen, are no averages.
        averaged = [self.started and average.is_floating_point() for average in averages]
        if any(averaged):
            torch._foreach_lerp_(
                list(compress(averages, averaged)),
                list(compress(weights, averaged)),
                1 - self.decay,
            )
        copied = [not is_averaged for is_averaged in averaged]
        if any(copied):
            torch._foreach_copy_(list(compress(averages, copied)), list(compress(weights, copied)))
        self.started = True


def _state(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]
