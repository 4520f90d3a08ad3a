"""The network: images to per-level predictions. It never sees targets.

Tian, Shen, Chen and He, "FCOS: Fully Convolutional One-Stage Object Detection",
https://arxiv.org/abs/1904.01355, with the improvements its authors published later.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from .backbones import BOTTLENECKS, STAGES, build_backbone
from .config import ConfigError, ModelConfig
from .head import FCOSHead, Predictions

__all__ = ["FCOS", "Predictions"]


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
    for name in ("tower_convs", "shared_tower_convs"):
        if getattr(config, name) < 0:
            raise ConfigError(f"model.{name} must be >= 0, got {getattr(config, name)}")
    if config.tower_deformable and not config.tower_convs:
        raise ConfigError("model.tower_deformable needs model.tower_convs >= 1, got 0")
    if not 0 <= config.batch_norm_eps < 1:
        raise ConfigError(
            f"model.batch_norm_eps must be >= 0 and below 1, got {config.batch_norm_eps}"
        )
    usual: dict[str, object] = {}
    if config.backbone not in BOTTLENECKS:  # nothing to move or to deform
        usual |= {"stride_in": "3x3", "deformable_stages": ()}
    if config.backbone.startswith("hrnet"):  # whose pyramid has neither C5 nor such a grid
        usual |= {"p6_source": "p5", "locations": "half_stride"}
    for name, value in usual.items():
        if getattr(config, name) != value:
            raise ConfigError(
                f"model.{name} must be {value!r} for {config.backbone}, got "
                f"{getattr(config, name)!r}"
            )
    if not set(config.deformable_stages) <= {1, 2, 3, 4}:
        raise ConfigError(
            f"model.deformable_stages must lie in 1..4, got {config.deformable_stages}"
        )
    if config.deformable_interval < 1:
        raise ConfigError(
            f"model.deformable_interval must be >= 1, got {config.deformable_interval}"
        )
    if not 0 < config.prior_probability < 1:
        raise ConfigError(
            f"model.prior_probability must lie between 0 and 1, got {config.prior_probability}"
        )
    return config.num_classes
