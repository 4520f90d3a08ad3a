"""The optimiser and its learning rate."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .config import TrainConfig


def build_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD or AdamW over the trainable parameters.

    Weight decay pulls on the weights of convolutions. A norm's scale, a bias or a level's factor
    has a meaningful size, and is left alone.
    """
    trainable = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
    ]
    rate: float | Tensor = config.learning_rate
    if config.graph:  # which would keep a number as it is
        rate = torch.tensor(rate, device=trainable[0].device)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=rate, fused=True, capturable=config.graph)
    return torch.optim.SGD(groups, lr=rate, momentum=config.momentum, fused=True)


def learning_rate(iteration: int, config: TrainConfig) -> float:
    """Learning rate of a step, counted from 0: a function of the settings alone."""
    rate = config.learning_rate
    if config.schedule == "step":
        reached = sum(iteration >= m * config.iterations for m in config.milestones)
        rate *= 0.1**reached
    else:
        rate *= 0.5 * (1 + math.cos(math.pi * iteration / config.iterations))
    if iteration < config.warmup_iterations:
        progress = iteration / config.warmup_iterations if config.warmup == "linear" else 0.0
        rate *= config.warmup_factor + (1 - config.warmup_factor) * progress
    return rate


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set it for the next step, without waiting for the device that a tensor of it is on."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
