"""torchvision's post-processing of dense one-stage detectors, by one operator for the batch."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...postprocess import postprocess
from ...postprocess_arguments import Levels
from ...postprocess_options import MAX_LEVELS, PostprocessOptions


def options_of(model: Any, head_outputs: dict[str, list[Tensor]]) -> PostprocessOptions | None:
    """How an FCOS or RetinaNet detects; None if that is not what :func:`detect` does.

    Which is the case for float64, whose boxes would be rounded, and for thresholds and numbers
    that let everything pass or nothing.
    """
    levels = len(head_outputs["cls_logits"])
    if any(x.dtype == torch.float64 for of_levels in head_outputs.values() for x in of_levels):
        return None
    if not (levels <= MAX_LEVELS and model.topk_candidates >= 1 and model.detections_per_img >= 1):
        return None
    if not (0 <= model.score_thresh <= 1 and 0 <= model.nms_thresh <= 1):
        return None
    coder = model.box_coder
    decoding: dict[str, Any] = {"normalize_ltrb": getattr(coder, "normalize_by_size", True)}
    if "bbox_ctrness" not in head_outputs:
        decoding = {
            "coding": "deltas",
            "delta_weights": tuple(coder.weights),
            "delta_limit": coder.bbox_xform_clip,
            "score": "product",
        }
    return PostprocessOptions(
        strides=(1,) * levels,  # the anchors tell
        score_threshold=model.score_thresh,
        threshold_on="final",
        topk_candidates=model.topk_candidates,
        iou_threshold=as_compared(model.nms_thresh, head_outputs["cls_logits"][0].device),
        max_detections=model.detections_per_img,
        overlaps="torchvision",
        keep_empty=True,
        **decoding,
    )


def detect(
    head_outputs: dict[str, list[Tensor]],
    anchors: Sequence[Tensor],
    image_shapes: Sequence[tuple[int, int]],
    options: PostprocessOptions,
) -> list[dict[str, Tensor]]:
    """Boxes, scores and labels of each image, best first.

    They are those of torchvision, but for this: scores are rounded once, where torchvision's may
    be off in the last bits, so that candidates whose scores are nearly equal may change places;
    deltas are decoded to the last bit or two of theirs; of equal scores, the order of which
    torchvision leaves open, the first level, location and class comes first; half precision is
    computed in float32, and rounded at the end; and boxes that are not finite are left out.

    Args:
        head_outputs: "cls_logits", "bbox_regression" and, of an FCOS, "bbox_ctrness": levels of
            Tensor[N, A, channels].
        anchors (levels of Tensor[A, 4]): the same for all images.
        image_shapes: (height, width) of each image, to which boxes are clipped.
        options: see :func:`options_of`.
    """
    logits, regression = head_outputs["cls_logits"], head_outputs["bbox_regression"]
    centerness = head_outputs.get("bbox_ctrness")
    found = postprocess(
        (
            _as_maps(logits),
            _as_maps(regression),
            None if centerness is None else _as_maps(centerness),
        ),
        _on(logits[0].device, image_shapes),
        options,
        anchors=anchors,
    )
    score_dtype = logits[0].dtype
    if centerness is not None:
        score_dtype = torch.promote_types(score_dtype, centerness[0].dtype)
    boxes, scores = found.boxes.to(regression[0].dtype), found.scores.to(score_dtype)
    # The one time that the host waits for the device.
    return [
        {"boxes": boxes[i, :n], "scores": scores[i, :n], "labels": found.labels[i, :n]}
        for i, n in enumerate(found.counts.tolist())
    ]


def _as_maps(levels: Levels) -> list[Tensor]:
    """Views [N, channels, 1, A] of [N, A, channels]."""
    return [level.transpose(1, 2).unsqueeze(2) for level in levels]


def _on(device: torch.device, image_shapes: Sequence[tuple[int, int]]) -> Tensor:
    """int64 [N, 2] on the device, without waiting for it."""
    sizes = torch.tensor([list(shape) for shape in image_shapes], dtype=torch.int64).view(-1, 2)
    if device.type == "cpu":
        return sizes
    return sizes.pin_memory().to(device, non_blocking=True)


def as_compared(threshold: float, device: torch.device) -> float:
    """What float32 overlaps are to be above for torchvision's decision.

    On a CPU it compares with the float64 threshold, and the float32 next to that may be above it.
    """
    if device.type != "cpu":
        return threshold
    (nearest,) = struct.unpack("f", struct.pack("f", threshold))
    if nearest > threshold:  # the bits of the float32 before it
        (bits,) = struct.unpack("I", struct.pack("f", nearest))
        (nearest,) = struct.unpack("f", struct.pack("I", bits - 1))
    return float(nearest)
