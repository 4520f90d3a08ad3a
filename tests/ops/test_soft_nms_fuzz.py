"""soft_nms: 1,000 images for each backend and method, step by step in numpy.

With the gaussian method the order of scores that are as close as rounding is open. Therefore the
kernel's selection is followed, and each of its steps has to be right.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.ops.candidates import BACKENDS, fuzzed_candidates, kernel

CALLS, IMAGES = 50, 20
# of gaussian scores: a few roundings for each of up to 70 selections
TOLERANCE = 1e-5


def iou(a: np.ndarray, b: np.ndarray) -> Any:
    """Of float32 boxes, each operation rounded."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = a, b
    width, height = min(ax1, bx1) - max(ax0, bx0), min(ay1, by1) - max(ay0, by0)
    zero = np.float32(0)
    intersection = (width if width > 0 else zero) * (height if height > 0 else zero)
    areas = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0)
    return intersection / (areas - intersection)


def follow(
    boxes: np.ndarray,
    scores: np.ndarray,
    groups: list[int] | None,
    iou_threshold: float,
    sigma: float,
    score_threshold: float,
    gaussian: bool,
    limit: int,
    selected: list[int],
    decayed: np.ndarray,
) -> int:
    """Assert that each step of ``selected`` is right. Returns how many decays there were."""
    tolerance = TOLERANCE if gaussian else 0
    threshold = np.float32(score_threshold)
    left = {i: s.astype(np.float64 if gaussian else np.float32) for i, s in enumerate(scores)}
    left = {i: s for i, s in left.items() if s > threshold}
    decays = 0
    for i, score in zip(selected, decayed, strict=True):
        best = max(left.values())
        assert left[i] >= best * (1 - tolerance)
        assert left[i] == score or abs(left[i] - score) <= tolerance * score
        if not gaussian:
            assert i == min(j for j in left if left[j] == best)
        del left[i]
        for j in list(left):
            if groups is not None and groups[i] != groups[j]:
                continue
            overlap = iou(boxes[i], boxes[j])
            if gaussian and overlap > 0:
                left[j] *= np.exp(-(np.float64(overlap) ** 2) / sigma)
            elif not gaussian and overlap > np.float32(iou_threshold):
                left[j] = left[j] * (np.float32(1) - overlap)
            else:
                continue
            decays += 1
            if not left[j] > threshold * (1 - tolerance):
                del left[j]
    assert len(selected) == limit or all(s <= threshold * (1 + tolerance) for s in left.values())
    return decays


@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_fuzz(backend: str, gaussian: bool) -> None:
    op = kernel("soft_nms", backend, seed=7 + gaussian)
    decays = 0
    for seed in range(CALLS):
        rng = np.random.default_rng(seed)
        boxes, scores, labels = fuzzed_candidates(rng, IMAGES)
        scores = torch.where(scores.isfinite(), scores.abs(), scores).float()
        groups = labels if rng.random() < 0.6 else None
        numbers = (
            float(rng.choice([0, 0.25, 1 / 3, 0.4, 0.5, 0.6, 1])),
            float(rng.choice([0.1, 0.5, 2.0])),
            float(rng.choice([0, 0.001, 0.1, 0.2])),
        )
        limit = int(rng.integers(1, scores.shape[1] + 6))
        keep, kept, counts = op(boxes, scores, groups, *numbers, gaussian, limit)
        assert keep.shape == kept.shape == (IMAGES, limit)
        for n in range(IMAGES):
            count = int(counts[n])
            assert keep[n, count:].eq(-1).all() and kept[n, count:].eq(0).all()
            with np.errstate(all="ignore"):
                decays += follow(
                    boxes[n].numpy(),
                    scores[n].numpy(),
                    None if groups is None else groups[n].tolist(),
                    *numbers,
                    gaussian,
                    limit,
                    keep[n, :count].tolist(),
                    kept[n, :count].numpy(),
                )
    assert decays > 500
