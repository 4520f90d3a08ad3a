"""The head that all levels of the pyramid share."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .config import ModelConfig
from .deformable import DeformableConv2d

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


class FCOSHead(nn.Module):
    """Two towers of convolutions, and one convolution for each of the three outputs."""

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        super().__init__()
        channels = config.fpn_channels
        self.activation = config.activation
        self.centerness_on_cls = config.centerness_branch == "cls"
        # an empty one is left out, so that modules and names are those of a head without it
        shared = config.shared_tower_convs
        self.shared_tower = Tower(config, shared, deformable=False) if shared else None
        self.cls_tower = Tower(config, config.tower_convs, config.tower_deformable)
        self.box_tower = Tower(config, config.tower_convs, config.tower_deformable)
        self.cls_logits = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.ltrb = nn.Conv2d(channels, 4, 3, padding=1)
        self.centerness = nn.Conv2d(channels, 1, 3, padding=1)
        levels = len(config.strides)
        self.scales = nn.Parameter(torch.ones(levels)) if config.trainable_scales else None

        for module in self.modules():
            if isinstance(module, nn.Conv2d | DeformableConv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, DeformableConv2d):
                module.reset_offset()
        # Every location starts as a confident background, or the many negatives would swamp the
        # first steps: Lin et al., https://arxiv.org/abs/1708.02002, section 3.3.
        prior = config.prior_probability
        nn.init.constant_(self.cls_logits.get_parameter("bias"), -math.log((1 - prior) / prior))

    def forward(self, features: list[Tensor]) -> Predictions:
        predictions = Predictions([], [], [])
        for level, feature in enumerate(features):
            if self.shared_tower is not None:
                feature = self.shared_tower(feature, level)
            cls, box = self.cls_tower(feature, level), self.box_tower(feature, level)
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


class Tower(nn.Sequential):
    """3x3 convolutions, each with its norm and a ReLU."""

    def __init__(self, config: ModelConfig, convs: int, deformable: bool) -> None:
        channels, levels = config.fpn_channels, len(config.strides)
        layers: list[nn.Module] = []
        for i in range(convs):
            if deformable and i == convs - 1:
                layers.append(DeformableConv2d(channels, channels, bias=config.tower_bias))
            else:
                layers.append(nn.Conv2d(channels, channels, 3, padding=1, bias=config.tower_bias))
            if config.tower_norm == "group":
                layers.append(nn.GroupNorm(32, channels))
            elif config.tower_norm == "batch":
                layers.append(nn.BatchNorm2d(channels))
            elif config.tower_norm == "level_batch":
                layers.append(LevelNorm(nn.BatchNorm2d(channels) for _ in range(levels)))
            layers.append(nn.ReLU())
        super().__init__(*layers)

    def forward(self, feature: Tensor, level: int = 0) -> Tensor:
        """
        Args:
            feature (Tensor[N, C, H_l, W_l]): of one level of the pyramid.
            level: which one; for norms that differ between levels.
        """
        for layer in self:
            feature = layer[level](feature) if isinstance(layer, LevelNorm) else layer(feature)
        return feature


class LevelNorm(nn.ModuleList):
    """A norm for each level of the pyramid."""
