"""The network: images to per-level predictions. It never sees targets.

Tian, Shen, Chen and He, "FCOS: Fully Convolutional One-Stage Object Detection",
https://arxiv.org/abs/1904.01355, with the improvements its authors published later.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .backbones import STAGES, build_backbone
from .config import ConfigError, ModelConfig

# exp(16) is 9 million pixels: beyond any box, and far from overflow.
_MAX_EXPONENT = 16.0


class Predictions(NamedTuple):
    """The network's outputs, one tensor a feature level, finest first."""

    logits: list[Tensor]
    """Tensor[N, C, H_l, W_l]: raw class scores."""
    ltrb: list[Tensor]
    """Tensor[N, 4, H_l, W_l]: distances from the location to the box's left, top, right and
    bottom side, >= 0, float32, in pixels or, with ``normalize_ltrb``, in strides."""
    centerness: list[Tensor]
    """Tensor[N, 1, H_l, W_l]: raw centerness."""


class FCOS(nn.Module):
    """Backbone, feature pyramid and the head that all levels share.

    Args:
        config: the architecture; ``num_classes`` must be set.
        pretrained_backbone: load ``config.backbone_weights``. False where a checkpoint follows.

    Raises:
        ConfigError: the settings contradict one another, or the weights cannot be had.
    """

    def __init__(self, config: ModelConfig, pretrained_backbone: bool = True) -> None:
        super().__init__()
        num_classes = _check(config)
        self.config = config
        self.backbone = build_backbone(config, pretrained_backbone)
        self.head = FCOSHead(config, num_classes)

    def forward(self, images: Tensor) -> Predictions:
        """
        Args:
            images (Tensor[N, 3, H, W]): normalised, zero padded, H and W multiples of 32.
        """
        return self.head(list(self.backbone(images).values()))


class FCOSHead(nn.Module):
    """Two towers of convolutions, and one convolution for each of the three outputs."""

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        super().__init__()
        channels = config.fpn_channels
        self.activation = config.activation
        self.centerness_on_cls = config.centerness_branch == "cls"
        self.cls_tower = _tower(channels, config.tower_convs)
        self.box_tower = _tower(channels, config.tower_convs)
        self.cls_logits = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.ltrb = nn.Conv2d(channels, 4, 3, padding=1)
        self.centerness = nn.Conv2d(channels, 1, 3, padding=1)
        levels = len(config.strides)
        self.scales = nn.Parameter(torch.ones(levels)) if config.trainable_scales else None

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # Every location starts as a confident background, or the many negatives would swamp the
        # first steps: Lin et al., https://arxiv.org/abs/1708.02002, section 3.3.
        prior = config.prior_probability
        nn.init.constant_(self.cls_logits.get_parameter("bias"), -math.log((1 - prior) / prior))

    def forward(self, features: list[Tensor]) -> Predictions:
        predictions = Predictions([], [], [])
        for level, feature in enumerate(features):
            cls, box = self.cls_tower(feature), self.box_tower(feature)
            # float32 under autocast too: bfloat16 cannot tell 200 pixels from 201
            distances = self.ltrb(box).float()
            if self.scales is not None:
                distances = distances * self.scales[level]
            if self.activation == "exp":
                distances = distances.clamp(max=_MAX_EXPONENT).exp()
            else:
                distances = distances.relu()
            predictions.logits.append(self.cls_logits(cls))
            predictions.ltrb.append(distances)
            predictions.centerness.append(self.centerness(cls if self.centerness_on_cls else box))
        return predictions


def _tower(channels: int, convs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(convs):
        layers += [
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(32, channels),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


def _check(config: ModelConfig) -> int:
    """Raises ConfigError for an impossible network. Returns the number of classes."""
    if config.num_classes is None or config.num_classes < 1:
        raise ConfigError(f"model.num_classes must be >= 1, got {config.num_classes}")
    levels = len(config.strides)
    if levels < 3 or config.strides != tuple(8 * 2**i for i in range(levels)):
        raise ConfigError(
            "model.strides must start with 8 16 32 and double with each further level, got "
            f"{config.strides}"
        )
    if len(config.size_ranges) != levels:
        raise ConfigError(
            f"model.size_ranges must have one range for each of the {levels} strides, got "
            f"{len(config.size_ranges)}"
        )
    # group norm has 32 groups, and a group of one channel has no spread on a 1 x 1 level
    if config.fpn_channels % 32 or config.fpn_channels < 64:
        raise ConfigError(
            f"model.fpn_channels must be a multiple of 32, and at least 64, "
            f"got {config.fpn_channels}"
        )
    if not 0 <= config.frozen_stages <= len(STAGES):
        raise ConfigError(f"model.frozen_stages must lie in 0..5, got {config.frozen_stages}")
    for level, (low, high) in enumerate(config.size_ranges):
        if not low <= high:
            raise ConfigError(
                f"model.size_ranges must be (low, high) with low <= high, got {(low, high)} at "
                f"level {level}"
            )
    if not 0 <= config.center_sampling_radius < math.inf:
        raise ConfigError(
            f"model.center_sampling_radius must be >= 0, got {config.center_sampling_radius}"
        )
    if config.tower_convs < 0:
        raise ConfigError(f"model.tower_convs must be >= 0, got {config.tower_convs}")
    if not 0 < config.prior_probability < 1:
        raise ConfigError(
            f"model.prior_probability must lie between 0 and 1, got {config.prior_probability}"
        )
    return config.num_classes
