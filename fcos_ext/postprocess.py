"""From the outputs of a dense detector's head to detections, in fixed shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._library import kernels, register_constant
from .padded_batched_nms import padded_batched_nms_ref
from .postprocess_options import PostprocessOptions

_DEVICES = kernels("postprocess")
_SIZE_DTYPES = (torch.int64, torch.int32, torch.float32, torch.float64)

Levels = Sequence[Tensor]


class Postprocessed(NamedTuple):
    """Detections of N images, at most D each, best first. Rows from ``counts`` on are padding."""

    boxes: Tensor
    """float32 [N, D, 4]: x0, y0, x1, y1 in pixels; 0 in the padding."""
    scores: Tensor
    """float32 [N, D]: final scores, descending; 0 in the padding."""
    labels: Tensor
    """int64 [N, D]: 0..C-1; -1 in the padding."""
    counts: Tensor
    """int64 [N]: detections of each image."""
    dropped: Tensor
    """int64 [N]: candidates left out because their score is not a number (as those of a location
    that its centerness does not rule out), or their box not finite. 0 unless something is wrong."""


def postprocess(
    predictions: tuple[Levels, Levels, Levels],
    image_sizes: Tensor,
    options: PostprocessOptions | None = None,
    *,
    original_sizes: Tensor | None = None,
    padded_size: tuple[int, int] | None = None,
) -> Postprocessed:
    """Score, select, decode, clip, suppress, and scale back to the original images.

    All levels and images in a few launches, in shapes that the arguments fix; nothing waits for the
    device. Levels may be contiguous or channels_last; nothing of the size of the logits is made.

    The sigmoids are rounded to float32 from float64, and all else is float32, so that CPU and CUDA
    kernels agree to the bit. Candidates of equal score are in the order of level, location and
    class. Not differentiable: the results never require a gradient.

    Args:
        predictions: logits (Tensor[N, C, H_l, W_l]), distances to left, top, right and bottom side
            (Tensor[N, 4, H_l, W_l]) and raw centerness (Tensor[N, 1, H_l, W_l]) of each level, of
            any floating dtype; the three need not have the same one.
        image_sizes (Tensor[N, 2]): (height, width) of the images as the network saw them, without
            their padding.
        options: how; None: the defaults.
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
            original_sizes=original_sizes,
            padded_size=padded_size,
        )
    arguments = operator_arguments(
        predictions, image_sizes, options, original_sizes=original_sizes, padded_size=padded_size
    )
    return Postprocessed(*torch.ops.fcos_ext.postprocess(*arguments))


def operator_arguments(
    predictions: tuple[Levels, Levels, Levels],
    image_sizes: Tensor,
    options: PostprocessOptions,
    *,
    original_sizes: Tensor | None = None,
    padded_size: tuple[int, int] | None = None,
) -> tuple[Any, ...]:
    """Checks the arguments of :func:`postprocess`. Returns those of the compiled operator."""
    geometry = _check(predictions, image_sizes, options, original_sizes, padded_size)
    return (
        *(list(levels) for levels in predictions),
        _as_sizes(image_sizes),
        None if original_sizes is None else _as_sizes(original_sizes),
        [number for level in geometry for number in level],
        options.score_threshold,
        options.iou_threshold,
        options.topk_candidates,
        options.max_detections,
        options.score == "sqrt",
        options.threshold_on == "final",
        options.class_agnostic,
        options.clip,
        options.keep_empty,
    )


