"""From the outputs of a dense detector's head to detections, in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .grids import Grid, locations_of
from .padded_batched_nms import padded_batched_nms_ref
from .postprocess_arguments import Levels, Predictions, check, ends_of, grids_of, max_apart
from .postprocess_options import PostprocessOptions


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


@torch.no_grad()
def postprocess_ref(
    predictions: Predictions,
    image_sizes: Tensor,
    options: PostprocessOptions | None = None,
    *,
    anchors: Levels | None = None,
    original_sizes: Tensor | None = None,
    padded_size: tuple[int, int] | None = None,
) -> Postprocessed:
    """Same contract as :func:`postprocess`, in plain PyTorch."""
    options = PostprocessOptions() if options is None else options
    check(predictions, image_sizes, options, anchors, original_sizes, padded_size)
    selected = []
    for level, grid in enumerate(grids_of(predictions, options, padded_size)):
        logits, regression = predictions[0][level], predictions[1][level]
        centerness = None if predictions[2] is None else predictions[2][level]
        places = _anchors_of(logits, grid if anchors is None else anchors[level])
        selected.append(_select(logits, regression, centerness, places, options))
    boxes, scores, labels = (torch.cat([level[i] for level in selected], dim=1) for i in range(3))
    dropped = torch.stack([level[3] for level in selected]).sum(dim=0)

    finite = boxes.isfinite().all(dim=-1)  # asked before clipping makes infinity a number
    dropped = dropped + ((labels >= 0) & ~finite).sum(dim=1)
    before, added = ends_of(options)
    if options.clip:
        limit = image_sizes.to(boxes).flip(-1).repeat(1, 2).unsqueeze(1)  # [N, 1, (w, h, w, h)]
        boxes = torch.minimum(boxes.clamp(min=0), limit - added)
    boxes = _extended(boxes, before)
    kept = finite
    if not options.keep_empty:
        kept = kept & (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])
    labels = torch.where(kept, labels, -1)

    keep, counts = padded_batched_nms_ref(
        _moved_apart(boxes, labels, max_apart(options, boxes.device)),
        scores,
        labels,
        options.iou_threshold,
        options.max_detections,
        class_agnostic=options.class_agnostic,
    )
    index, padding = keep.clamp(min=0), keep < 0
    boxes = _extended(boxes.gather(1, index.unsqueeze(-1).expand(-1, -1, 4)), -before)
    if original_sizes is not None:
        scale = original_sizes.to(boxes) / image_sizes.to(boxes)
        boxes = boxes * scale.flip(-1).repeat(1, 2).unsqueeze(1)
    return Postprocessed(
        _extended(boxes, added).masked_fill(padding.unsqueeze(-1), 0),
        _final(scores.gather(1, index), options).masked_fill(padding, 0),
        labels.gather(1, index).masked_fill(padding, -1),
        counts,
        dropped,
    )


def _anchors_of(logits: Tensor, where: Grid | Tensor) -> Tensor:
    """Centre, width and height of each location of a level, [H W, 4]."""
    if isinstance(where, Tensor):
        corners = where.float()
        low, high = corners[:, :2], corners[:, 2:]
        return torch.cat((0.5 * (low + high), high - low), dim=1)
    centers = locations_of(logits.shape[2], logits.shape[3], where, logits.device)
    return torch.cat((centers, torch.full_like(centers, where.unit)), dim=1)


def _select(
    logits: Tensor,
    regression: Tensor,
    centerness: Tensor | None,
    anchors: Tensor,
    options: PostprocessOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Best candidates of one level: boxes [N, K, 4], products of scores [N, K], labels [N, K] or
    -1; and how many were left out because their score is not a number [N]."""
    num_classes = logits.shape[1]
    cls = _sigmoid(logits)
    weight = cls.new_ones(1) if centerness is None else _sigmoid(centerness)
    product = cls * weight
    if options.threshold_on == "class":
        passes = ~(cls <= options.score_threshold)
    else:
        passes = ~(_final(product, options) <= options.score_threshold)
        passes &= ~(_final(weight, options) <= options.score_threshold)
    dropped = (passes & product.isnan()).flatten(1).sum(dim=1)

    # Score and index in one number, of equal scores the lower index: topk itself promises no order
    # among equals. The bits of floats that are not negative are in their order.
    key = torch.where(passes & (product > 0), product if options.topk_by == "final" else cls, 0.0)
    key = key.permute(0, 2, 3, 1).flatten(1)
    flat = torch.arange(key.shape[1], device=key.device)  # location, then class
    ranks = key.contiguous().view(torch.int32).long() << 32 | (0xFFFFFFFF - flat)
    best = ranks.topk(min(options.topk_candidates, key.shape[1]), dim=1).values
    scores = (best >> 32).int().view(torch.float32)
    flat = 0xFFFFFFFF - (best & 0xFFFFFFFF)
    location, labels = flat // num_classes, flat % num_classes
    if options.topk_by == "class" and centerness is not None:
        scores = scores * weight.flatten(1).gather(1, location)

    numbers = regression.float().flatten(2).transpose(1, 2)
    numbers = numbers.gather(1, location.unsqueeze(-1).expand(-1, -1, 4))
    boxes = _decode(numbers, anchors[location], options)
    return boxes, scores, torch.where(scores > 0, labels, -1), dropped


def _decode(numbers: Tensor, anchors: Tensor, options: PostprocessOptions) -> Tensor:
    """Boxes [..., 4] of what is regressed [..., 4], and of centre and sides [..., 4]."""
    center, sides = anchors.split(2, dim=-1)
    if options.coding == "ltrb":
        if options.normalize_ltrb:
            numbers = numbers * sides.repeat(*[1] * (sides.dim() - 1), 2)
        return torch.cat((center - numbers[..., :2], center + numbers[..., 2:]), dim=-1)
    numbers = numbers / numbers.new_tensor(options.delta_weights)
    way, logarithms = numbers.split(2, dim=-1)
    center = way * sides + center
    logarithms = logarithms.clamp(max=options.delta_limit)
    half = 0.5 * (logarithms.to(_wide(numbers)).exp().float() * sides)
    return torch.cat((center - half, center + half), dim=-1)


def _extended(boxes: Tensor, by: float) -> Tensor:
    """Boxes [..., 4] that end so much further to the right and below."""
    return boxes if by == 0 else torch.cat((boxes[..., :2], boxes[..., 2:] + by), dim=-1)


def _moved_apart(boxes: Tensor, labels: Tensor, most: int) -> Tensor:
    """Boxes [N, K, 4] as torchvision's ``batched_nms`` compares up to so many of an image."""
    present = labels >= 0
    if most == 0:
        return boxes
    highest = boxes.masked_fill(~present.unsqueeze(-1), -torch.inf).flatten(1).amax(dim=1)
    by = labels.float() * (highest + 1).unsqueeze(1)
    few = present.sum(dim=1, keepdim=True) <= most
    return torch.where((few & present).unsqueeze(-1), boxes + by.unsqueeze(-1), boxes)


def _wide(x: Tensor) -> torch.dtype:
    """float64, of which results are rounded to the nearest float32, but for mps, which has none."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def _sigmoid(x: Tensor) -> Tensor:
    """float32, the nearest to the exact one."""
    return x.to(_wide(x)).sigmoid().float()


def _final(product: Tensor, options: PostprocessOptions) -> Tensor:
    if options.score == "product":
        return product
    # PyTorch's float32 root is not correctly rounded on every CPU.
    return product.to(_wide(product)).sqrt().float()
