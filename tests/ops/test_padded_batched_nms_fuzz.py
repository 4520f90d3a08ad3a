"""padded_batched_nms: 10,000 images for each backend, against one box after the other in numpy."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import Tensor

from fcos_ext import padded_batched_nms_ref
from tests.ops.candidates import BACKENDS, Candidates, fuzzed_candidates, kernel

CALLS, IMAGES, PARTS = 500, 20, 5
THRESHOLDS = [0, 0.25, 1 / 3, 0.4, 0.5, 0.6, 2 / 3, 0.8, 1]


def iou(a: np.ndarray, b: np.ndarray) -> np.float32:
    """Of float32 scalars: numpy rounds each operation on them to float32."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = a, b
    width, height = min(ax1, bx1) - max(ax0, bx0), min(ay1, by1) - max(ay0, by0)
    zero = np.float32(0)
    intersection = (width if width > 0 else zero) * (height if height > 0 else zero)
    areas = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0)
    return np.float32(intersection / (areas - intersection))


def greedy(
    boxes: np.ndarray,
    scores: list[float],
    labels: list[int],
    iou_threshold: float,
    max_detections: int,
    class_agnostic: bool,
) -> list[int]:
    threshold = np.float32(iou_threshold)
    order = [i for i in range(len(scores)) if labels[i] >= 0 and scores[i] > -np.inf]
    order.sort(key=lambda i: (-scores[i], i))
    kept: list[int] = []
    for i in order:
        rivals = [j for j in kept if class_agnostic or labels[i] == labels[j]]
        if not any(iou(boxes[j], boxes[i]) > threshold for j in rivals):
            kept.append(i)
        if len(kept) == max_detections:
            break
    return kept


@functools.cache
def case(seed: int) -> tuple[Candidates, float, int, bool, Tensor]:
    """Inputs of a call, and what it must keep."""
    rng = np.random.default_rng(seed)
    boxes, scores, labels = fuzzed_candidates(rng, IMAGES)
    iou_threshold = float(rng.choice(THRESHOLDS))
    max_detections = int(rng.integers(1, scores.shape[1] + 6))
    class_agnostic = bool(rng.random() < 0.3)
    keep = torch.full((IMAGES, max_detections), -1)
    with np.errstate(all="ignore"):
        for image in range(IMAGES):
            kept = greedy(
                boxes[image].numpy(),
                scores[image].tolist(),
                labels[image].tolist(),
                iou_threshold,
                max_detections,
                class_agnostic,
            )
            keep[image, : len(kept)] = torch.tensor(kept, dtype=torch.int64)
    return (boxes, scores, labels), iou_threshold, max_detections, class_agnostic, keep


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("backend", BACKENDS)
def test_fuzz(backend: str, part: int) -> None:
    op = kernel("padded_batched_nms", backend, seed=part)
    for seed in range(part, CALLS, PARTS):
        candidates, iou_threshold, max_detections, class_agnostic, expected = case(seed)
        keep, counts = op(*candidates, iou_threshold, max_detections, class_agnostic)
        assert torch.equal(keep, expected), seed
        assert torch.equal(counts, (expected >= 0).sum(dim=1)), seed


def test_fuzz_reference() -> None:
    """The reference too; and the cases reach what they are made to reach."""
    at_threshold = full = 0
    for seed in range(0, CALLS, 4):
        candidates, iou_threshold, max_detections, class_agnostic, expected = case(seed)
        for less in (0, 1e-6):
            keep, _ = padded_batched_nms_ref(
                *candidates,
                max(0, iou_threshold - less),
                max_detections,
                class_agnostic=class_agnostic,
            )
            if less:
                at_threshold += not torch.equal(keep, expected)
            else:
                assert torch.equal(keep, expected), seed
        full += int((expected[:, -1] >= 0).sum())
    assert at_threshold > 10 and full > 200
