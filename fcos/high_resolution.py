"""The feature pyramid of networks that keep a high resolution throughout: HRNet's HRFPN.

Sun et al., "High-Resolution Representations for Labeling Pixels and Regions",
https://arxiv.org/abs/1904.04514, section 3; for one-stage detectors mmdetection halves its levels,
so that the first has stride 8.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .trunk import Trunk


class HighResolutionBackbone(nn.Module):
    """A trunk whose branches all end in feature maps, of stride 4 and on, and the pyramid."""

    def __init__(self, trunk: Trunk, channels: int, levels: int) -> None:
        super().__init__()
        self.body = trunk.body
        self.fpn = HighResolutionPyramid(sum(trunk.channels), channels, levels)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """
        Args:
            images (Tensor[N, 3, H, W]): H and W multiples of 32.
        """
        levels = self.fpn(self.body(images))
        return {f"p{3 + i}": level for i, level in enumerate(levels)}


class HighResolutionPyramid(nn.Module):
    """HRFPN: all branches enlarged to the first, joined, and averaged to the levels.

    Args:
        inputs: channels of all branches together.
        channels: of the levels.
        levels: how many there are.
    """

    def __init__(self, inputs: int, channels: int, levels: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(inputs, channels, 1)
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, stride=2, padding=1) for _ in range(levels)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, branches: list[Tensor]) -> list[Tensor]:
        """
        Args:
            branches (list[Tensor[N, C_b, H_b, W_b]]): the finest first, each half the one before.
        """
        height, width = branches[0].shape[-2:]
        enlarged = [
            F.interpolate(branch, size=(height, width), mode="bilinear", align_corners=False)
            for branch in branches[1:]
        ]
        features = self.reduction(torch.cat([branches[0], *enlarged], dim=1))
        levels = []
        for i, conv in enumerate(self.convs):
            # a picture may be smaller than what one mean is of
            window = min(2**i, height), min(2**i, width)
            levels.append(conv(F.avg_pool2d(features, window) if i else features))
        return levels
