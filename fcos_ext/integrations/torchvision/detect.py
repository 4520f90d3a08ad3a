"""torchvision's post-processing of dense one-stage detectors, of a whole batch at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

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
    images, boxes, scores, labels, counts = [], [], [], [], []
    for level, level_logits in enumerate(logits):
        image, row, label, score = _above_threshold(
            level_logits, None if quality is None else quality[level], score_threshold
        )
        best, count = _best_of_each_image(image, score, len(image_shapes), topk_candidates)
        image, row = image[best], row[best]
        images.append(image)
        boxes.append(decode(regression[level][image, row], anchors[level][row]))
        scores.append(score[best])
        labels.append(label[best])
        counts.append(count)
    return _suppress(
        _clip(torch.cat(boxes), torch.cat(images), image_shapes),
        torch.cat(scores),
        torch.cat(labels),
        counts,
        iou_threshold,
        max_detections,
    )


def _above_threshold(
    logits: Tensor, quality: Tensor | None, threshold: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Image, anchor, class and score of all scores above the threshold, each [K], in this order.

    As few scores are, logits are compared first, with the least one that may do; the scores are
    computed of what is left.
    """
    limit = _least_logit(logits.dtype, quality, threshold)  # [N, A] or a number
    # Not ">=": NaN among the logits of an anchor must not hide the others.
    image, row = (~(logits.amax(dim=-1) < limit)).nonzero(as_tuple=True)
    if isinstance(limit, Tensor):
        limit = limit[image, row][:, None]
    of_rows = logits[image, row]
    found, label = (of_rows >= limit).nonzero(as_tuple=True)
    image, row = image[found], row[found]
    score = _sigmoid(of_rows[found, label])
    if quality is not None:
        score = torch.sqrt(score * _sigmoid(quality[image, row, 0]))
    keep = (score > threshold).nonzero()[:, 0]
    return image[keep], row[keep], label[keep], score[keep]


def _sigmoid(x: Tensor) -> Tensor:
    """Of equal logits [K] the same, as far as it can be had.

    On a CPU, PyTorch's rounds the last few elements of a tensor otherwise than those before.
    """
    return torch.nn.functional.pad(x, (0, -len(x) % 64)).sigmoid()[: len(x)]


def _least_logit(dtype: torch.dtype, quality: Tensor | None, threshold: float) -> Tensor | float:
    """No lower logit has a score above the threshold, whatever is lost to rounding.

    sqrt(p q) > t needs p > t^2 / q; of p the logit is -log(1 / p - 1).
    """
    if threshold <= 0:
        return -math.inf
    margin = 1 - 64 * torch.finfo(dtype).eps
    if quality is None:
        p = threshold * margin
        return -math.log(1 / p - 1) if p < 1 else math.inf
    inverse = quality[..., 0].float().sigmoid() / (threshold * threshold * margin)
    return -torch.log((inverse - 1).clamp(min=0))


def _best_of_each_image(
    image: Tensor, score: Tensor, num_images: int, k: int
) -> tuple[Tensor, list[int]]:
    """Indices of the k best scores of each image, best first, and how many of each image.

    ``image`` does not decrease. One call for each image, as it is by torchvision: which of equal
    scores comes first is then the same.
    """
    sizes = torch.bincount(image, minlength=num_images).tolist()
    best, start = [], 0
    for size in sizes:
        best.append(score[start : start + size].topk(min(k, size)).indices + start)
        start += size
    return torch.cat(best), [len(indices) for indices in best]


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
