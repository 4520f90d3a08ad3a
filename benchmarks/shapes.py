"""Sizes as they occur in FCOS, so that no benchmark makes up its own."""

from __future__ import annotations

import torch
from torch import Tensor

STRIDES = (8, 16, 32, 64, 128)
#: (height, width) of a padded COCO image with a shorter side of 800.
IMAGE_SIZE = (800, 1344)
NUM_CLASSES = 80
#: About seven objects an image, and ten to twenty locations for each.
POSITIVE_SHARE = 0.005
#: Class scores start near 0.01, and most stay there.
LOGITS_MEAN, LOGITS_STD = -4.6, 1.5


def num_locations(image_size: tuple[int, int] = IMAGE_SIZE) -> int:
    """Locations of all levels of one image: 22,400 at 800 x 1344."""
    height, width = image_size
    return sum(-(-height // stride) * -(-width // stride) for stride in STRIDES)


def make_labels(rows: int, num_classes: int, generator: torch.Generator) -> Tensor:
    """int64 [rows], background but for ``POSITIVE_SHARE``."""
    classes = torch.randint(num_classes, (rows,), generator=generator)
    positive = torch.rand(rows, generator=generator) < POSITIVE_SHARE
    return torch.where(positive, classes, -1)


def make_logits(rows: int, num_classes: int, generator: torch.Generator) -> Tensor:
    """float32 [rows, num_classes]."""
    noise = torch.randn(rows, num_classes, generator=generator)
    return noise * LOGITS_STD + LOGITS_MEAN