@torch.no_grad()
def postprocess_ref(
    predictions: tuple[Levels, Levels, Levels],
    image_sizes: Tensor,
    options: PostprocessOptions | None = None,
    *,
    original_sizes: Tensor | None = None,
    padded_size: tuple[int, int] | None = None,
) -> Postprocessed:
    """Same contract as :func:`postprocess`, in plain PyTorch."""
    options = PostprocessOptions() if options is None else options
    geometry = _check(predictions, image_sizes, options, original_sizes, padded_size)
    selected = [_select(*level, options) for level in zip(*predictions, geometry, strict=True)]
    boxes, scores, labels = (torch.cat([level[i] for level in selected], dim=1) for i in range(3))
    dropped = torch.stack([level[3] for level in selected]).sum(dim=0)

    finite = boxes.isfinite().all(dim=-1)  # asked before clipping makes infinity a number
    dropped = dropped + ((labels >= 0) & ~finite).sum(dim=1)
    if options.clip:
        limit = image_sizes.to(boxes).flip(-1).repeat(1, 2).unsqueeze(1)  # [N, 1, (w, h, w, h)]
        boxes = torch.minimum(boxes.clamp(min=0), limit)
    if not options.keep_empty:
        finite &= (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])
    labels = torch.where(finite, labels, -1)

    keep, counts = padded_batched_nms_ref(
        boxes,
        scores,
        labels,
        options.iou_threshold,
        options.max_detections,
        class_agnostic=options.class_agnostic,
    )
    index, padding = keep.clamp(min=0), keep < 0
    boxes = boxes.gather(1, index.unsqueeze(-1).expand(-1, -1, 4))
    if original_sizes is not None:
        scale = original_sizes.to(boxes) / image_sizes.to(boxes)
        boxes = boxes * scale.flip(-1).repeat(1, 2).unsqueeze(1)
    return Postprocessed(
        boxes.masked_fill(padding.unsqueeze(-1), 0),
        _final(scores.gather(1, index), options).masked_fill(padding, 0),
        labels.gather(1, index).masked_fill(padding, -1),
        counts,
        dropped,
    )


