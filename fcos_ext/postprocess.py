"""From the outputs of a dense detector's head to detections, in fixed shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._library import kernels, register_constant
from .postprocess_arguments import Levels, Predictions, check, grids_of, max_apart
from .postprocess_options import PostprocessOptions
from .postprocess_reference import Postprocessed, postprocess_ref

__all__ = ["Levels", "Postprocessed", "Predictions", "postprocess", "postprocess_ref"]

_DEVICES = kernels("postprocess")
_SIZE_DTYPES = (torch.int64, torch.int32, torch.float32, torch.float64)


def postprocess(
    predictions: Predictions,
    image_sizes: Tensor,
    options: PostprocessOptions | None = None,
    *,
    anchors: Levels | None = None,
    original_sizes: Tensor | None = None,
    padded_size: tuple[int, int] | None = None,
) -> Postprocessed:
    """Score, select, decode, clip, suppress, and scale back to the original images.

    All levels and images in a few launches, in shapes that the arguments fix; nothing waits for the
    device. Levels may be contiguous or channels_last, with any stride between images, as a level of
    a longer tensor has it; nothing of the size of the logits is made.

    The sigmoids are rounded to float32 from float64, and all else is float32, so that CPU and CUDA
    kernels agree to the bit. Candidates of equal score are in the order of level, location and
    class; with ``topk_by="class"`` of level, class score, location and class. Not differentiable:
    the results never require a gradient.

    Args:
        predictions: logits (Tensor[N, C, H_l, W_l]), distances to left, top, right and bottom side,
            or deltas (Tensor[N, 4, H_l, W_l]), and raw centerness (Tensor[N, 1, H_l, W_l]) of each
            level, of any floating dtype; the three need not have the same one. Centerness may be
            None: class scores are all there is.
        image_sizes (Tensor[N, 2]): (height, width) of the images as the network saw them, without
            their padding.
        options: how; None: the defaults.
        anchors (Tensor[H_l W_l, 4] of each level, optional): boxes x0, y0, x1, y1 in pixels, of any
            floating dtype, in place of strides: their centres are the locations. Several anchors
            at a place are that many locations beside each other.
        original_sizes (Tensor[N, 2], optional): (height, width) that the boxes are scaled to.
        padded_size: (height, width) of the images with their padding, from which
            ``locations="torchvision"`` takes the steps between locations; without it they are the
            strides.

    Returns:
        Postprocessed: boxes, scores, labels, counts and dropped.

    Raises:
        TypeError: a tensor has no dtype that is allowed, or levels have different ones.
        ValueError: shapes or devices do not agree, or an option is out of its range.
    """
    options = PostprocessOptions() if options is None else options
    if predictions[0] and predictions[0][0].device.type not in _DEVICES:
        return postprocess_ref(
            predictions,
            image_sizes,
            options,
            anchors=anchors,
            original_sizes=original_sizes,
            padded_size=padded_size,
        )
    arguments = operator_arguments(
        predictions,
        image_sizes,
        options,
        anchors=anchors,
        original_sizes=original_sizes,
        padded_size=padded_size,
    )
    return Postprocessed(*torch.ops.fcos_ext.postprocess(*arguments))


def operator_arguments(
    predictions: Predictions,
    image_sizes: Tensor,
    options: PostprocessOptions,
    *,
    anchors: Levels | None = None,
    original_sizes: Tensor | None = None,
    padded_size: tuple[int, int] | None = None,
) -> tuple[Any, ...]:
    """Checks the arguments of :func:`postprocess`. Returns those of the compiled operator."""
    check(predictions, image_sizes, options, anchors, original_sizes, padded_size)
    grids = grids_of(predictions, options, padded_size)
    return (
        *([] if levels is None else list(levels) for levels in (*predictions, anchors)),
        _as_sizes(image_sizes),
        None if original_sizes is None else _as_sizes(original_sizes),
        [float(x) for grid in grids for x in (*grid.step, *grid.first, grid.unit)],
        [*options.delta_weights, options.delta_limit] if options.coding == "deltas" else [],
        options.score_threshold,
        options.iou_threshold,
        options.topk_candidates,
        options.max_detections,
        max_apart(options, image_sizes.device),
        options.score == "sqrt",
        options.threshold_on == "final",
        options.topk_by == "class",
        options.class_agnostic,
        options.clip,
        not options.normalize_ltrb,
        options.keep_empty,
        options.corners == "pixels",
        options.overlaps == "edges",
    )


def _as_sizes(sizes: Tensor) -> Tensor:
    return sizes if sizes.dtype in _SIZE_DTYPES else sizes.float()


def _fake(
    logits: list[Tensor],
    regression: list[Tensor],
    centerness: list[Tensor],
    anchors: list[Tensor],
    image_sizes: Tensor,
    original_sizes: Tensor | None,
    grids: list[float],
    deltas: list[float],
    score_threshold: float,
    iou_threshold: float,
    topk_candidates: int,
    max_detections: int,
    max_apart: int,
    *flags: bool,
) -> tuple[Tensor, ...]:
    like, num_images = logits[0], logits[0].shape[0]
    return (
        like.new_empty((num_images, max_detections, 4), dtype=torch.float32),
        like.new_empty((num_images, max_detections), dtype=torch.float32),
        like.new_empty((num_images, max_detections), dtype=torch.int64),
        like.new_empty((num_images,), dtype=torch.int64),
        like.new_empty((num_images,), dtype=torch.int64),
    )


register_constant("postprocess", fake=_fake)
