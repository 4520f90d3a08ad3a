"""Where the locations of the feature levels lie in the image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def feature_sizes(image_size: tuple[int, int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """(height, width) of each feature level, for an image of (height, width) pixels."""
    height, width = image_size
    return [(-(-height // s), -(-width // s)) for s in strides]


def level_locations(
    size: tuple[int, int], stride: int, device: torch.device | str | None = None
) -> Tensor:
    """Image positions of one level: (floor(s/2) + x s, floor(s/2) + y s).

    Tian et al., "FCOS", https://arxiv.org/abs/1904.01355, section 3.1.

    Args:
        size: (height, width) of the feature map.
        stride: pixels between two locations.

    Returns:
        Tensor[H * W, 2]: (x, y) in pixels, float32, row by row.
    """
    height, width = size
    x = torch.arange(width, device=device, dtype=torch.float32) * stride + stride // 2
    y = torch.arange(height, device=device, dtype=torch.float32) * stride + stride // 2
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([grid_x, grid_y], dim=-1).reshape(-1, 2)