def _select(
    logits: Tensor,
    ltrb: Tensor,
    centerness: Tensor,
    geometry: tuple[float, ...],
    options: PostprocessOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Best candidates of one level: boxes [N, K, 4], products of scores [N, K], labels [N, K] or
    -1; and how many were left out because their score is not a number [N]."""
    step_y, step_x, first_y, first_x, unit = geometry
    num_classes, height, width = logits.shape[1:]
    cls, weight = _sigmoid(logits), _sigmoid(centerness)
    product = cls * weight
    if options.threshold_on == "class":
        passes = ~(cls <= options.score_threshold)
    else:
        passes = ~(_final(product, options) <= options.score_threshold)
        passes &= ~(_final(weight, options) <= options.score_threshold)
    dropped = (passes & product.isnan()).flatten(1).sum(dim=1)

    # Score and index in one number, of equal scores the lower index: topk itself promises no order
    # among equals. The bits of floats that are not negative are in their order.
    product = torch.where(passes & (product > 0), product, 0.0).permute(0, 2, 3, 1).flatten(1)
    flat = torch.arange(product.shape[1], device=product.device)  # location, then class
    ranks = product.contiguous().view(torch.int32).long() << 32 | (0xFFFFFFFF - flat)
    best = ranks.topk(min(options.topk_candidates, product.shape[1]), dim=1).values
    scores = (best >> 32).int().view(torch.float32)
    flat = 0xFFFFFFFF - (best & 0xFFFFFFFF)
    location, labels = flat // num_classes, flat % num_classes

    distances = ltrb.float().flatten(2).transpose(1, 2)
    distances = distances.gather(1, location.unsqueeze(-1).expand(-1, -1, 4)) * unit
    x = (location % width).float() * step_x + first_x
    y = (location // width).float() * step_y + first_y
    center = torch.stack((x, y), dim=-1)
    boxes = torch.cat((center - distances[..., :2], center + distances[..., 2:]), dim=-1)
    return boxes, scores, torch.where(scores > 0, labels, -1), dropped


def _sigmoid(x: Tensor) -> Tensor:
    """float32, the nearest to the exact one: float64 is rounded to it."""
    wide = torch.float32 if x.device.type == "mps" else torch.float64  # which mps does not have
    return x.to(wide).sigmoid().float()


def _final(product: Tensor, options: PostprocessOptions) -> Tensor:
    if options.score == "product":
        return product
    # PyTorch's float32 root is not correctly rounded on every CPU; that of float64 rounds to the
    # float32 nearest to the exact one.
    wide = torch.float32 if product.device.type == "mps" else torch.float64
    return product.to(wide).sqrt().float()


def _as_sizes(sizes: Tensor) -> Tensor:
    return sizes if sizes.dtype in _SIZE_DTYPES else sizes.float()


def _geometry(
    predictions: tuple[Levels, Levels, Levels],
    options: PostprocessOptions,
    padded_size: tuple[int, int] | None,
) -> list[tuple[float, ...]]:
    """(step_y, step_x, first_y, first_x, unit of the distances) of each level, in pixels."""
    result: list[tuple[float, ...]] = []
    for stride, level in zip(options.strides, predictions[0], strict=True):
        unit = float(stride) if options.normalize_ltrb else 1.0
        if options.locations == "half_stride":
            first, steps = float(stride // 2), (stride, stride)
        else:
            height, width = level.shape[2:]
            first, steps = 0.0, (stride, stride)
            if padded_size is not None:
                steps = (padded_size[0] // height, padded_size[1] // width)
        result.append((float(steps[0]), float(steps[1]), first, first, unit))
    return result


def _check(
    predictions: tuple[Levels, Levels, Levels],
    image_sizes: Tensor,
    options: PostprocessOptions,
    original_sizes: Tensor | None,
    padded_size: tuple[int, int] | None,
) -> list[tuple[float, ...]]:
    """Returns the geometry of the levels."""
    if len(predictions) != 3:
        raise ValueError(
            "postprocess: predictions must be logits, ltrb and centerness, "
            f"got {len(predictions)} sequences"
        )
    levels = len(options.strides)
    names = ("logits", "ltrb", "centerness")
    for name, tensors in zip(names, predictions, strict=True):
        if len(tensors) != levels:
            raise ValueError(
                f"postprocess: {name} must have one level for each of {levels} strides, "
                f"got {len(tensors)}"
            )
    first = predictions[0][0]
    if first.dim() != 4 or first.shape[1] < 1:
        raise ValueError(
            f"postprocess: logits must be [N, C, H_l, W_l] with C >= 1, got {list(first.shape)}"
        )
    num_images = first.shape[0]
    for name, tensors, channels in zip(names, predictions, (first.shape[1], 4, 1), strict=True):
        for level, (tensor, logits) in enumerate(zip(tensors, predictions[0], strict=True)):
            if (
                tensor.dim() != 4
                or tensor.shape[:2] != (num_images, channels)
                or tensor.shape[2:] != logits.shape[2:]
                or tensor.shape[2] < 1
                or tensor.shape[3] < 1
            ):
                expected = f"[{num_images}, {channels}, H_{level}, W_{level}]"
                raise ValueError(
                    f"postprocess: {name} of level {level} must be {expected} with the same sides "
                    f">= 1 in all predictions, got {list(tensor.shape)}"
                )
            if not tensor.is_floating_point() or tensor.dtype != tensors[0].dtype:
                raise TypeError(
                    f"postprocess: {name} must be floating point, the same in all levels, "
                    f"got {tensor.dtype} at level {level}"
                )
            if tensor.device != first.device:
                raise ValueError(
                    f"postprocess: {name} must be on the device of logits, {first.device}, "
                    f"got {tensor.device}"
                )
    _check_sizes("image_sizes", image_sizes, first)
    if original_sizes is not None:
        _check_sizes("original_sizes", original_sizes, first)
    if padded_size is not None and (len(padded_size) != 2 or min(padded_size) < 1):
        raise ValueError(
            f"postprocess: padded_size must be (height, width) >= 1, got {padded_size}"
        )
    return _geometry(predictions, options, padded_size)


def _check_sizes(name: str, sizes: Tensor, logits: Tensor) -> None:
    if sizes.dtype == torch.bool or sizes.is_complex():
        raise TypeError(
            f"postprocess: {name} must be integers or floating point, got {sizes.dtype}"
        )
    if sizes.shape != (logits.shape[0], 2):
        raise ValueError(
            f"postprocess: {name} must have shape {[logits.shape[0], 2]}, got {list(sizes.shape)}"
        )
    if sizes.device != logits.device:
        raise ValueError(
            f"postprocess: {name} must be on the device of logits, {logits.device}, "
            f"got {sizes.device}"
        )


def _fake(
    logits: list[Tensor],
    ltrb: list[Tensor],
    centerness: list[Tensor],
    image_sizes: Tensor,
    original_sizes: Tensor | None,
    geometry: list[float],
    score_threshold: float,
    iou_threshold: float,
    topk_candidates: int,
    max_detections: int,
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
