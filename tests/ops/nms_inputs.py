"""Ordinary boxes, and what nms keeps of them, for the tests of its kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from fcos_ext import batched_nms_ref, nms_ref

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def make_inputs(
    n: int, num_groups: int | None = None, spread: float = 300.0, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Boxes of sides 10 to 60, the more overlap the smaller ``spread``; scores; groups."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=generator) * spread
    sides = torch.rand(n, 2, generator=generator) * 50 + 10
    boxes = torch.cat((corner, corner + sides), dim=1)
    scores = torch.rand(n, generator=generator)
    scores[torch.rand(n, generator=generator) < 0.03] = torch.nan
    groups = None
    if num_groups is not None:
        groups = torch.randint(-1, num_groups - 1, (n,), generator=generator).to(device)
    return boxes.to(device), scores.to(device), groups


def expected(
    boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_threshold: float, limit: int = -1
) -> Tensor:
    max_detections = None if limit < 0 else limit
    if groups is None:
        return nms_ref(boxes, scores, iou_threshold, max_detections=max_detections)
    return batched_nms_ref(boxes, scores, groups, iou_threshold, max_detections=max_detections)
