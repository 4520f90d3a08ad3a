"""torchvision's FCOS, its loss and post-processing on our kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import FCOS

from ...assign_targets import AssignedTargets, assign_targets
from ...box_and_centerness_loss import box_and_centerness_loss
from ...grids import Grid
from ...sigmoid_focal_loss import sigmoid_focal_loss
from .detect import detect, options_of

Target = dict[str, Tensor]

#: Up to here every integer has a number of its own in the dtype: torchvision makes its anchors in
#: the dtype of the features, and beyond they are no regular grid.
_EXACT_INTEGERS = {torch.float32: 1 << 24, torch.float16: 1 << 11, torch.bfloat16: 1 << 8}


class AcceleratedFCOS(FCOS):
    """A torchvision FCOS that computes the same, faster. See :func:`accelerate`.

    Where the kernels do not compute what torchvision does, its own methods run: in float64; for
    the loss if the features are bfloat16 and the image is larger than 256 pixels; and to detect
    with thresholds beyond 0 and 1.
    """

    def compute_loss(
        self,
        targets: list[Target],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        num_anchors_per_level: list[int],
    ) -> dict[str, Tensor]:
        """Summed focal, GIoU and centerness losses over max(1, positives), of the batch."""
        levels = None
        if all(target["boxes"].dtype == torch.float32 for target in targets):
            levels = _levels_of(anchors[0], num_anchors_per_level, self.center_sampling_radius)
        if levels is None:
            return super().compute_loss(targets, head_outputs, anchors, num_anchors_per_level)

        logits = head_outputs["cls_logits"]  # [N, L, C]
        assigned = assign(targets, levels, logits.shape[-1])
        # Distances in pixels, as eps is an area in pixels. The anchors are squares.
        units = (anchors[0][:, 2] - anchors[0][:, 0]).float()[:, None]  # [L, 1]
        sums = box_and_centerness_loss(
            head_outputs["bbox_regression"] * units,
            head_outputs["bbox_ctrness"].squeeze(dim=2),
            assigned.ltrb,
            assigned.labels,
            centerness_target=assigned.centerness,
            weighted=False,
            kind="giou",
            eps=1e-7,
        )
        normalizer = sums.num_pos.clamp(min=1)
        return {
            "classification": focal_loss(logits, assigned.labels, normalizer),
            "bbox_regression": sums.box / normalizer,
            "bbox_ctrness": sums.centerness / normalizer,
        }

    def postprocess_detections(
        self,
        head_outputs: dict[str, list[Tensor]],
        anchors: list[list[Tensor]],
        image_shapes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """The detections of each image, best first."""
        options = options_of(self, head_outputs)
        if options is None:
            return super().postprocess_detections(head_outputs, anchors, image_shapes)
        return detect(head_outputs, anchors[0], image_shapes, options)


def focal_loss(logits: Tensor, labels: Tensor, normalizer: Tensor) -> Tensor:
    """With torchvision's alpha and gamma; logits [..., C], labels [...]."""
    return sigmoid_focal_loss(
        logits,
        labels,
        alpha=0.25,
        gamma=2.0,
        normalizer=normalizer,
        # The gradient along with the loss, unless that is likely to be scaled for float16.
        fused_gradient=logits.dtype == torch.float32,
    )


def assign(targets: list[Target], levels: dict[str, Any], num_classes: int) -> AssignedTargets:
    """What torchvision's ``compute_loss`` matches, of the whole batch."""
    counts = [0, *(len(target["boxes"]) for target in targets)]
    boxes = torch.cat([target["boxes"] for target in targets])
    labels = torch.cat([target["labels"] for target in targets]).long()
    check_labels(labels, num_classes)
    return assign_targets(
        boxes,
        labels.clamp(min=-1),  # all that are negative are background, none is to be ignored
        torch.tensor(counts).cumsum(0).to(boxes.device),
        boundary="strict",
        ties="torchvision",
        **levels,
    )


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raises where torchvision indexes out of bounds; on a GPU without waiting for it."""
    known = (labels < num_classes).all()
    if labels.device.type != "cpu":
        torch._assert_async(known)
    elif not known:
        raise IndexError(
            f"compute_loss: labels must be below the number of classes, {num_classes}, "
            f"got {labels.max().item()}"
        )


def _levels_of(anchors: Tensor, counts: list[int], radius: float) -> dict[str, Any] | None:
    """Geometry arguments of ``assign_targets`` for anchors [L, 4] on regular grids, or None.

    Neither the sizes of the levels nor that of the padded image reach this place, but three anchors
    of each level tell: its first two and its last. They are read from the device at once.
    """
    rows, start = [], 0
    for count in counts:
        rows += [start, start + min(1, count - 1), start + count - 1]
        start += count
    corners = anchors.detach()[rows].tolist()
    limit = _EXACT_INTEGERS.get(anchors.dtype, 0)
    if any(abs(x) > limit for corner in corners for x in corner):
        return None

    sizes, grids, ranges = [], [], []
    for level, count in enumerate(counts):
        size_and_grid = _grid_of(corners[3 * level : 3 * level + 3], count)
        if size_and_grid is None:
            return None
        size, grid = size_and_grid
        # In the dtype of the anchors, as torchvision computes it.
        reach = (torch.tensor([grid.unit], dtype=anchors.dtype) * radius).item()
        sizes.append(size)
        grids.append(grid._replace(reach=reach))
        ranges.append(
            (
                4 * grid.unit if level > 0 else 0.0,
                8 * grid.unit if level + 1 < len(counts) else math.inf,
            )
        )
    return {"feature_sizes": sizes, "strides": grids, "size_ranges": ranges}


def _grid_of(corners: list[list[float]], count: int) -> tuple[tuple[int, int], Grid] | None:
    """(height, width) and grid of a level, from its first two squares and its last."""
    (x, y), (next_x, next_y), (last_x, last_y) = (
        ((x0 + x1) / 2, (y0 + y1) / 2) for x0, y0, x1, y1 in corners
    )
    x0, y0, x1, y1 = corners[0]
    unit = x1 - x0
    if not unit > 0 or y1 - y0 != unit:
        return None
    # Along an axis with a single location any step will do.
    step_x = next_x - x if next_x > x else unit
    width = round((last_x - x) / step_x) + 1
    height, rest = divmod(count, width)
    step_y = (last_y - y) / (height - 1) if height > 1 else unit
    regular = (
        rest == 0
        and step_y > 0
        and step_y == round(step_y)
        and x + (width - 1) * step_x == last_x
        and y + (height - 1) * step_y == last_y
        and (next_x, next_y) == ((x + step_x, y) if width > 1 else (x, y + step_y * (height > 1)))
    )
    if not regular:
        return None
    return (height, width), Grid(step=(step_y, step_x), first=(y, x), unit=unit)
