"""padded_batched_nms: what it refuses, in Python and in the kernels."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from fcos_ext import padded_batched_nms, padded_batched_nms_ref
from tests.ops.candidates import BACKENDS, NO_GPU, kernel, make_candidates

NAME = "padded_batched_nms"


@pytest.mark.parametrize("function", [padded_batched_nms, padded_batched_nms_ref])
def test_errors(function: Any) -> None:
    boxes, scores, labels = make_candidates(2, 3)
    good: dict[str, Any] = {"boxes": boxes, "scores": scores, "labels": labels}
    good |= {"iou_threshold": 0.5, "max_detections": 5}
    function(**good)
    cases: list[tuple[dict[str, Any], Any, str]] = [
        ({"boxes": boxes.long()}, TypeError, "boxes must be floating point, got torch.int"),
        ({"scores": labels}, TypeError, "scores must be floating point, got torch"),
        ({"labels": scores}, TypeError, "labels must be integers, got torch.f"),
        ({"labels": labels > 0}, TypeError, "labels must be integers, got torch.bool"),
        ({"boxes": boxes[..., :3]}, ValueError, r"boxes must have shape \[N, K, 4\], got"),
        ({"boxes": boxes[0]}, ValueError, r"boxes must have shape \[N, K, 4\], got \[3, 4\]"),
        ({"scores": scores[:, :2]}, ValueError, r"scores must .*3\], got .*2\]"),
        ({"labels": labels[:1]}, ValueError, r"labels must .*3\], got .*3\]"),
        ({"scores": scores.to("meta")}, ValueError, "scores .* cpu, got meta"),
        ({"iou_threshold": 1.5}, ValueError, r"iou_threshold must be in \[0, 1\], got 1.5"),
        (
            {"iou_threshold": float("nan")},
            ValueError,
            r"iou_threshold must be in \[0, 1\], got nan",
        ),
        ({"max_detections": 0}, ValueError, "max_detections must be at least 1, got 0"),
    ]
    for changes, error, message in cases:
        with pytest.raises(error, match=f"^{NAME}: {message}"):
            function(**{**good, **changes})


BOXES, SCORES, LABELS = torch.zeros(2, 3, 4), torch.zeros(2, 3), torch.zeros(2, 3).long()


@pytest.mark.parametrize(
    "boxes, scores, labels, max_detections, message",
    [
        (BOXES[0], SCORES, LABELS, 5, r"boxes must be \[N, K, 4\]"),
        (BOXES[..., :3], SCORES, LABELS, 5, r"boxes must be \[N, K, 4\]"),
        (BOXES.double(), SCORES, LABELS, 5, "boxes must be Float, got Double"),
        (BOXES, SCORES[:, :2], LABELS, 5, "scores must have the shape of boxes without"),
        (BOXES, SCORES, LABELS[:1], 5, "labels must have the shape of boxes without"),
        (BOXES, SCORES.half(), LABELS, 5, "scores must be Float or Double, got Half"),
        (BOXES, SCORES, LABELS.short(), 5, "labels must be int64 or int32, got Short"),
        (BOXES, SCORES, LABELS, 0, "max_detections must be at least 1, got 0"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_kernel_errors(
    backend: str, boxes: Tensor, scores: Tensor, labels: Tensor, max_detections: int, message: str
) -> None:
    with pytest.raises(RuntimeError, match=f"{NAME}: {message}"):
        kernel(NAME, backend)(boxes, scores, labels, 0.5, max_detections, False)


@NO_GPU
def test_kernel_errors_of_devices() -> None:
    with pytest.raises(RuntimeError, match="boxes and scores must be on the same device"):
        torch.ops.fcos_ext.padded_batched_nms(BOXES.cuda(), SCORES, LABELS, 0.5, 5, False)


def test_reference_has_the_same_signature() -> None:
    assert inspect.signature(padded_batched_nms) == inspect.signature(padded_batched_nms_ref)
