"""torchvision's post-processing of dense one-stage detectors, of a whole batch at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...padded_batched_nms import padded_batched_nms


def can_detect(head_outputs: dict[str, list[Tensor]], max_detections: int) -> bool:
    """Whether :func:`detect` does what torchvision does: float64 boxes it would round."""
    dtypes = {level.dtype for levels in head_outputs.values() for level in levels}
    return torch.float64 not in dtypes and max_detections >= 1


def detect(
    logits: Sequence[Tensor],
    quality: Sequence[Tensor] | None,
    regression: Sequence[Tensor],
    anchors: Sequence[Tensor],
    image_shapes: Sequence[tuple[int, int]],
    *,
    decode: Callable[[Tensor, Tensor], Tensor],
    score_threshold: float,
    iou_threshold: float,
    topk_candidates: int,
    max_detections: int,
) -> list[dict[str, Tensor]]:
    """Boxes, scores and labels of each image, best first.

    They are those of torchvision, but for the last bit of some scores; see :func:`_sigmoid`.

    Args:
        logits (levels of Tensor[N, A, C]): of classes.
        quality (levels of Tensor[N, A, 1], optional): logits of centerness. The score is the root
            of the product of both sigmoids, and without it the one sigmoid.
        regression (levels of Tensor[N, A, 4]): what ``decode`` takes.
        anchors (levels of Tensor[A, 4]): the same for all images.
        image_shapes: (height, width) of each image, to which boxes are clipped.
        decode: boxes [M, 4] of regression [M, 4] and anchors [M, 4].
        score_threshold: scores are above it.
        iou_threshold: of NMS among boxes of the same class.
        topk_candidates: the best so many of each level and image.
        max_detections: of an image, at least 1.
    """
    found = _above_threshold(logits, quality, score_threshold, topk_candidates)
    best, counts = _best_of_each(found, topk_candidates)
    row = found.row[best]
    image, location = found.image[row], found.location[row]
    boxes = decode(
        torch.cat(list(regression), dim=1)[image, location], torch.cat(list(anchors))[location]
    )
    return _suppress(
        _clip(boxes, image, image_shapes),
        found.score[best],
        found.label[best],
        counts,
        iou_threshold,
        max_detections,
    )


class _Found(NamedTuple):
    """Scores above the threshold, [K], level by level, and in each image by image.

    They are in R rows, each that of a location of an image.
    """

    score: Tensor
    label: Tensor
    row: Tensor
    """In which of the rows."""
    image: Tensor
    """Of the row, [R]."""
    location: Tensor
    """Of the row, [R], counted over the levels."""
    rows: list[list[int]]
    """Of each level and image."""


def _above_threshold(
    logits: Sequence[Tensor], quality: Sequence[Tensor] | None, threshold: float, k: int
) -> _Found:
    """Scores above the threshold; where there are many, some that are not among the k best go.

    As few are, logits are compared first, with the least one that may do. The scores are computed
    of what is left.
    """
    num_images, _, num_classes = logits[0].shape
    every_quality = None if quality is None else torch.cat(list(quality), dim=1)[..., 0]  # [N, L]
    highest = torch.cat([level.amax(dim=-1) for level in logits], dim=1)  # [N, L]
    of_quality = None if every_quality is None else every_quality.float().sigmoid()
    least = max(threshold, 0.0)
    least = least if of_quality is None else least * least
    product = torch.full((), least, dtype=torch.float32, device=highest.device)
    limit = _least_logit(product, of_quality, logits[0].dtype).expand_as(highest)
    sizes = [level.shape[1] for level in logits]
    limits, may_do = [], []
    for part in _split(sizes, limit, highest, of_quality):
        limits.append(_without_the_rest(*part, logits[0].dtype, k))
        # Not ">=": NaN among the logits of a location must not hide the others.
        may_do.append(~(part[1] < limits[-1]))

    images, locations, values, places, rows = [], [], [], [], []
    start = taken = 0
    for level, rows_that_may, lowest in zip(logits, may_do, limits, strict=True):
        image, row = rows_that_may.nonzero(as_tuple=True)
        of_rows = level[image, row]  # [R, C]
        place = (of_rows >= lowest[image, row][:, None]).view(-1).nonzero()[:, 0]
        values.append(of_rows.view(-1)[place])
        places.append(place + taken * num_classes)
        images.append(image)
        locations.append(row + start)
        rows.append(torch.bincount(image, minlength=num_images))
        start += level.shape[1]
        taken += len(image)

    image, location, place = torch.cat(images), torch.cat(locations), torch.cat(places)
    score = _sigmoid(torch.cat(values))
    if every_quality is not None:
        of_row = _sigmoid(every_quality[image, location])
        score = torch.sqrt(score * of_row[place // num_classes])
    keep = (score > threshold).nonzero()[:, 0]
    place = place[keep]
    row = place // num_classes
    return _Found(
        score[keep], place - row * num_classes, row, image, location, torch.stack(rows).tolist()
    )


def _sigmoid(x: Tensor) -> Tensor:
    """Of equal logits [K] the same, as far as it can be had.

    On a CPU, PyTorch's rounds the last few elements of a tensor otherwise than those before.
    """
    return torch.nn.functional.pad(x, (0, -len(x) % 64)).sigmoid()[: len(x)]


def _split(
    sizes: list[int], limit: Tensor, highest: Tensor, quality: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Tensors [N, L], level by level."""
    a, b = limit.split(sizes, dim=1), highest.split(sizes, dim=1)
    if quality is None:
        return zip(a, b, [None] * len(sizes), strict=True)
    return zip(a, b, quality.split(sizes, dim=1), strict=True)


def _least_logit(product: Tensor, quality: Tensor | None, dtype: torch.dtype) -> Tensor:
    """No lower logit has a p with p q at least ``product``, whatever is lost to rounding.

    The logit of p is -log(1 / p - 1).
    """
    product = product * (1 - 64 * torch.finfo(dtype).eps)
    inverse = (1.0 if quality is None else quality) / product
    limit = -torch.log((inverse - 1).clamp(min=0))
    return torch.where(limit.isnan(), -math.inf, limit)


def _without_the_rest(
    limit: Tensor, highest: Tensor, quality: Tensor | None, dtype: torch.dtype, k: int
) -> Tensor:
    """``limit`` [N, A] of a level, higher for images with more than k locations above it.

    The k-th best location is a bound of the k-th best score.
    """
    if k < 1 or highest.shape[1] <= k or int((highest >= limit).sum(dim=1).max()) <= k:
        return limit
    product = highest.float().sigmoid()
    if quality is not None:
        product = product * quality
    product = torch.where(product.isnan(), 0.0, product)
    least = product.topk(k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    return torch.maximum(limit, _least_logit(least, quality, dtype))


def _best_of_each(found: _Found, k: int) -> tuple[Tensor, list[list[int]]]:
    """Indices of the k best scores of each level and image, best first, and how many of each.

    One call for each, as it is by torchvision: which of equal scores comes first is then the same.
    """
    # Where the rows of each end, and then where what was found in them does.
    ends = torch.tensor([count for level in found.rows for count in level]).cumsum(0)
    ends = torch.searchsorted(found.row, ends.to(found.row.device))
    best, counts, start = [], [], 0
    for end in ends.tolist():
        best.append(found.score[start:end].topk(min(k, end - start)).indices + start)
        counts.append(len(best[-1]))
        start = end
    num_images = len(found.rows[0])
    return torch.cat(best), [counts[i : i + num_images] for i in range(0, len(counts), num_images)]


def _clip(boxes: Tensor, image: Tensor, image_shapes: Sequence[tuple[int, int]]) -> Tensor:
    """Boxes [M, 4] within the image of each, [M]."""
    corners = [(width, height, width, height) for height, width in image_shapes]
    limits = torch.tensor(corners, dtype=boxes.dtype).to(boxes.device)
    return torch.minimum(boxes.clamp(min=0), limits[image])


def _suppress(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    counts: list[list[int]],
    iou_threshold: float,
    max_detections: int,
) -> list[dict[str, Tensor]]:
    """torchvision's ``batched_nms`` of each image, for all of them together.

    The candidates come level by level, and in each image by image, ``counts[level][image]`` of
    them.
    """
    device = boxes.device
    num_images = len(counts[0])
    of_image = [sum(level[i] for level in counts) for i in range(num_images)]
    capacity = max(of_image)
    if capacity == 0:
        return [{"boxes": boxes, "scores": scores, "labels": labels} for _ in range(num_images)]
    # Rows of a table [N, capacity] that has the candidates of an image side by side.
    shifts, before, taken = [], [0] * num_images, 0
    for level in counts:
        for i, count in enumerate(level):
            shifts.append(i * capacity + before[i] - taken)
            before[i] += count
            taken += count
    repeats = torch.tensor([count for level in counts for count in level])
    slots = torch.arange(taken) + torch.tensor(shifts).repeat_interleave(repeats)
    source = torch.full((num_images * capacity,), -1)
    source[slots] = torch.arange(taken)
    source = source.to(device).view(num_images, capacity)

    rows = source.clamp(min=0)
    boxes, scores = boxes[rows], scores[rows]
    labels = labels[rows].masked_fill(source < 0, -1)
    keep, kept = padded_batched_nms(
        _apart(boxes, labels, of_image),
        scores,
        labels,
        _as_compared(iou_threshold, device),
        max_detections,
    )
    detections = []
    for i, count in enumerate(kept.tolist()):
        best = keep[i, :count]
        detections.append(
            {"boxes": boxes[i, best], "scores": scores[i, best], "labels": labels[i, best]}
        )
    return detections


def _apart(boxes: Tensor, labels: Tensor, counts: list[int]) -> Tensor:
    """Boxes [N, K, 4] as ``batched_nms`` compares them.

    Up to so many candidates it moves those of each class to a place of their own, which costs
    coordinates some of their precision: the last bits of an IoU decide like its own if the boxes
    are moved here, too.
    """
    most = 1000 if boxes.device.type == "cpu" else 25_000
    moved = [0 < count <= most for count in counts]
    if not any(moved) or boxes.dtype != torch.float32:
        return boxes
    present = labels >= 0
    largest = boxes.masked_fill(~present[..., None], -math.inf).amax(dim=(1, 2))
    offsets = labels * (largest[:, None] + 1)
    which = torch.tensor(moved).to(boxes.device)[:, None] & present
    return boxes + torch.where(which, offsets, 0)[..., None]


def _as_compared(threshold: float, device: torch.device) -> float:
    """What float32 overlaps are to be above for torchvision's decision.

    On a CPU it compares with the float64 threshold, and the float32 next to that may be above it.
    """
    if device.type != "cpu":
        return threshold
    nearest = torch.tensor(threshold, dtype=torch.float32)
    if nearest.item() > threshold:
        nearest = torch.nextafter(nearest, torch.tensor(-math.inf))
    return max(nearest.item(), 0.0)
